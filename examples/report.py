"""What a run was worth: linear probe, embedding health, table, figure and verdict."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from data import Images
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vicreg_losses import diagnostics

PROBE_IMAGES = 10_000
MARGIN = 0.02
UNTRAINED = "untrained"
TITLES = {
    UNTRAINED: "untrained",
    "invariance": "invariance alone",
    "vicreg": "VICReg",
    "visreg": "VISReg",
}
COLOURS = {
    UNTRAINED: "0.6",
    "invariance": "#D55E00",
    "vicreg": "#0072B2",
    "visreg": "#009E73",
}
TERM_COLOURS = {
    "total": "black",
    "invariance": COLOURS["invariance"],
    "variance": "#56B4E9",
    "scale": "#56B4E9",
    "covariance": "#CC79A7",
    "shape": "#CC79A7",
    "center": "#E69F00",
}


@dataclass
class Outcome:
    """One row of the table.

    Attributes:
        accuracy: Linear-probe accuracy on the held-out images, in [0, 1].
        effective_rank: Effective rank of the held-out embeddings, between 1 and their dimension.
        smallest_std: Smallest standard deviation of any embedding dimension.
        seconds: Training time, over all sittings of an interrupted run.
        history: What was logged, one record every few steps.
    """

    name: str
    accuracy: float
    effective_rank: float
    smallest_std: float
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def health(z: Tensor) -> tuple[float, float]:
    """Smallest standard deviation of any dimension, and effective rank, of (N, D) embeddings."""
    report = diagnostics.embedding_report(z)
    return report.std_min, report.effective_rank


@torch.inference_mode()
def evaluate(
    name: str, network: nn.Sequential, images: Images, settings: argparse.Namespace
) -> Outcome:
    """Probe the backbone's features, and look at the embeddings, of images as they are."""
    network.eval()
    backbone, projector = network
    encoded = []
    for samples in (images.train, images.held_out):
        loader = DataLoader(samples, settings.batch_size, num_workers=settings.workers)
        features, labels = [], []
        for pixels, targets in islice(loader, math.ceil(PROBE_IMAGES / settings.batch_size)):
            features.append(backbone(pixels.to(settings.device) / 255))
            labels.append(targets)
        encoded.append((torch.cat(features), torch.cat(labels)))
    smallest_std, effective_rank = health(projector(encoded[1][0]))
    (x_train, y_train), (x_test, y_test) = ((x.float().cpu(), y) for x, y in encoded)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, tol=1e-3))
    with threadpool_limits(1, "blas"):  # on matrices this small, threads mostly wait for each other
        accuracy = probe.fit(x_train, y_train).score(x_test, y_test)
    return Outcome(name, float(accuracy), effective_rank, smallest_std)


def table(outcomes: Sequence[Outcome], dimensions: int) -> Table:
    """The closing table, one row per outcome."""
    result = Table(title=f"Held-out images: probe of the features, {dimensions}-d embeddings")
    result.add_column("objective", no_wrap=True)
    for heading in ("probe accuracy", "effective rank", "smallest std", "seconds"):
        result.add_column(heading, justify="right")
    for row in outcomes:
        result.add_row(
            TITLES[row.name],
            f"{row.accuracy:.3f}",
            f"{row.effective_rank:.1f}",
            f"{row.smallest_std:.2g}",
            f"{row.seconds:.0f}" if row.history else "-",
        )
    return result


def complaint(outcomes: Sequence[Outcome]) -> str | None:
    """What is wrong if VICReg or VISReg does not clearly beat both baselines, else None."""
    accuracy = {row.name: row.accuracy for row in outcomes}
    for name in accuracy.keys() & {"vicreg", "visreg"}:
        for baseline in accuracy.keys() & {UNTRAINED, "invariance"}:
            if accuracy[name] < accuracy[baseline] + MARGIN:
                return (
                    f"the probe accuracy of {TITLES[name]}, {accuracy[name]:.3f}, does not beat "
                    f"{TITLES[baseline]}, {accuracy[baseline]:.3f}, by {MARGIN}"
                )
    return None


def figure(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the terms of every objective above, and what became of the embeddings below."""
    trained = [row for row in outcomes if row.history]
    canvas = Figure(figsize=(14, 8.5), layout="constrained")
    above, below = canvas.subfigures(2, 1)
    above.suptitle("Training: loss, and its terms before they are weighted")
    below.suptitle("Embeddings of the training batches, and the probe of the features")
    for axes, row in zip(above.subplots(1, len(trained), squeeze=False)[0], trained, strict=True):
        _draw_terms(axes, row)
    spread, rank, bars = below.subplots(1, 3)
    _draw_health(spread, trained, "smallest_std", "smallest standard deviation")
    _draw_health(rank, trained, "effective_rank", "effective rank (RankMe)")
    spread.set_yscale("log")
    _draw_accuracies(bars, outcomes)
    canvas.savefig(path, dpi=110)


def _draw_terms(axes: Axes, row: Outcome) -> None:
    epochs = [record["epoch"] for record in row.history]
    for term in filter(row.history[0].__contains__, TERM_COLOURS):
        values = [record[term] for record in row.history]
        axes.plot(epochs, values, color=TERM_COLOURS[term], label=term)
    axes.set(xlabel="epoch", ylabel="value (log scale)", title=TITLES[row.name], yscale="log")
    axes.grid(alpha=0.3)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend(**below, ncols=5, handlelength=1, columnspacing=1, frameon=False)


def _draw_health(axes: Axes, trained: Sequence[Outcome], key: str, title: str) -> None:
    for row in trained:
        epochs = [record["epoch"] for record in row.history]
        values = [record[key] for record in row.history]
        axes.plot(epochs, values, color=COLOURS[row.name], label=TITLES[row.name])
    axes.set(xlabel="epoch", ylabel=title, title=f"{title[0].upper()}{title[1:]} by epoch")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_accuracies(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    names = [TITLES[row.name].replace(" ", "\n") for row in outcomes]
    percent = [100 * row.accuracy for row in outcomes]
    bars = axes.bar(names, percent, color=[COLOURS[row.name] for row in outcomes])
    axes.bar_label(bars, fmt="%.1f %%")
    # Not from zero, where 84 and 97 % would look alike; hence the labels.
    axes.set(ylabel="accuracy (%)", title="Linear probe, held-out images")
    axes.set_ylim(max(0, min(percent) - 10), 102)
