"""Random worlds of ranks: sizes, samples, and one loss with its options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import torch
from hypothesis import strategies as st
from oracles import Term, term, unit_directions
from torch import Tensor

from vicreg_losses import LeJEPALoss, VICRegLoss, VISRegLoss, functional


def vicreg(z: Any, **options: Any) -> Tensor:
    return VICRegLoss(**options)(z)


def visreg(z: Any, directions: Tensor, **options: Any) -> Tensor:
    return VISRegLoss(**options)(z, directions=directions)


def lejepa(z: Any, directions: Tensor, **options: Any) -> Tensor:
    return LeJEPALoss(**options)(z, directions=directions)


COMPOSITES = {"vicreg": vicreg, "visreg": visreg, "lejepa": lejepa}
TERMS = {
    one.name: one
    for one in (
        *oracles.ALL_TERMS,
        term("vicreg", "vicreg", oracles.vicreg, min_views=2),
        term("visreg", "visreg", oracles.visreg, sketch=True),
        term("visreg-1global", "visreg", oracles.visreg, num_global=1, sketch=True),
        term("lejepa", "lejepa", oracles.lejepa, sketch=True),
    )
}
# The two with the most branches of their own, more often.
NAMES = [*TERMS, *("covariance-gram", "covariance-feature") * 3]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """One call of one loss over ranks.

    Attributes:
        name: of the term.
        sizes: samples of each rank.
        views: V.
        dimensions: D.
        slices: K.
        seed: of the numbers.
        offset: of all samples.
        apart: standard deviation of the ranks' own offsets.
        spreads: standard deviations of the ranks' samples.
        dtype: of the samples.
        reduction: the convention of the trainer.
        exchange: of a sketch.
        own_slices: whether each rank has its own directions.
        listed: whether the views are a list of tensors, not one tensor.
        spare: padding beyond the largest rank; ``None`` without a limit.
        in_parts: whether messages and products are held to be too large for one.
        frozen: a rank that wants no gradient, where there is one of this number.
    """

    name: str
    sizes: tuple[int, ...]
    views: int
    dimensions: int
    slices: int
    seed: int
    offset: float
    apart: float
    spreads: tuple[float, ...]
    dtype: str
    reduction: str
    exchange: str
    own_slices: bool
    listed: bool
    spare: int | None
    in_parts: bool
    frozen: int

    @property
    def term(self) -> Term:
        return TERMS[self.name]

    def options(self) -> dict[str, Any]:
        options = {**self.term.options, "reduction": self.reduction}
        if self.term.function == "sliced_sketch_loss":
            options["slices"] = "per_rank" if self.own_slices else "shared"
            options["exchange"] = "auto" if self.own_slices else self.exchange
        return options

    def directions(self) -> list[Tensor]:
        """Of each rank."""
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        own = self._owns_slices()
        return [
            unit_directions(self.dimensions, self.slices, rank * own).to(dtype)
            for rank in range(len(self.sizes))
        ]

    def function(self) -> Callable[..., Tensor]:
        """Of the library."""
        name = self.term.function
        function: Callable[..., Tensor] = COMPOSITES.get(name) or getattr(functional, name)
        return function

    def formula(self) -> Callable[[Tensor], Tensor]:
        """Of the samples of all ranks, along the directions of all."""
        options, w = self.term.formula_options, self.directions()
        if not self.term.sketch:
            return lambda z: self.term.formula(z, **options)
        every = torch.cat(w, 1) if self._owns_slices() else w[0]
        return lambda z: self.term.formula(z, every, **options)

    def _owns_slices(self) -> bool:
        return self.own_slices and self.term.function == "sliced_sketch_loss"

    def samples(self) -> list[Tensor]:
        """Of each rank, (V, N, D)."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        sign = torch.where(torch.arange(self.dimensions) % 3 == 0, -1.0, 1.0)
        return [
            (
                self.offset * sign
                + self.apart * normal(self.dimensions)
                + spread * normal(self.views, size, self.dimensions)
            ).to(DTYPES[self.dtype])
            for size, spread in zip(self.sizes, self.spreads, strict=False)
        ]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    name = draw(st.sampled_from(NAMES))
    size = draw(st.integers(2, 5))
    most = draw(st.sampled_from([1, 2, 9, 9, 9]))
    one = st.sampled_from([0, *range(most + 1)])
    sizes = draw(st.lists(one, min_size=size, max_size=size).filter(lambda n: sum(n) > 1))
    dtype = draw(st.sampled_from(["float64"] * 4 + ["float32"] * 2 + ["bfloat16"]))
    exact = dtype != "bfloat16"  # an offset would leave little of the rest
    return World(
        name=name,
        sizes=tuple(sizes),
        views=draw(st.integers(TERMS[name].min_views, 3)),
        dimensions=draw(st.sampled_from([1, 3, 6, 33, 66, 100, 160, 160])),
        slices=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**31)),
        offset=draw(st.sampled_from([0.0, -3.0, 1e3, 1e3])) * exact,
        apart=draw(st.sampled_from([0.0, 0.3, 5.0, 1e3] if exact else [0.0, 0.3])),
        spreads=tuple(draw(st.sampled_from([0.05, 0.3, 1.0, 10.0])) for _ in sizes),
        dtype=dtype,
        reduction=draw(st.sampled_from(["mean", "sum"])),
        exchange=draw(st.sampled_from(["auto", "slices", "samples"])),
        own_slices=draw(st.integers(0, 3)) == 0,
        listed=draw(st.booleans()),
        spare=draw(st.sampled_from([None, None, 0, 3])),
        in_parts=draw(st.booleans()),
        frozen=draw(st.integers(0, 9)),
    )
