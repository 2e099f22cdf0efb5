"""Small batches: do exact quantile targets help VISReg where the paper's are biased?

VISReg (2026, arXiv:2606.02572) compares N sorted projections with the quantiles ``i / (N + 1)`` of
N(0, 1), whose variance is below 1: .72 for N = 16. The exact targets, the means of N(0, 1) over N
bins of equal probability, have no such bias. All batch sizes take the same number of steps, so
they see different numbers of images: compare the two targets at one size, not the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import charts
import choices
import common
import trainer
import verdicts
from common import Job, Metrics

BATCHES = (16, 32, 64, 256)
QUICK_BATCHES = (4, 8)
TARGETS = ("paper", "exact")


def train(job: Job) -> Metrics:
    """Train one network; the variant is "batch targets"."""
    batch, targets = job.variant.split()
    size = replace(job.size, batch=int(batch))
    data = trainer.load(job.data, job.size)
    network = trainer.build(size, job.seed)
    objective = choices.visreg(size, job.seed, quantiles=targets)
    lr = choices.RATES["visreg"]
    spread = trainer.fit(network, objective, data, scale=size, seed=job.seed, lr=lr)
    return {"batch_std": spread, **trainer.measures(network, data)}


def claims(runs: common.Runs) -> list[dict[str, str]]:
    """Exact against the paper's targets at each size."""
    sizes = dict.fromkeys(run["variant"].split()[0] for run in runs)
    texts = {"probe": "exact targets raise the probe", "batch_std": "exact targets raise std of z"}
    return [
        verdicts.compared(
            runs, data, metric, (f"{size} exact", f"{size} paper"), f"N = {size}: {text}"
        )
        for data in dict.fromkeys(run["data"] for run in runs)
        for metric, text in texts.items()
        for size in sizes
    ]


def draw(summary: verdicts.Summary, path: Path) -> None:
    """Probe and standard deviation against the batch size."""
    metrics = {"probe": "probe accuracy", "batch_std": "std of z", "rank": "rank of z"}

    def point(variant: str) -> tuple[str, float]:
        batch, targets = variant.split()
        return targets, float(batch)

    charts.curves(summary, metrics, path, point, "images in a batch")


def main(argv: Sequence[str] | None = None) -> None:
    """Train all variants, print the tables, and write small_batches.json, .csv and .png."""
    settings = common.arguments(__doc__, argv)
    study = common.Study("small_batches", "VISReg in small batches", settings)
    batches = QUICK_BATCHES if settings.scale == "quick" else BATCHES
    variants = [f"{batch} {targets}" for batch in batches for targets in TARGETS]
    columns = {"probe": "probe", "knn": "k-NN", "batch_std": "std of z", "rank": "rank of z"}
    study.conduct(train, variants, columns, claims, draw)


if __name__ == "__main__":
    main()
