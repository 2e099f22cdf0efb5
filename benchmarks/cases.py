"""What is measured: pairs of a published formula and ours, at one shape."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vicreg_losses as vl
from benchmarks import published

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        loss: which loss.
        views, samples, dimensions: shape of the embeddings (V, N, D).
        slices: K, or 0 where there are none.
        published: makes the published formula.
        ours: makes ours.
        flops: of ours, forward and backward, in matrix products (2 per multiply-add).
        quick: whether the short table shows it.
    """

    loss: str
    views: int
    samples: int
    dimensions: int
    slices: int
    published: Callable[[], Loss]
    ours: Callable[[], Loss]
    flops: float
    quick: bool

    @property
    def name(self) -> str:
        """Loss and shape, as one word."""
        slices = f"-k{self.slices}" if self.slices else ""
        return f"{self.loss}-v{self.views}-n{self.samples}-d{self.dimensions}{slices}"

    def embeddings(self) -> Tensor:
        """Correlated, off-centre embeddings that require a gradient."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.views, self.samples, self.dimensions)
        z = torch.randn(shape, generator=generator)
        z = 0.8 * z + 0.3 * z.roll(1, -1) + 0.1
        return z.requires_grad_()


def _covariance(samples: int, dimensions: int, quick: bool) -> Case:
    flops = 3.0 * samples * dimensions * min(samples, dimensions)
    return Case(
        "covariance", 1, samples, dimensions, 0,
        lambda: published.covariance, vl.CovarianceLoss, flops, quick,
    )  # fmt: skip


def _variance(samples: int, dimensions: int, quick: bool) -> Case:
    return Case(
        "variance", 1, samples, dimensions, 0,
        lambda: published.variance, vl.VarianceLoss, 0.0, quick,
    )  # fmt: skip


def _vicreg(samples: int, dimensions: int, quick: bool) -> Case:
    flops = 2 * 3.0 * samples * dimensions * min(samples, dimensions)
    return Case(
        "vicreg", 2, samples, dimensions, 0,
        lambda: published.vicreg, vl.VICRegLoss, flops, quick,
    )  # fmt: skip


def _visreg(views: int, samples: int, dimensions: int, slices: int, quick: bool) -> Case:
    def ours() -> Loss:
        loss = vl.VISRegLoss(num_slices=slices)

        def regularizers(z: Tensor) -> Tensor:
            terms = loss.terms(z)
            return terms.scale + terms.shape + terms.center

        return regularizers

    flops = 4.0 * views * samples * dimensions * slices
    return Case(
        "visreg", views, samples, dimensions, slices,
        lambda: lambda z: published.visreg_terms(z, slices), ours, flops, quick,
    )  # fmt: skip


def _sigreg(views: int, samples: int, dimensions: int, slices: int, quick: bool) -> Case:
    flops = 4.0 * views * samples * dimensions * slices
    return Case(
        "sigreg", views, samples, dimensions, slices,
        lambda: lambda z: published.sigreg(z, slices),
        lambda: vl.SlicedSketchLoss(slices, "epps_pulley"), flops, quick,
    )  # fmt: skip


_GRID = (64, 256, 1024, 2048, 8192)
_QUICK_COVARIANCE = {(64, 64), (4096, 256), (1024, 2048), (256, 8192), (2048, 8192)}
_COVARIANCE = sorted({(n, d) for n in _GRID for d in _GRID} | {(4096, 256)})

CASES: tuple[Case, ...] = (
    *(_covariance(n, d, (n, d) in _QUICK_COVARIANCE) for n, d in _COVARIANCE),
    *(_variance(n, d, n == 1024) for n, d in ((64, 64), (1024, 2048), (4096, 256))),
    *(_vicreg(n, d, n == 1024) for n, d in ((64, 64), (256, 8192), (1024, 2048))),
    _visreg(2, 64, 64, 64, True),
    _visreg(1, 512, 256, 512, True),
    _visreg(2, 1024, 256, 1024, True),
    _visreg(1, 4096, 256, 1024, True),
    _visreg(10, 1024, 256, 4096, False),
    _visreg(1, 512, 64, 512, False),
    _visreg(1, 2048, 2048, 1024, False),
    _sigreg(2, 64, 64, 64, True),
    _sigreg(1, 2048, 256, 256, True),
    _sigreg(2, 1024, 256, 1024, True),
    _sigreg(1, 4096, 256, 512, False),
)
