"""Batches spread over ranks, and every loss with the formula of the concatenated batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import oracles
import torch
from oracles import Loss, Term, error, truth, unit_directions
from torch import Tensor

from vicreg_losses import LeJEPALoss, SlicedSketchLoss, VICRegLoss, VISRegLoss, functional

# As for one process: float64 evaluation orders differ by 1e4 summands of 1e-16 at most, and what
# vanishes in exact arithmetic is compared with this.
FLOAT64, VANISHING = 1e-10, 1e-3


class Batch(NamedTuple):
    """Samples of several ranks.

    Attributes:
        sizes: samples of each rank.
        dimensions: D.
        slices: K.
        views: V.
        seed: of the numbers.
    """

    sizes: tuple[int, ...]
    dimensions: int = 6
    slices: int = 13
    views: int = 2
    seed: int = 0

    def __str__(self) -> str:
        sizes = "-".join(map(str, self.sizes))
        return f"n{sizes}-d{self.dimensions}-k{self.slices}-v{self.views}"

    def part(self, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Samples of one rank, of another mean and spread than any other's: (V, N, D)."""
        z = oracles.embeddings(
            self.views, self.sizes[rank], self.dimensions, seed=17 * rank + self.seed
        )
        return (0.4 * (1 + 0.3 * rank) * z + 0.3 * rank).to(dtype)

    def whole(self) -> Tensor:
        """Samples of all ranks."""
        return torch.cat([self.part(rank) for rank in range(len(self.sizes))], 1)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Rows of each rank, (V, N_r, D)."""
        return x.split(self.sizes, 1)


def cases(batch: Batch, rank: int = 0, **common: Any) -> dict[str, tuple[Loss, Loss]]:
    """By name: a loss as one rank calls it, and the formula.

    Args:
        batch: of all ranks.
        rank: which one calls.
        common: options for the losses.
    """
    k = batch.slices
    found = {t.name: (t.library(functional, k, **common), t.oracle(k)) for t in oracles.ALL_TERMS}
    for term in (t for t in oracles.ALL_TERMS if t.sketch):
        for exchange in ("slices", "samples"):
            ours = term.library(functional, k, exchange=exchange, **common)
            found[f"{term.name}-{exchange}"] = ours, term.oracle(k)
        found[f"{term.name}-per_rank"] = _per_rank(term, batch, rank, common)
    return {**found, **_composites(batch, common), **_drawn(batch, common)}


def wrong(batch: Batch, heard: list[dict[str, Any]], share: int) -> dict[str, Any]:
    """Names of the losses that differ from the formula by more than rounding, with the errors."""
    found = {}
    for name, (_, formula) in cases(batch).items():
        value, gradient = truth(formula, batch.whole())
        values = [answer[name][0] for answer in heard]
        together = torch.cat([answer[name][1] for answer in heard], 1)
        errors = (
            error(values[0], value, VANISHING),
            error(together, share * gradient, VANISHING),
        )
        # Bitwise: trainers compare the losses of ranks, and branch on them.
        if max(errors) > FLOAT64 or not all(torch.equal(v, values[0]) for v in values):
            found[name] = errors, values
    return found


def _per_rank(term: Term, batch: Batch, rank: int, common: dict[str, Any]) -> tuple[Loss, Loss]:
    d, k = batch.dimensions, batch.slices
    own = [unit_directions(d, k, seed=r) for r in range(len(batch.sizes))]
    options = {**term.options, "slices": "per_rank", "directions": own[rank], **common}
    return (
        lambda z: functional.sliced_sketch_loss(z, **options),
        lambda z: term.formula(z, torch.cat(own, 1), **term.formula_options),
    )


def _composites(batch: Batch, common: dict[str, Any]) -> dict[str, tuple[Loss, Loss]]:
    w = unit_directions(batch.dimensions, batch.slices)
    weights, parts = (20.0, 30.0, 2.0), (2.0, 0.5, 3.0)
    vicreg = VICRegLoss(*weights, gamma=0.9, **common)
    visreg = VISRegLoss(0.6, 7, *parts, num_global=1, **common)
    lejepa = LeJEPALoss(weight=0.3, **common)

    def term_of(loss: Any, name: str, **options: Any) -> Loss:
        return lambda z: getattr(loss.terms(z, **options), name)

    return {
        "vicreg": (vicreg, lambda z: oracles.vicreg(z, weights, gamma=0.9)),
        "vicreg.invariance": (term_of(vicreg, "invariance"), oracles.invariance),
        "vicreg.variance": (
            term_of(vicreg, "variance"),
            lambda z: oracles.variance(z, gamma=0.9),
        ),
        "vicreg.covariance": (
            term_of(vicreg, "covariance"),
            lambda z: len(z) * oracles.covariance(z),
        ),
        "visreg": (
            lambda z: visreg(z, directions=w),
            lambda z: oracles.visreg(z, w, 0.6, parts, 1),
        ),
        "visreg.invariance": (
            term_of(visreg, "invariance", directions=w),
            lambda z: oracles.invariance(z, "center", 1),
        ),
        "visreg.scale": (
            term_of(visreg, "scale", directions=w),
            lambda z: oracles.variance(z, form="squared"),
        ),
        "visreg.shape": (
            term_of(visreg, "shape", directions=w),
            lambda z: oracles.sliced_wasserstein(z, w),
        ),
        "visreg.center": (term_of(visreg, "center", directions=w), oracles.center),
        "lejepa": (lambda z: lejepa(z, directions=w), lambda z: oracles.lejepa(z, w, 0.3)),
        "lejepa.invariance": (
            term_of(lejepa, "invariance", directions=w),
            lambda z: oracles.invariance(z, "center"),
        ),
        "lejepa.sketch": (
            term_of(lejepa, "sketch", directions=w),
            lambda z: oracles.epps_pulley(z, w),
        ),
    }


def _drawn(batch: Batch, common: dict[str, Any]) -> dict[str, tuple[Loss, Loss]]:
    """Slices that the losses draw: the first of their sequence, the same as on one process."""
    k, ranks = batch.slices, range(len(batch.sizes))
    options: dict[str, Any] = {"num_slices": k, "seed": 3}
    own = {**options, "slices": "per_rank"}

    def drawn(z: Tensor, rank: int = 0) -> Tensor:
        return SlicedSketchLoss(**own).next_directions(z, rank)

    def everybodys(formula: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        return lambda z: formula(z, torch.cat([drawn(z, rank) for rank in ranks], 1))

    return {
        "visreg-drawn": (
            lambda z: VISRegLoss(**options, **common)(z),
            lambda z: oracles.visreg(z, drawn(z)),
        ),
        "lejepa-drawn": (
            lambda z: LeJEPALoss(**options, **common)(z),
            lambda z: oracles.lejepa(z, drawn(z)),
        ),
        "wasserstein-drawn-per_rank": (
            lambda z: SlicedSketchLoss(**own, **common)(z),
            everybodys(oracles.sliced_wasserstein),
        ),
        "generator_seed-per_rank": (
            lambda z: functional.sliced_sketch_loss(
                z, num_slices=k, generator_seed=3, slices="per_rank", **common
            ),
            everybodys(oracles.sliced_wasserstein),
        ),
        "epps_pulley-drawn-per_rank": (
            lambda z: SlicedSketchLoss(**own, statistic="epps_pulley", **common)(z),
            everybodys(oracles.epps_pulley),
        ),
    }
