"""Data of low quality: which regularizer suffers least from a long tail, or from a low rank?

The claim of VISReg (2026, arXiv:2606.02572): sketching withstands long-tailed and low-rank data,
and a shape term of four times the weight withstands a long tail best.

Long-tailed: class c keeps ``n 100^(-c / 9)`` of its n images, from all of the first to a hundredth
of the last. The probe learns from the features of all training images, balanced, so it asks what
the features hold; a second one learns from the long-tailed images alone.

Low rank: all images, also the held-out ones, are projected on the first 8 principal components of
the training images. So the data has fewer degrees of freedom than the embeddings are asked for,
while number and balance of the images stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import charts
import choices
import common
import torch
import trainer
import verdicts
from common import Job, Metrics
from torch import Tensor
from trainer import Data, Joint, Scale

RATIO = 100
COMPONENTS = 8
TAIL, RANK = "long tail", "low rank"
# Of classes by their place in the tail. With 400 images of the first class these are ImageNet-LT's
# groups: more than 100 images, 20 to 100, fewer than 20.
GROUPS = {"many": slice(0, 3), "medium": slice(3, 6), "few": slice(6, 10)}
SHAPE_X4 = {"scale": 0.5, "shape": 2.0, "center": 0.5}  # the paper's 4 : 1
EXACT_X4 = {**SHAPE_X4, "quantiles": "exact"}  # see small_batches.py
OBJECTIVES: dict[str, Callable[[Scale, int], Joint]] = {
    "VICReg": choices.vicreg,
    "SIGReg": choices.lejepa,
    "VISReg": choices.visreg,
    "VISReg, shape x4": lambda size, seed: choices.visreg(size, seed, **SHAPE_X4),
    "VISReg, shape x4, exact": lambda size, seed: choices.visreg(size, seed, **EXACT_X4),
}
RATES = {"VICReg": "vicreg", "SIGReg": "lejepa"}
UNTRAINED = "untrained"


def tail_counts(largest: int, classes: int) -> list[int]:
    """Images of each class in the long tail, 1 or more."""
    return [max(1, round(largest * RATIO ** (-c / (classes - 1)))) for c in range(classes)]


def long_tailed(labels: Tensor) -> Tensor:
    """Indices of the long-tailed training images: the first ones of each class."""
    counts = tail_counts(int((labels == 0).sum()), int(labels.max()) + 1)
    return torch.cat([torch.where(labels == c)[0][:n] for c, n in enumerate(counts)])


def low_rank(data: Data) -> Data:
    """All images on the first principal components of the training images, in whole gray values."""
    pixels = data.train.double().flatten(1)
    mean = pixels.mean(0)
    _, vectors = torch.linalg.eigh((pixels - mean).T @ (pixels - mean))
    basis = vectors[:, -COMPONENTS:]

    def project(images: Tensor) -> Tensor:
        x = images.double().flatten(1) - mean
        return (x @ basis @ basis.T + mean).round().clamp(0, 255).to(torch.uint8).view_as(images)

    return replace(data, train=project(data.train), test=project(data.test))


def train(job: Job) -> Metrics:
    """Train one network on hard data; the variant is "kind: objective"."""
    kind, _, name = job.variant.partition(": ")
    size, data = job.size, trainer.load(job.data, job.size)
    tail = long_tailed(data.labels)
    if kind == RANK:
        data = low_rank(data)
    seen = data if kind == RANK else replace(data, train=data.train[tail], labels=data.labels[tail])
    network = trainer.build(size, job.seed)
    spread = {}
    if name != UNTRAINED:
        lr = choices.RATES[RATES.get(name, "visreg")]
        objective = OBJECTIVES[name](size, job.seed)
        spread["batch_std"] = trainer.fit(
            network, objective, seen, scale=size, seed=job.seed, lr=lr
        )
    found = {**trainer.measures(network, data), **spread}
    if kind == TAIL:
        features = trainer.encode(network.backbone, data.train, data.views)
        test = trainer.encode(network.backbone, data.test, data.views)
        found.update(recalls(features, data.labels, test, data.test_labels))
        of_tail = recalls(features[tail], seen.labels, test, data.test_labels)
        found.update({f"tail_{name}": value for name, value in of_tail.items()})
    return found


def recalls(features: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> Metrics:
    """Accuracy of a probe on held-out images: over all classes, and over each group of them."""
    right = trainer.logistic_predictions(features, labels, test) == test_labels
    recall = torch.stack([right[test_labels == c].double().mean() for c in test_labels.unique()])
    groups = {name: float(recall[part].mean()) for name, part in GROUPS.items()}
    return {"probe": float(recall.mean()), **groups}


PAIRS = (
    ("VISReg", "VICReg"),
    ("VISReg", "SIGReg"),
    ("VISReg, shape x4", "VISReg"),
    ("VISReg, shape x4, exact", "VISReg, shape x4"),
    ("VISReg, shape x4, exact", "VISReg"),
)


def claims(runs: common.Runs) -> list[dict[str, str]]:
    """Pairs of objectives on both kinds of data."""
    return [
        verdicts.compared(
            runs, data, metric, (f"{kind}: {a}", f"{kind}: {b}"), f"{kind}: {a} beats {b}"
        )
        for data in dict.fromkeys(run["data"] for run in runs)
        for kind, metrics in ((TAIL, ("probe", "tail_probe")), (RANK, ("probe",)))
        for a, b in PAIRS
        for metric in metrics
    ]


def draw(summary: verdicts.Summary, path: Path) -> None:
    """The probes, and the rank of the embeddings."""
    metrics = {"probe": "probe", "tail_probe": "probe of the long tail", "rank": "rank of z"}
    charts.bars(summary, metrics, path, faint=lambda name: name.endswith(UNTRAINED))


def main(argv: Sequence[str] | None = None) -> None:
    """Train all variants, print the tables, and write hard_data.json, .csv and .png."""
    settings = common.arguments(__doc__, argv)
    study = common.Study("hard_data", "Long-tailed and low-rank data", settings)
    variants = [f"{kind}: {name}" for kind in (TAIL, RANK) for name in (UNTRAINED, *OBJECTIVES)]
    columns = {
        "probe": "probe",
        **{name: name for name in GROUPS},
        "tail_probe": "tail's probe",
        "tail_few": "its few",
        "knn": "k-NN",
        "rank": "rank of z",
    }
    study.conduct(train, variants, columns, claims, draw)


if __name__ == "__main__":
    main()
