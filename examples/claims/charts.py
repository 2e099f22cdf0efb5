"""The figures of the scripts: bars and curves of means, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from verdicts import Summary

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
Kind = Callable[[str], bool]


def bars(summary: Summary, metrics: Mapping[str, str], path: Path, faint: Kind) -> None:
    """One row of axes for each data set, one column for each metric, one bar for each variant."""
    canvas = Figure(figsize=(5 * len(metrics), 0.8 + 3.6 * len(summary)), layout="constrained")
    grid = canvas.subplots(len(summary), len(metrics), squeeze=False, sharey="row")
    for row, (data, variants) in zip(grid, summary.items(), strict=True):
        for axes, (metric, title) in zip(row, metrics.items(), strict=True):
            _bars(
                axes, {name: found.get(metric, (0, 0)) for name, found in variants.items()}, faint
            )
            axes.set_title(f"{data}: {title}")
    canvas.savefig(path, dpi=100)


def _bars(axes: Axes, cells: Mapping[str, tuple[float, float]], faint: Kind) -> None:
    means, spreads = zip(*cells.values(), strict=True)
    colours = ["0.7" if faint(name) else COLOURS[0] for name in cells]
    axes.barh(list(cells), means, xerr=spreads, color=colours, error_kw={"lw": 1})
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    low = min(means)
    if low > 0.5 and max(means) < 1:  # accuracies that differ by little
        axes.set_xlim(left=low - 0.05)


def curves(
    summary: Summary,
    metrics: Mapping[str, str],
    path: Path,
    point: Callable[[str], tuple[str, float]],
    label: str,
) -> None:
    """One row of axes for each data set, one column for each metric.

    Args:
        summary: means and spreads.
        metrics: what to draw, and its title.
        path: of the PNG.
        point: the curve of a variant, and its place on the x axis.
        label: of the x axis, which is logarithmic.
    """
    canvas = Figure(figsize=(5 * len(metrics), 0.5 + 3.5 * len(summary)), layout="constrained")
    grid = canvas.subplots(len(summary), len(metrics), squeeze=False)
    for row, (data, variants) in zip(grid, summary.items(), strict=True):
        for axes, (metric, title) in zip(row, metrics.items(), strict=True):
            _curves(axes, {name: found[metric] for name, found in variants.items()}, point)
            places = sorted({point(name)[1] for name in variants})
            axes.set(title=f"{data}: {title}", xlabel=label, xscale="log")
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
            axes.legend()
    canvas.savefig(path, dpi=100)


def _curves(
    axes: Axes,
    cells: Mapping[str, tuple[float, float]],
    point: Callable[[str], tuple[str, float]],
) -> None:
    series: dict[str, list[tuple[float, float, float]]] = {}
    for name, (mean, spread) in cells.items():
        curve, x = point(name)
        series.setdefault(curve, []).append((x, mean, spread))
    for (curve, points), colour in zip(series.items(), COLOURS, strict=False):
        x, means, spreads = zip(*sorted(points), strict=True)
        axes.errorbar(x, means, spreads, fmt="o-", capsize=3, color=colour, label=curve)
