"""The same as :mod:`._evaluate` over several ranks: the global batch's value on each of them.

Everything is communicated in the forward pass, where the gradient for the samples of this rank is
finished but for the upstream gradient. The trainer averages or adds gradients over ranks; with W of
them, averaging, it is W times the derivative.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._collectives import Ranks, all_reduce_, meet
from ._deviations import add_slopes, batch, squared_distances
from ._epps_pulley import knot_table
from ._evaluate import SIGMA_EPS, finite_scale, variance, variance_factor
from ._moments import Moments, global_moments
from ._request import Request, batch_shape, computing_dtype
from ._sharded_covariance import Product, add_products, gram_rows
from ._sharded_sketch import (
    Gathered,
    add_harmonics,
    epps_pulley_rows_,
    gather,
    padded_quantiles,
    send_samples,
    send_slices,
    wasserstein_rows_,
    wire_dtype,
)
from ._strategy import covariance_strategy, sketch_strategy
from ._torch import (
    diagonal_dominates,
    energy,
    full_precision,
    may_be_dominated,
    squared_sums,
    wide,
)


def evaluate(
    request: Request, views: Sequence[Tensor], directions: Tensor | None, keep: bool
) -> list[Tensor]:
    """As :func:`._evaluate.evaluate`; the same collectives whether ``keep`` or not."""
    with full_precision(views[0].device):
        z = batch(views)[0]
        count, samples, dimensions = z.shape
        call = {
            **request.but(group="", parts=0, impl="")._asdict(),
            "views": count,
            "dimensions": dimensions,
            "dtype": z.dtype,
        }
        content = z.new_empty(0, 0)
        if directions is not None and not request.own_slices:
            content = directions
        ranks = meet(request.group, z, samples, call, content)
        if samples > ranks.capacity:  # no other rank knows: take part, then say so
            _Call(request, views, z[:, : ranks.capacity] * torch.nan, directions, ranks).run(keep)
            raise RuntimeError(
                f"embeddings: expected at most {ranks.capacity} samples on a rank (the limit, or "
                "the most of any rank at the first such call, be it a validation batch), got "
                f"{samples}. Call distributed.limit_samples with the most there will be, on all "
                "ranks."
            )
        return _Call(request, views, z, directions, ranks).run(keep)


class _Call:
    """One evaluation: the messages, then the values and the residue."""

    def __init__(
        self,
        request: Request,
        views: Sequence[Tensor],
        z: Tensor,
        directions: Tensor | None,
        ranks: Ranks,
    ) -> None:
        self.request, self.z, self.directions, self.ranks = request, z, directions, ranks
        self.views = views
        # Local sums, by name, that are still to be added up over the ranks; and those that are.
        self.pending: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.moments: Moments | None = None
        self.gathered: Gathered | None = None
        self.product: Product | None = None

    def run(self, keep: bool) -> list[Tensor]:
        request, z = self.request, self.z
        samples = z.shape[1]
        if request.invariance:
            squares = squared_distances(self.views, request.invariance) / self._most()
            truncated = samples < self.views[0].shape[-2]  # then z is NaN
            self.pending["invariance"] = z.sum() if truncated else squares
        self._meet_statistics(keep)
        slope = self._sketch(keep) if request.sketch else None
        if self.moments is None and "count" not in self.sums:
            self.pending["count"] = torch.full((), samples, dtype=wide(z), device=z.device)
        if self.pending:
            names = list(self.pending)
            numbers = torch.stack([self.pending[name].to(wide(z)) for name in names])
            self._heard(names, all_reduce_(numbers, self.ranks.group).unbind())
        count = self.moments.total if self.moments is not None else self.sums["count"]
        return self._finish(count, slope, keep)

    def _most(self) -> int:
        """Numbers in the largest global batch there can be: a sum over it is in range as a mean."""
        return self.z.shape[0] * self.z.shape[2] * self.ranks.size * self.ranks.capacity

    def _heard(self, names: Sequence[str], sums: Sequence[Tensor]) -> None:
        self.sums.update(zip(names, sums, strict=True))
        for name in names:
            self.pending.pop(name, None)

    def _meet_statistics(self, keep: bool) -> None:
        """The messages of the samples, of the products or of the moments, whichever serve."""
        request, z, ranks = self.request, self.z, self.ranks
        dimensions = z.shape[2]
        width = wire_dtype(request, z).itemsize
        sides = ranks.size, ranks.capacity, dimensions, width, z.dtype.itemsize
        covariance = covariance_strategy(request.covariance, *sides)
        slices = self.directions.shape[1] if self.directions is not None else 0
        self.exchange = sketch_strategy(request, slices, ranks.size, dimensions, *sides[3:])
        if covariance == "gram" or self.exchange == "samples":
            self.gathered = gather(z, request, ranks)
            self.moments = self.gathered.moments
        if covariance == "feature":
            names = list(self.pending)
            extra = [self.pending[name] for name in names]
            self.moments, self.product, sums = add_products(z, extra, ranks, keep)
            self._heard(names, sums)
        elif covariance == "gram":
            assert self.gathered is not None
            self.product = gram_rows(z, self.gathered, keep)
            self.pending["energy"] = self.product.energy
            # The same bits on all ranks, which decide alike.
            if may_be_dominated(z):
                squares = self.gathered.moments.squares
                self.pending["diagonal"] = energy(squares) / ranks.size
        elif self.moments is None and (
            request.variance or request.center or request.sketch == "wasserstein"
        ):
            self.moments = global_moments(z, ranks)

    def _sketch(self, keep: bool) -> Tensor | None:
        """Gradient of the sum over views and slices, but for the Wasserstein distance's 2 / N."""
        request, z, ranks, w = self.request, self.z, self.ranks, self.directions
        assert w is not None
        if request.sketch == "epps_pulley":
            table = knot_table(request.knots, request.t_max, z)
            if self.exchange != "samples":
                names = list(self.pending)
                extra = [self.pending[name] for name in names]
                total, slope, count, sums = add_harmonics(z, w, table, extra, keep, ranks)
                self._heard(names, sums)
                self.sums.update(count=count, sketch=total)
                return slope
        assert self.moments is not None
        count, length = self.moments.total, ranks.size * ranks.capacity
        sigma = None
        if request.sketch == "wasserstein":
            sigma = (self.moments.squares / count).sqrt_().add_(SIGMA_EPS)
        if self.exchange == "samples":
            assert self.gathered is not None
            there = self.gathered.is_sample().view(-1)
            if not request.own_slices:
                mine = -(-w.shape[1] // ranks.size)
                w = w[:, ranks.rank * mine : (ranks.rank + 1) * mine]
            if sigma is None:
                evaluate = partial(epps_pulley_rows_, table=table, there=there, count=count)
            else:
                targets = padded_quantiles(count, length, request.quantiles, z.dtype)
                evaluate = partial(wasserstein_rows_, there=there, targets=targets)
            total, slope = send_samples(self.gathered, w, ranks, sigma, evaluate, z.shape[1])
        else:
            assert sigma is not None
            x = self.moments.center(z).div_(sigma)
            total, slope = send_slices(x, w, request.quantiles, count, ranks)
        if sigma is not None:
            total = total + sigma.sum() * 0  # NaN where sigma overflowed and so hid the samples
            slope /= sigma
        self.pending["sketch"] = total
        return slope

    def _finish(self, count: Tensor, slope: Tensor | None, keep: bool) -> list[Tensor]:
        request, z, moments = self.request, self.z, self.moments
        views, _, dimensions = z.shape
        share = self.ranks.size if request.averages else 1
        values: list[Tensor] = []
        residue: list[Any] = []

        def scaled(x: Tensor, factor: Any) -> Tensor:
            return x * torch.as_tensor(share * factor, dtype=z.dtype, device=z.device)

        if request.invariance:
            factor = request.factor / (views * dimensions * count)
            values.append(self.sums["invariance"] * (factor * self._most()))
            residue.append((share * factor).to(z.dtype))
        if request.variance:
            assert moments is not None
            value, column = variance(request, moments.squares, count)
            values.append(value)
            column = scaled(column, variance_factor(request, count, views * dimensions))
            residue += moments.origin, moments.shift, column
        if request.center:
            assert moments is not None
            mean = moments.mean()
            values.append(mean.square().mean())
            residue.append(scaled(mean, 2 / (views * dimensions * count)))
        if request.covariance:
            total, gradient = self._covariance(keep)
            factor = 1 / (views * dimensions * (count - 1).square())
            values.append(total * factor)
            residue.append(scaled(gradient, 4 * factor) if gradient is not None else None)
        if request.sketch:
            slices = self.directions.shape[1] if self.directions is not None else 0
            slices *= self.ranks.size if request.own_slices else 1
            each = count if request.sketch == "wasserstein" else torch.ones_like(count)
            values.append(self.sums["sketch"] / (views * slices * each))
            if slope is not None:
                both = 2 if request.sketch == "wasserstein" else 1
                slope = scaled(slope, both / (views * slices * each))
            residue.append(slope)
        # A copy: no output may share its memory with another one.
        finished = [value.to(z.dtype, copy=True) for value in values]
        return finished + [x.contiguous() for x in residue] if keep else finished

    def _covariance(self, keep: bool) -> Product:
        """Sum of squares of the off-diagonal elements, and a quarter of its gradient."""
        assert self.moments is not None
        assert self.product is not None
        if self.gathered is None or "energy" not in self.sums:
            return self.product
        z, squares, total = self.z, self.moments.squares, self.sums["energy"]
        gradient = self.product.gradient
        diagonal = self.sums["diagonal"] if "diagonal" in self.sums else energy(squares)
        if diagonal_dominates(z, diagonal, total):
            product = gram_rows(z, self.gathered, keep, wider=True)
            total, gradient = all_reduce_(product.energy, self.ranks.group), product.gradient
            squares = squared_sums(self.gathered.centered(0, self.ranks.size).double())
            diagonal = energy(squares)
        if gradient is not None:
            x = self.moments.center(z).to(gradient.dtype)
            gradient = gradient.addcmul_(x, squares, value=-1).to(z.dtype)
        return Product((total - diagonal).clamp_(min=0), gradient)


def residue(request: Request, views: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`._evaluate.residue`.

    The invariance's factor (); of the variance origin, shift and column (V, 1, D); the centre's row
    (V, 1, D); the covariance's gradient (V, N, D), and the sketch's.
    """
    shape = batch_shape(views)
    row = (shape[0], 1, shape[2])
    sizes: list[tuple[int, ...]] = []
    if request.invariance:
        sizes.append(())
    if request.variance:
        sizes += row, row, row
    if request.center:
        sizes.append(row)
    sizes += [shape] * (bool(request.covariance) + bool(request.sketch))
    like = views[0].new_empty((), dtype=computing_dtype(views))
    return [like.new_empty(size) for size in sizes]


def gradient(
    request: Request,
    shape: tuple[int, int, int],
    values: Sequence[Tensor],
    residue: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    views: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`._evaluate.gradient`; nothing is communicated."""
    with full_precision(values[0].device):
        total: Tensor | None = None
        terms = zip(upstream, values, strict=True)
        rest = iter(residue)

        def scale() -> Tensor | None:
            up, value = next(terms)
            return None if up is None else finite_scale(up, value)

        def plus(x: Tensor, factor: Tensor) -> Tensor:
            return x.expand(shape) * factor if total is None else total.addcmul_(x, factor)

        if request.invariance:
            factor, by = next(rest), scale()
            if by is not None:
                total = add_slopes(None, views, request.invariance, by * factor)
        if request.variance:
            origin, shift, column = next(rest), next(rest), next(rest)
            by = scale()
            if by is not None:
                total = plus((batch(views)[0] - origin).sub_(shift), column * by)
        for asked in (request.center, request.covariance, request.sketch):
            if asked:
                piece, by = next(rest), scale()
                if by is not None:
                    total = plus(piece, by)
        if total is None:
            return values[0].new_zeros(shape, dtype=dtype)
        return total.to(dtype)
