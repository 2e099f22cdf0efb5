"""Measures of collapse of one batch of embeddings, and what they say in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Reasons and sources: docs/diagnostics.md.
DEAD_STD = 1e-3
COLLAPSED_STD = 1e-2
LOW_RANK = 0.1
HIGH_CORRELATION = 0.25
UNIT_NORM = 1e-2

# Singular values below this share of the largest are the rounding of float64 in a Gram matrix.
_NO_RANK = 1e-7
_QUANTILES = {
    "std_min": 0.0,
    "std_p5": 0.05,
    "std_p25": 0.25,
    "std_median": 0.5,
    "std_p75": 0.75,
    "std_p95": 0.95,
    "std_max": 1.0,
}


@torch.no_grad()
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
    return _rank(_singular_values(x - x.mean(0) if center else x))


@dataclass(frozen=True, eq=False)
class EmbeddingReport:
    """What :func:`embedding_report` found. ``print`` it, ``plot`` it, or log ``as_dict()``.

    Attributes:
        samples: N, over all views.
        dimensions: D.
        std: standard deviation (N - 1) of each dimension, (D,), float64, on the CPU.
        std_quantiles: (probability, standard deviation) pairs over dimensions.
        dead_dimensions: dimensions with a standard deviation below 1e-3 of the largest, or of 1
            where that is larger.
        mean_abs_correlation: mean of ``|r_jk|`` over pairs of living dimensions; nan below two.
        effective_rank: RankMe of the batch.
        singular_values: of the embeddings, largest first, (min(N, D),), float64, on the CPU.
        unit_norm: whether all rows have length 1.
        problems: what is wrong, in words; empty if nothing is.
        problem_kinds: the kind of each problem, in the same order: "non-finite", "collapse",
            "dead dimensions", "unit norm", "low rank" or "correlation".
    """

    samples: int
    dimensions: int
    std: Tensor
    std_quantiles: tuple[tuple[float, float], ...]
    dead_dimensions: int
    mean_abs_correlation: float
    effective_rank: float
    singular_values: Tensor
    unit_norm: bool
    problems: tuple[str, ...]
    problem_kinds: tuple[str, ...]

    @property
    def std_min(self) -> float:
        """Smallest standard deviation of a dimension."""
        return self.std_quantiles[0][1]

    @property
    def std_median(self) -> float:
        """Median standard deviation over dimensions."""
        return dict(self.std_quantiles)[0.5]

    @property
    def largest_rank(self) -> int:
        """What ``effective_rank`` can be at most: min(N, D)."""
        return min(self.samples, self.dimensions)

    def as_dict(self) -> dict[str, float]:
        """The scalars, for a logger.

        Returns:
            dict: ``effective_rank``, ``std_min``, ``std_p5``, ``std_p25``, ``std_median``,
            ``std_p75``, ``std_p95``, ``std_max``, ``dead_dimensions``, ``mean_abs_correlation``,
            ``unit_norm`` (1 or 0), ``problems`` (how many) and ``samples``; all are floats.
        """
        quantiles = (std for _, std in self.std_quantiles)
        return {
            "effective_rank": self.effective_rank,
            **dict(zip(_QUANTILES, quantiles, strict=True)),
            "dead_dimensions": float(self.dead_dimensions),
            "mean_abs_correlation": self.mean_abs_correlation,
            "unit_norm": float(self.unit_norm),
            "problems": float(len(self.problems)),
            "samples": float(self.samples),
        }

    def __str__(self) -> str:
        quantiles = "  ".join(f"{100 * p:.0f}%: {q:.3g}" for p, q in self.std_quantiles)
        lines = [
            f"embeddings        {self.samples} samples x {self.dimensions} dimensions",
            f"std by dimension  {quantiles}",
            f"dead dimensions   {self.dead_dimensions} of {self.dimensions}",
            f"mean |corr|       {self.mean_abs_correlation:.3g}",
            f"effective rank    {self.effective_rank:.1f} of at most {self.largest_rank}",
            f"unit-norm rows    {'yes' if self.unit_norm else 'no'}",
        ]
        verdict = [f"problem           {problem}" for problem in self.problems]
        return "\n".join(lines + (verdict or ["verdict           nothing wrong found"]))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the standard deviations and, beside them, the singular values; needs matplotlib.

        Args:
            ax: where to draw the standard deviations alone; ``None`` makes a figure with both.

        Returns:
            The axes of the standard deviations; ``.figure`` is what to save, log or close.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            figure, (ax, beside) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
            verdict = ", ".join(self.problem_kinds) or "nothing wrong found"
            figure.suptitle(f"{self.samples} samples x {self.dimensions} dimensions: {verdict}")
            self._plot_spectrum(beside)
        self._plot_std(ax)
        return ax

    def _plot_std(self, axes: "Axes") -> None:
        std = self.std.sort(descending=True).values.numpy()
        places = torch.arange(1, self.dimensions + 1).numpy()
        axes.fill_between(places, std, alpha=0.2, linewidth=0)
        axes.plot(places, std, linewidth=2)
        axes.axhline(1, linestyle="--", linewidth=1, color="gray", label="1, the losses' target")
        axes.set(xlabel="dimension, sorted", ylabel="standard deviation", ylim=(0, None))
        axes.set_title(f"std: median {self.std_median:.2g}, {self.dead_dimensions} dead")
        _finish(axes)

    def _plot_spectrum(self, axes: "Axes") -> None:
        values = self.singular_values
        share = (values / values[0].clamp(min=1e-300)).nan_to_num(0).clamp(min=_NO_RANK).numpy()
        places = torch.arange(1, len(share) + 1).numpy()
        rank = f"effective rank {self.effective_rank:.1f}"
        axes.plot(places, share, linewidth=2)
        axes.axvline(self.effective_rank, linestyle="--", linewidth=1, color="gray", label=rank)
        axes.set(xlabel="singular value, sorted", ylabel="share of the largest", yscale="log")
        axes.set_title(f"{rank} of at most {self.largest_rank}")
        _finish(axes)


def _finish(axes: "Axes") -> None:
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def embedding_report(z: Tensor) -> EmbeddingReport:
    """Look for collapse in a batch of embeddings.

    Args:
        z: embeddings, (N, D), or (V, N, D), whose views are pooled; a floating dtype, any device.

    Returns:
        EmbeddingReport: numbers, and in words what is wrong.

    Raises:
        TypeError, ValueError: for anything but embeddings of at least two samples.
    """
    return report_of(_pooled(z))


@torch.no_grad()
def report_of(x: Tensor, most_correlated: int | None = None) -> EmbeddingReport:
    """The report of (N, D) in float64; the correlation of so many dimensions at most."""
    std = x.std(0)
    singular_values = _singular_values(x)
    probabilities = std.new_tensor(list(_QUANTILES.values()))
    dead = std <= DEAD_STD * std.max().clamp(min=1)
    lengths = torch.linalg.vector_norm(x, dim=1)
    report = EmbeddingReport(
        samples=x.shape[0],
        dimensions=x.shape[1],
        std=std.cpu(),
        std_quantiles=tuple(
            zip(_QUANTILES.values(), std.quantile(probabilities).tolist(), strict=True)
        ),
        dead_dimensions=int(dead.sum()),
        mean_abs_correlation=_mean_abs_correlation(x, std, ~dead, most_correlated),
        effective_rank=_rank(singular_values),
        singular_values=singular_values,
        unit_norm=bool(((lengths - 1).abs() < UNIT_NORM).all()),
        problems=(),
        problem_kinds=(),
    )
    found = dict(_problems(report))
    told = {"problems": tuple(found.values()), "problem_kinds": tuple(found)}
    return EmbeddingReport(**{**vars(report), **told})


def double(x: Tensor) -> Tensor:
    """As float64, on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _pooled(z: Tensor) -> Tensor:
    _checks.embedding_tensor(z)
    _checks.embeddings(z)
    return double(z.detach().flatten(0, -2))


