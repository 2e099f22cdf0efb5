"""What a loss costs on each of several ranks, from the same rules by which it is computed."""

from typing import NamedTuple

import torch

from . import _checks, _collectives
from ._collectives import Group
from ._moments import is_gathered, row_length
from ._request import Request, uses_gram
from ._sharded_covariance import block_length, is_one_message
from ._strategy import covariance_strategy, sketch_strategy
from ._torch import CHUNK

_REQUESTS = {
    "variance": Request(variance="hinge"),
    "center": Request(center=True),
    "invariance": Request(invariance=2),
    "covariance": Request(covariance="auto"),
    "wasserstein": Request(sketch="wasserstein"),
    "epps_pulley": Request(sketch="epps_pulley"),
    "vicreg": Request(variance="hinge", covariance="auto", invariance=2),
    "visreg": Request(variance="squared", center=True, sketch="wasserstein", invariance=2),
    "lejepa": Request(sketch="epps_pulley", invariance=2),
}


class Message(NamedTuple):
    """One collective of the forward pass; there are none in the backward pass.

    Attributes:
        collective: "all_gather", "all_reduce" or "all_to_all".
        carries: what.
        size: bytes of this rank's message.
        sent: bytes that a rank sends: (W - 1) times the size, 2 (W - 1) / W or (W - 1) / W of it.
    """

    collective: str
    carries: str
    size: int
    sent: int


class Plan(NamedTuple):
    """What one call costs each rank.

    Attributes:
        term: which loss.
        ranks: W.
        strategy: what was chosen: "gram" or "feature" for a covariance; "slices", "samples" or
            "sums" for a sketch, "local" on one rank; "moments" for neither.
        messages: in their order.
        sent: bytes that a rank sends, of all messages.
        flops: floating-point operations of the matrix products, forward and backward, of a rank.
        memory: bytes at the peak of either pass, about, beside the embeddings and the directions:
            in plain PyTorch on an accelerator, views as separate tensors.
    """

    term: str
    ranks: int
    strategy: str
    messages: tuple[Message, ...]
    sent: int
    flops: int
    memory: int

    def __str__(self) -> str:
        lines = [
            f"{self.term} over {self.ranks} ranks by {self.strategy}: {_human(self.sent)}B sent, "
            f"{_human(self.flops)}FLOP, {_human(self.memory)}B of memory on each"
        ]
        lines += [f"  {m.collective} of {m.carries}: {_human(m.size)}B" for m in self.messages]
        return "\n".join(lines)


def plan(
    term: str,
    samples: int,
    dimensions: int,
    *,
    slices: int = 1024,
    views: int = 1,
    ranks: int | None = None,
    dtype: torch.dtype = torch.float32,
    strategy: str = "auto",
    exchange: str = "auto",
    per_rank: bool = False,
    knots: int = 17,
    process_group: Group = None,
) -> Plan:
    """Say how a loss is computed over ranks, and what that costs each of them.

    The choice is by bytes, from numbers that all ranks have. Not counted: 16 bytes that the
    ranks of a CPU exchange at every call, and those of a GPU at the first one.

    Args:
        term: "variance", "center", "invariance", "covariance", "wasserstein", "epps_pulley",
            "vicreg", "visreg" or "lejepa".
        samples: of one view on one rank, the most of any.
        dimensions: D.
        slices: K, for a sketch.
        views: V.
        ranks: W; ``None`` for those of the group.
        dtype: of the embeddings.
        strategy: of the covariance, as its option.
        exchange: of the sketch, as its option.
        per_rank: whether ranks have slices of their own.
        knots: of the Epps-Pulley statistic.
        process_group: the group, if ``ranks`` is not given.

    Returns:
        Plan: for one rank, without messages.

    Raises:
        TypeError, ValueError: for a bad argument.
    """
    _checks.one_of("term", term, tuple(_REQUESTS))
    _checks.one_of("strategy", strategy, ("auto", "gram", "feature"))
    _checks.one_of("exchange", exchange, ("auto", "slices", "samples"))
    for name, number in (("samples", samples), ("dimensions", dimensions), ("slices", slices)):
        _checks.integer(name, number, 1)
    for name, number, least in (("views", views, 1), ("knots", knots, 2)):
        _checks.integer(name, number, least)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"dtype: expected one of 16, 32 or 64-bit floats, got {dtype}.")
    if per_rank and exchange == "slices":
        raise ValueError("exchange: expected 'auto' or 'samples' with per_rank, got 'slices'.")
    size = _collectives.members(process_group)[0] if ranks is None else ranks
    _checks.integer("ranks", size, 1)
    request = _REQUESTS[term].but(exchange=exchange, own_slices=per_rank, knots=knots)
    if request.covariance:
        request = request.but(covariance=strategy)
    wire = dtype.itemsize
    width = 8 if dtype == torch.float64 else 4
    return _Cost(term, request, size, samples, dimensions, slices, views, wire, width).plan()


