"""Where the losses are measured: sweeps along one axis at a time, and shapes of trainings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

AXES = {"views": "views V", "samples": "batch size N", "dimensions": "embedding dimension D",
        "slices": "slices K"}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One loss at one shape.

    Attributes:
        loss: a name of ``contenders.FIELD``.
        views, samples, dimensions: V embeddings of shape (N, D).
        slices: K, or 0 where the loss has none.
    """

    loss: str
    views: int
    samples: int
    dimensions: int
    slices: int = 0

    @property
    def name(self) -> str:
        """Loss and shape, as one word."""
        slices = f"-k{self.slices}" if self.slices else ""
        return f"{self.loss}-v{self.views}-n{self.samples}-d{self.dimensions}{slices}"

    def embeddings(self) -> list[Tensor]:
        """Correlated, off-centre views that agree in part, as leaves that require a gradient."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.samples, self.dimensions)
        common = torch.randn(shape, generator=generator)
        views = []
        for _ in range(self.views):
            z = 0.7 * common + 0.5 * torch.randn(shape, generator=generator)
            views.append((z + 0.3 * z.roll(1, -1) + 0.1).requires_grad_())
        return views

    def directions(self) -> Tensor | None:
        """Unit columns, (D, K), that all contenders are given where their errors are compared."""
        if not self.slices:
            return None
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(self.dimensions, self.slices, generator=generator)
        return w / w.norm(dim=0)


_POWERS = (64, 256, 1024, 4096, 16384, 65536)
_SLICES = (64, 256, 1024, 4096, 8192)
BASES = (
    Point("variance", 1, 256, 256),
    Point("covariance", 1, 256, 256),
    Point("vicreg", 2, 256, 256),
    Point("visreg", 2, 256, 256, 256),
    Point("sigreg", 1, 256, 256, 256),
)
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "variance": {"dimensions": _POWERS, "samples": _POWERS},
    "covariance": {"dimensions": _POWERS, "samples": _POWERS},
    "vicreg": {"dimensions": _POWERS, "samples": _POWERS, "views": (2, 4, 10)},
    "visreg": {
        "dimensions": _POWERS, "samples": _POWERS, "slices": _SLICES, "views": (2, 4, 10),
    },
    "sigreg": {
        "dimensions": _POWERS, "samples": _POWERS, "slices": _SLICES, "views": (1, 2, 4, 10),
    },
}  # fmt: skip
SHAPES = (
    Point("covariance", 1, 64, 64),
    Point("covariance", 1, 256, 8192),
    Point("covariance", 1, 1024, 2048),
    Point("covariance", 1, 4096, 256),
    Point("covariance", 1, 2048, 8192),
    Point("vicreg", 2, 1024, 2048),
    Point("vicreg", 2, 256, 8192),
    Point("visreg", 2, 1024, 256, 1024),
    Point("visreg", 10, 1024, 256, 4096),
    Point("sigreg", 2, 1024, 256, 1024),
    Point("sigreg", 1, 2048, 256, 256),
)
QUICK = (
    *BASES,
    Point("covariance", 1, 64, 64),
    Point("covariance", 1, 256, 1024),
    Point("covariance", 1, 1024, 2048),
    Point("covariance", 1, 4096, 256),
    Point("vicreg", 2, 1024, 2048),
    Point("visreg", 2, 1024, 256, 1024),
    Point("sigreg", 1, 2048, 256, 256),
)


def along(base: Point, axis: str) -> Iterator[Point]:
    """The points of a sweep from its base, in order."""
    for value in SWEEPS[base.loss][axis]:
        yield replace(base, **{axis: value})


def every() -> list[Point]:
    """All points of all sweeps and the shapes of trainings, each once, small ones first."""
    points = {p for base in BASES for axis in SWEEPS[base.loss] for p in along(base, axis)}
    order = [base.loss for base in BASES]
    return sorted(
        points | set(SHAPES),
        key=lambda p: (order.index(p.loss), p.samples * p.dimensions * p.views, p.name),
    )
