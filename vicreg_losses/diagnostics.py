"""Is my loss healthy? Measures of collapse, of one batch of embeddings on one process.

Nothing here is differentiable, and results come back to the host.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EmbeddingReport", "effective_rank", "embedding_report"]

_DEAD_STD = 1e-3
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def effective_rank(z: Tensor, *, center: bool = False) -> float:
    """RankMe: the exponential of the entropy of the singular values.

    ``exp(-sum_k p_k log p_k)`` with ``p_k = s_k / sum(s)``, s the singular values of the (N, D)
    embeddings. Garrido, Balestriero, Najman and LeCun (2023, arXiv:2210.02885), without the 1e-7
    that the paper adds to each ``p_k`` (it reads as rank where there is none). Computed in float64;
    singular values below 1e-7 of the largest count as zero.

    Args:
        z: embeddings, (N, D), or (V, N, D), whose views are pooled.
        center: whether to subtract the mean first (the paper does not).

    Returns:
        float: from 1 to min(N, D); 0 for all zeros, nan if any element is not finite.

    Raises:
        TypeError, ValueError: for anything but embeddings of at least two samples.
    """
    x = _pooled(z)
    if not bool(x.isfinite().all()):
        return float("nan")
    if center:
        x = x - x.mean(0)
    product = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    scale = product.diagonal().max()
    if scale == 0:
        return 0.0
    powers = torch.linalg.eigvalsh(product / scale)
    powers = powers.masked_fill(powers < 1e-14 * powers[-1], 0)
    singular = powers.sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


@dataclass(frozen=True, eq=False)
class EmbeddingReport:
    """What :func:`embedding_report` found. ``print`` it, or ``plot`` it.

    Attributes:
        samples: N, over all views.
        dimensions: D.
        std: standard deviation (N - 1) of each dimension, (D,), float64, on the CPU.
        std_quantiles: (probability, standard deviation) pairs over dimensions.
        dead_dimensions: dimensions with a standard deviation below 1e-3 of the largest, or of 1
            where that is larger.
        mean_abs_correlation: mean of ``|r_jk|`` over pairs of living dimensions; nan below two.
        effective_rank: RankMe of the batch.
        unit_norm: whether all rows have length 1.
        problems: what is wrong, in words; empty if nothing is.
    """

    samples: int
    dimensions: int
    std: Tensor
    std_quantiles: tuple[tuple[float, float], ...]
    dead_dimensions: int
    mean_abs_correlation: float
    effective_rank: float
    unit_norm: bool
    problems: tuple[str, ...]

    @property
    def std_min(self) -> float:
        """Smallest standard deviation of a dimension."""
        return self.std_quantiles[0][1]

    @property
    def std_median(self) -> float:
        """Median standard deviation over dimensions."""
        return dict(self.std_quantiles)[0.5]

    def __str__(self) -> str:
        quantiles = "  ".join(f"{100 * p:.0f}%: {q:.3g}" for p, q in self.std_quantiles)
        limit = min(self.samples, self.dimensions)
        lines = [
            f"embeddings        {self.samples} samples x {self.dimensions} dimensions",
            f"std by dimension  {quantiles}",
            f"dead dimensions   {self.dead_dimensions} of {self.dimensions}",
            f"mean |corr|       {self.mean_abs_correlation:.3g}",
            f"effective rank    {self.effective_rank:.1f} of at most {limit}",
            f"unit-norm rows    {'yes' if self.unit_norm else 'no'}",
        ]
        verdict = [f"problem           {problem}" for problem in self.problems]
        return "\n".join(lines + (verdict or ["verdict           nothing wrong found"]))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the sorted standard deviations; needs matplotlib.

        Args:
            ax: where to draw; ``None`` makes a figure.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        axes: Any = plt.figure().add_subplot() if ax is None else ax
        axes.plot(self.std.sort(descending=True).values.numpy())
        axes.axhline(1, linestyle="--", linewidth=1, color="gray")
        axes.set_xlabel("dimension, sorted")
        axes.set_ylabel("standard deviation")
        axes.set_title(f"effective rank {self.effective_rank:.1f} of {self.dimensions}")
        return axes


@torch.no_grad()
def embedding_report(z: Tensor) -> EmbeddingReport:
    """Look for collapse in a batch of embeddings.

    Args:
        z: embeddings, (N, D), or (V, N, D), whose views are pooled; a floating dtype, any device.

    Returns:
        EmbeddingReport: numbers, and in words what is wrong.

    Raises:
        TypeError, ValueError: for anything but embeddings of at least two samples.
    """
    x = _pooled(z)
    samples, dimensions = x.shape
    std = x.std(0)
    probabilities = torch.tensor(_QUANTILES, dtype=x.dtype, device=x.device)
    quantiles = tuple(zip(_QUANTILES, std.quantile(probabilities).tolist(), strict=True))
    alive = std > _DEAD_STD * std.max().clamp(min=1)
    lengths = torch.linalg.vector_norm(x, dim=1)
    report = EmbeddingReport(
        samples=samples,
        dimensions=dimensions,
        std=std.cpu(),
        std_quantiles=quantiles,
        dead_dimensions=int((std <= _DEAD_STD * std.max().clamp(min=1)).sum()),
        mean_abs_correlation=_mean_abs_correlation(x[:, alive], std[alive]),
        effective_rank=effective_rank(z),
        unit_norm=bool(((lengths - 1).abs() < 1e-2).all()),
        problems=(),
    )
    problems = tuple(_problems(report, finite=bool(x.isfinite().all())))
    return EmbeddingReport(**{**vars(report), "problems": problems})


def _pooled(z: Tensor) -> Tensor:
    _checks.embedding_tensor(z)
    _checks.embeddings(z)
    x = z.detach().flatten(0, -2)
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _mean_abs_correlation(x: Tensor, std: Tensor) -> float:
    samples, dimensions = x.shape
    if dimensions < 2:
        return float("nan")
    standard = ((x - x.mean(0)) / std).float()
    correlation = (standard.T @ standard).div_(samples - 1).fill_diagonal_(0)
    return float(correlation.abs().sum(dtype=torch.float64)) / (dimensions * (dimensions - 1))


def _problems(report: EmbeddingReport, finite: bool) -> list[str]:
    if not finite:
        return ["some elements are NaN or infinite: every statistic of the batch is lost"]
    found = []
    largest = report.std_quantiles[-1][1]
    if largest < 1e-2:
        found.append(
            f"collapse: no dimension has a standard deviation above {largest:.2g}; VICReg's hinge "
            "has little gradient below 0.01"
        )
    elif report.dead_dimensions:
        found.append(f"{report.dead_dimensions} of {report.dimensions} dimensions do not vary")
    if report.unit_norm:
        found.append(
            "rows have length 1, which caps the standard deviation at D^-1/2: regularize the "
            "embeddings before they are normalized"
        )
    if report.effective_rank < 0.1 * min(report.samples, report.dimensions):
        found.append(
            f"dimensional collapse: an effective rank of {report.effective_rank:.1f} for "
            f"{report.samples} samples of {report.dimensions} dimensions"
        )
    # Independent dimensions show (2 / (pi N))^1/2 by chance.
    chance = (2 / (torch.pi * report.samples)) ** 0.5
    if report.mean_abs_correlation > 0.25 + chance:
        found.append(
            f"dimensions repeat each other: mean |correlation| {report.mean_abs_correlation:.2f}"
        )
    return found