class _Cost(NamedTuple):
    term: str
    request: Request
    ranks: int
    samples: int
    dimensions: int
    slices: int
    views: int
    wire: int
    width: int

    def plan(self) -> Plan:
        r = self.request
        sides = self.dimensions, self.wire, self.width
        covariance = ""
        if r.covariance:
            covariance = covariance_strategy(r.covariance, self.ranks, self.samples, *sides)
        sketch = sketch_strategy(r, self.slices, self.ranks, *sides)
        if self.ranks == 1:
            if covariance:
                covariance = "gram" if uses_gram(r, self.samples, self.dimensions) else "feature"
            sketch = "local" if sketch else ""
        strategy = covariance or sketch or "moments"
        messages = self._messages(covariance, sketch) if self.ranks > 1 else ()
        return Plan(
            self.term,
            self.ranks,
            strategy,
            messages,
            sum(m.sent for m in messages),
            self._flops(covariance, sketch),
            self._memory(covariance, sketch),
        )

    def _shape(self) -> tuple[int, int, int]:
        return self.views, self.samples, self.dimensions

    def _message(self, collective: str, carries: str, size: int) -> Message:
        others = self.ranks - 1
        sent = {
            "all_gather": others * size,
            "all_reduce": 2 * others * size // self.ranks,
            "all_to_all": others * size // self.ranks,
        }
        return Message(collective, carries, size, sent[collective])

    def _messages(self, covariance: str, sketch: str) -> tuple[Message, ...]:
        r, width = self.request, self.width
        shape = self._shape()
        numbers = self.views * self.samples * self.dimensions
        row = row_length(shape)
        sums = ["squared deviations"] if r.invariance else []
        out = []
        if covariance == "gram" or sketch == "samples":
            size = -(-numbers * self.wire // 8) * 8 + row * width
            out.append(self._message("all_gather", "samples and moments", size))
        elif (covariance == "feature" and not is_one_message(self.ranks, self.dimensions)) or (
            not covariance and (r.variance or r.center or sketch == "slices")
        ):
            if is_gathered(self.ranks, shape):
                out.append(self._message("all_gather", "moments", row * width))
            else:
                columns = self.views * self.dimensions
                out.append(self._message("all_reduce", "sums", 8 * (1 + columns)))
                out.append(self._message("all_reduce", "squares", 16 * columns))
        if covariance == "feature":
            length = self.views * block_length(self.dimensions) + len(sums)
            carries = "products"
            if is_one_message(self.ranks, self.dimensions):
                length += self.ranks * row_length(shape, squares=False)
                carries = "products and means"
            out.append(self._message("all_reduce", carries, length * width))
            sums = []
        elif covariance == "gram":
            sums.append("energy")
        if sketch == "sums":
            length = self.views * self.slices * 2 * (r.knots - 1) + 1 + len(sums)
            out.append(self._message("all_reduce", "harmonics", length * width))
            sums = []
        elif sketch == "slices":
            size = self.ranks * self._own_slices() * self.views * self.samples * width
            out.append(self._message("all_to_all", "projections", size))
            out.append(self._message("all_to_all", "residuals", size))
            sums.append("sketch")
        elif sketch == "samples":
            out.append(self._message("all_to_all", "gradients", self.ranks * numbers * width))
            sums.append("sketch")
        if not (covariance or sketch or r.variance or r.center):
            sums.append("count")
        if sums:
            out.append(self._message("all_reduce", ", ".join(sums), 8 * len(sums)))
        return tuple(out)

    def _own_slices(self) -> int:
        return self.slices if self.request.own_slices else -(-self.slices // self.ranks)

    def _flops(self, covariance: str, sketch: str) -> int:
        """Operations of the matrix products."""
        views, local, dimensions = self.views, self.samples, self.dimensions
        own = views * local * dimensions
        flops = 0
        if covariance and self.ranks == 1:
            side, other = local, dimensions
            if covariance == "feature":
                side, other = other, side
            blocks = max(1, min(8, side // 128))  # of which the lower triangle is computed
            flops += views * other * side * (side * (blocks + 1) // blocks + 2 * side)
        elif covariance == "gram":
            flops += 4 * local * self.ranks * own
        elif covariance == "feature":
            half = block_length(dimensions)
            flops += 2 * views * local * (half + dimensions**2)
            if is_one_message(self.ranks, dimensions):
                flops += 2 * views * self.ranks * half
        if sketch:
            everywhere = self.ranks if sketch == "samples" else 1
            slices = self._own_slices() if sketch == "samples" else self.slices
            projections = views * local * everywhere * slices
            waves = 2 * (self.request.knots - 1) if self.request.sketch == "epps_pulley" else 0
            flops += (4 * dimensions + 2 * waves) * projections
        return flops

    def _memory(self, covariance: str, sketch: str) -> int:
        """Bytes at the peak of the forward or the backward pass."""
        r, width, columns = self.request, self.width, self.views * self.dimensions
        shape = self._shape()
        own = columns * self.samples * width
        everything = self.ranks * own
        narrow = self.wire < width
        # To the computing dtype, in one tensor.
        copied = self.ranks > 1 and (narrow or self.views > 1)
        # Of the result besides: the views' slopes, or deviations and a copy, or the result rounded.
        halves = max((2 + narrow) * bool(r.invariance), (2 + 2 * copied) * bool(r.variance), narrow)
        backward = (1 + bool(covariance) + bool(sketch)) * own + halves * own // 2
        gathered = everything * self.wire // width + self.ranks * row_length(shape) * width
        merged = self.ranks * columns * (3 * width + 24)  # means of ranks, in float64
        has_moments = r.variance or r.center or covariance or r.sketch == "wasserstein"
        forward = (1 + bool(has_moments or sketch)) * own
        if has_moments and self.ranks > 1 and is_gathered(self.ranks, shape):
            forward = max(forward, merged)
        if self.ranks == 1:
            # The result, what is kept for it, the slopes of the views and a difference of two.
            halves = 2 + 3 * bool(r.invariance) + 2 * bool(covariance) + 2 * bool(sketch) + narrow
            backward = halves * own // 2
            side = {"gram": self.samples, "feature": self.dimensions}.get(covariance, 0)
            backward += 2 * self.views * side**2 * width
        elif covariance == "gram":
            chunk = max(own, min(everything, CHUNK * width))
            inner = chunk * self.samples // self.dimensions
            forward = max(merged, chunk + inner + 2 * own) + gathered
        elif covariance == "feature":
            half, whole = self.views * block_length(self.dimensions), columns * self.dimensions
            if is_one_message(self.ranks, self.dimensions):
                half += self.ranks * (row_length(shape, squares=False) + columns // 2)
            forward = max(forward, max(2 * half * width + own, (half + whole) * width + 3 * own))
        if sketch:
            forward = max(forward, self._sketch_memory(sketch, own, gathered))
        return max(backward, forward + copied * own)

    def _sketch_memory(self, sketch: str, own: int, gathered: int) -> int:
        width, wasserstein = self.width, self.request.sketch == "wasserstein"
        slices, length = self._own_slices(), self.ranks * self.samples
        if sketch == "sums":
            slices, length = self.slices, self.samples
        elif sketch == "local":
            slices = min(slices, max(16, CHUNK // (self.views * length)))
        rows = slices * self.views
        numbers = rows * length
        if wasserstein:  # a copy, and where each number was
            statistic = numbers * (width + 8)
        else:  # the waves of some rows, and their arguments; all sums and coefficients
            block = max(1, min(rows, CHUNK // 8 // length)) * length
            statistic = self.request.knots * (2 * block + 10 * rows) * width
        projections = numbers * width
        if sketch == "sums":
            return projections + max(statistic, own)
        if sketch == "local":
            return projections + statistic + 2 * own
        if sketch == "slices":
            quantiles = 40 * length
            return own + projections + max(statistic, quantiles, 2 * projections)
        gradients = self.ranks * own * (1 + (self.views > 1))  # as they are sent
        return gathered + self.ranks * own + max(projections + statistic, gradients)


def _human(x: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(x) < 1000:
            return f"{x:.3g} {unit}"
        x /= 1000
    return f"{x:.3g} P"