def _singular_values(x: Tensor) -> Tensor:
    """Of (N, D) in float64: largest first, on the CPU; nan if any element is not finite."""
    largest = x.abs().max()
    if not bool(largest.isfinite()) or largest == 0:
        return torch.full((min(x.shape),), 0 * float(largest), dtype=x.dtype)
    x = x / largest
    powers = torch.linalg.eigvalsh(x @ x.T if x.shape[0] < x.shape[1] else x.T @ x).flip(0)
    return (powers.masked_fill(powers < _NO_RANK**2 * powers[0], 0).sqrt() * largest).cpu()


def _rank(singular_values: Tensor) -> float:
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())


def _mean_abs_correlation(x: Tensor, std: Tensor, alive: Tensor, most: int | None) -> float:
    chosen = alive.nonzero().squeeze(1)
    if most is not None and len(chosen) > most:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, most).long()]
    dimensions = len(chosen)
    if dimensions < 2:
        return float("nan")
    x = x[:, chosen]
    standard = ((x - x.mean(0)) / std[chosen]).float()
    with torch.autocast(x.device.type, enabled=False):
        correlation = (standard.T @ standard).div_(len(x) - 1).fill_diagonal_(0)
    return float(correlation.abs().sum(dtype=torch.float64)) / (dimensions * (dimensions - 1))


def _problems(report: EmbeddingReport) -> Iterator[tuple[str, str]]:
    """The kind of each problem, and its words."""
    if report.effective_rank != report.effective_rank:
        yield (
            "non-finite",
            "some elements are NaN or infinite: every statistic of the batch is lost",
        )
        return
    largest = report.std_quantiles[-1][1]
    if largest < COLLAPSED_STD:
        yield (
            "collapse",
            f"collapse: no dimension has a standard deviation above {largest:.2g}; VICReg's hinge "
            f"has little gradient below {COLLAPSED_STD:g}",
        )
    elif report.dead_dimensions:
        words = f"{report.dead_dimensions} of {report.dimensions} dimensions do not vary"
        yield "dead dimensions", words
    if report.unit_norm:
        yield (
            "unit norm",
            "rows have length 1, which caps the standard deviation at D^-1/2: regularize the "
            "embeddings before they are normalized",
        )
    if report.effective_rank < LOW_RANK * report.largest_rank:
        yield (
            "low rank",
            f"dimensional collapse: an effective rank of {report.effective_rank:.1f} for "
            f"{report.samples} samples of {report.dimensions} dimensions",
        )
    # Independent dimensions show (2 / (pi N))^1/2 by chance.
    chance = (2 / (torch.pi * report.samples)) ** 0.5
    if report.mean_abs_correlation > HIGH_CORRELATION + chance:
        correlation = f"{report.mean_abs_correlation:.2f}"
        yield "correlation", f"dimensions repeat each other: mean |correlation| {correlation}"
