"""What a run was worth: linear probe, k-NN, embedding health, table, figure and verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from data import Images, Samples, ordered_batches
from evaluation import encode, knn_accuracy, logistic_accuracy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from networks import Network
from rich.table import Table
from torch import Tensor
from torch.utils.data import Subset

from vicreg_losses import diagnostics

PROBE_IMAGES = 10_000
PROBE_CLASSES = 100  # of more, the regression takes minutes, and has few images of each
BATCH = 256
MARGIN = 0.02
UNTRAINED = "untrained"
TITLES = {
    UNTRAINED: "untrained",
    "invariance": "invariance alone",
    "vicreg": "VICReg",
    "visreg": "VISReg",
    "lejepa": "LeJEPA",
    "simsiam": "SimSiam",
    "byol": "BYOL",
    "simclr": "SimCLR",
    "barlow": "Barlow Twins",
}
COLOURS = {
    UNTRAINED: "0.6",
    "invariance": "#D55E00",
    "vicreg": "#0072B2",
    "visreg": "#009E73",
}
OTHER_COLOUR = "#0072B2"
TERM_COLOURS = {
    "loss": "black",
    "invariance": COLOURS["invariance"],
    "variance": "#56B4E9",
    "scale": "#56B4E9",
    "covariance": "#CC79A7",
    "shape": "#CC79A7",
    "center": "#E69F00",
    "sketch": "#CC79A7",
    "added variance": "#56B4E9",
    "added covariance": "#CC79A7",
    "added sketch": "#009E73",
}


@dataclass
class Outcome:
    """One row of the table.

    Attributes:
        name: What was trained: a loss, with the names of added terms after "+".
        accuracy: Linear-probe accuracy on up to ``PROBE_IMAGES`` held-out images, in [0, 1]; None
            of one class, or more than ``PROBE_CLASSES``.
        knn: Accuracy there of 20 nearest neighbours among as many training images, in [0, 1].
        effective_rank: Effective rank of the held-out embeddings, between 1 and their dimension.
        smallest_std: Smallest standard deviation of any embedding dimension.
        seconds: Training time, over all sittings of an interrupted run.
        history: What was logged, one record every few steps.
    """

    name: str
    accuracy: float | None
    knn: float
    effective_rank: float
    smallest_std: float
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def title(name: str) -> str:
    """A run's name for people."""
    loss, *added = name.split("+")
    return " + ".join([TITLES[loss], *added])


def evaluate(
    name: str, network: Network, images: Images, device: torch.device, workers: int
) -> Outcome:
    """Probe the backbone's features, and look at the embeddings, of images as they are."""
    network.eval()
    prepare = images.views.plain

    def encoded(samples: Samples) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
        chosen = Subset(samples, order[:PROBE_IMAGES].sort().values.tolist())  # of all classes
        return encode(network.features, ordered_batches(chosen, BATCH, workers), prepare, device)

    train, test = encoded(images.train), encoded(images.held_out)
    with torch.inference_mode():
        report = diagnostics.embedding_report(network.expander(test[0]))
    classes = len(images.classes)
    knn = knn_accuracy(*train, *test, classes=classes)
    probed = len(train[1].unique()) > 1 and classes <= PROBE_CLASSES
    accuracy = logistic_accuracy(*(x.cpu() for x in (*train, *test))) if probed else None
    return Outcome(name, accuracy, knn, report.effective_rank, report.std_min)


def table(outcomes: Sequence[Outcome], dimensions: int | str) -> Table:
    """The closing table, one row per outcome."""
    result = Table(title=f"Held-out images: probe of the features, {dimensions}-d embeddings")
    result.add_column("objective", overflow="fold")
    for heading in ("linear probe", "k-NN", "effective rank", "smallest std", "seconds"):
        result.add_column(heading, justify="right", min_width=6)
    for row in outcomes:
        result.add_row(
            title(row.name),
            "-" if row.accuracy is None else f"{row.accuracy:.3f}",
            f"{row.knn:.3f}",
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
    epochs, lowest = [record["epoch"] for record in row.history], 1.0
    for term in filter(row.history[0].__contains__, TERM_COLOURS):
        values = [record[term] for record in row.history]
        axes.plot(epochs, values, color=TERM_COLOURS[term], label=term)
        lowest = min(lowest, *values)
    scale = "log" if lowest > 0 else "linear"  # SimSiam's and BYOL's are negative
    axes.set(xlabel="epoch", ylabel=f"value ({scale} scale)", title=title(row.name), yscale=scale)
    axes.grid(alpha=0.3)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend(**below, ncols=5, handlelength=1, columnspacing=1, frameon=False)


def _draw_health(axes: Axes, trained: Sequence[Outcome], key: str, label: str) -> None:
    for row in trained:
        epochs = [record["epoch"] for record in row.history]
        values = [record[key] for record in row.history]
        axes.plot(epochs, values, color=COLOURS.get(row.name, OTHER_COLOUR), label=title(row.name))
    axes.set(xlabel="epoch", ylabel=label, title=f"{label[0].upper()}{label[1:]} by epoch")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_accuracies(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    names = [title(row.name).replace(" ", "\n") for row in outcomes]
    percent = [100 * (row.knn if row.accuracy is None else row.accuracy) for row in outcomes]
    bars = axes.bar(names, percent, color=[COLOURS.get(row.name, OTHER_COLOUR) for row in outcomes])
    axes.bar_label(bars, fmt="%.1f %%")
    # Not from zero, where 84 and 97 % would look alike; hence the labels.
    probed = all(row.accuracy is not None for row in outcomes)
    kind = "Linear probe" if probed else "k-NN"
    axes.set(ylabel="accuracy (%)", title=f"{kind}, held-out images")
    axes.set_ylim(max(0, min(percent) - 10), 102)
