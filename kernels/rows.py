"""Some slices of the projections, one program a row: what the kernels of both statistics take."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Rows, and where goes what is made of them.

    Attributes:
        projections: (k, V, padded N), float32: those of the embeddings times
            ``1 / (scales[v, 0] unscale)``.
        samples: N.
        scales: (V, 4), float64.
        unscale: see above.
        residual: out, (parts, padded K, V, padded N), float16; ``None`` if not needed.
        residual_scale: a factor of it.
        sums: out, one number for each row, (V, K), float32.
        first: the first of the slices.
        parts: 16-bit numbers for each element of the residual.
    """

    projections: Tensor
    samples: int
    scales: Tensor
    unscale: float
    residual: Tensor | None
    residual_scale: float
    sums: Tensor
    first: int
    parts: int

    @property
    def grid(self) -> tuple[int, int]:
        """One program for each row."""
        return self.projections.shape[0], self.projections.shape[1]

    @property
    def numbers(self) -> tuple[int, ...]:
        """N, strides of slices, views and parts, the first slice and K."""
        p, part = self.projections, 0 if self.residual is None else self.residual.stride(0)
        return self.samples, p.stride(0), p.stride(1), part, self.first, self.sums.shape[1]
