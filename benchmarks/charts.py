"""Log-log plots of a run: cost against each axis, one picture for each loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from benchmarks.contenders import ALL_OURS, FIELD, OURS, OURS_COMPILED
from benchmarks.measure import Row
from benchmarks.points import AXES, BASES, SWEEPS
from benchmarks.record import curve

TITLES = {
    "variance": "Variance",
    "covariance": "Covariance",
    "vicreg": "VICReg",
    "visreg": "VISReg (sliced Wasserstein)",
    "sigreg": "SIGReg (Epps-Pulley)",
}
METRICS = {
    "both_ms": "forward + backward, ms",
    "forward_ms": "forward, ms",
    "peak_mib": "peak memory, MiB",
}
COLORS = {
    OURS: "#d1495b",
    OURS_COMPILED: "#f2a0a9",
    "published": "#30343f",
    "compiled": "#6b7a8f",
    "lightly": "#2e86ab",
    "pytorch-metric-learning": "#3b8a5a",
    "stable-pretraining": "#e0a030",
    "lightly Barlow Twins": "#9a7bb5",
}
LABELS = {
    OURS: "vicreg-losses",
    OURS_COMPILED: "vicreg-losses, torch.compile",
    "published": "published formula",
    "compiled": "published, torch.compile",
    "lightly Barlow Twins": "Barlow Twins (lightly)",
}


def draw(
    folder: Path,
    rows: Sequence[Row],
    about: dict[str, Any],
    suffixes: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """``LOSS.png`` and ``LOSS.svg`` for every loss with a sweep of two points or more."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for loss in SWEEPS:
        axes = [axis for axis in SWEEPS[loss] if len(curve(rows, loss, axis, OURS)) > 1]
        if not axes:
            continue
        figure = _figure(rows, loss, axes, about)
        for suffix in suffixes:
            written.append(folder / f"{loss}.{suffix}")
            figure.savefig(written[-1], dpi=150, metadata=_undated(suffix))
        plt.close(figure)
    return written


def _figure(rows: Sequence[Row], loss: str, axes: Sequence[str], about: dict[str, Any]) -> Any:
    matplotlib.rcParams |= {
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "vicreg-losses",
    }  # fmt: skip
    metrics = ("both_ms", "peak_mib")
    size = (1.5 + 3.9 * len(axes), 7.6)
    figure, grid = plt.subplots(len(metrics), len(axes), figsize=size, squeeze=False)
    base = next(b for b in BASES if b.loss == loss)
    for line, metric in zip(grid, metrics, strict=True):
        for ax, axis in zip(line, axes, strict=True):
            _panel(ax, rows, loss, axis, metric)
        line[0].set_ylabel(METRICS[metric])
    for ax, axis in zip(grid[-1], axes, strict=True):
        ax.set_xlabel(AXES[axis])
    slices = f", K = {base.slices}" if base.slices else ""
    figure.suptitle(TITLES[loss], x=0.02, ha="left", fontsize=16, fontweight="bold")
    handles, labels = _legend(grid)
    figure.legend(
        handles, labels, loc="upper right", ncols=len(axes), frameon=False, fontsize=10
    )  # beside the title, which leaves room for as many columns as there are panels
    machine = about.get("machine", {})
    figure.text(
        0.02, 0.012,
        f"float32; elsewhere V = {base.views}, N = {base.samples}, D = {base.dimensions}{slices}. "
        f"{machine.get('cpu', '')}, {machine.get('threads', '?')} threads, "
        f"torch {machine.get('torch', '')}. Lower is better; a line ends where memory or time did.",
        fontsize=8.5, color="#555555",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 1, 0.92))
    return figure


def _panel(ax: Axes, rows: Sequence[Row], loss: str, axis: str, metric: str) -> None:
    for contender in reversed(FIELD[loss]):  # ours last, on top
        points = curve(rows, loss, axis, contender.name)
        pairs = [(getattr(r, axis), getattr(r, metric)) for r in points]
        pairs = [(x, y) for x, y in pairs if y]
        if not pairs:
            continue
        ours = contender.name in ALL_OURS
        ax.plot(
            *zip(*pairs, strict=True),
            marker="o",
            markersize=5 if ours else 3.5,
            linewidth=2.8 if ours else 1.5,
            color=COLORS[contender.name],
            label=LABELS.get(contender.name, contender.name),
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    sizes = SWEEPS[loss][axis]
    ax.set_xticks(sizes, [f"{s // 1024}k" if s >= 1024 else str(s) for s in sizes])
    low, high = ax.get_ylim()
    subdivisions = (1, 2, 5) if high / low < 100 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subdivisions))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    ax.minorticks_off()
    ax.grid(True, color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for ax in grid.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    first = [LABELS[name] for name in ALL_OURS if LABELS[name] in found]
    labels = first + [label for label in reversed(list(found)) if label not in first]
    return [found[label] for label in labels], labels


def _undated(suffix: str) -> dict[str, None] | None:
    return {"Date": None} if suffix == "svg" else None
