"""Slices of all ranks: do W ranks with slices of their own learn better than with shared ones?

VISReg's trainer (2026, arXiv:2606.02572) draws other slices on each rank, so that W ranks of K
slices have W K. In the library that is ``SlicedSketchLoss(K, slices="per_rank")``; "shared", the
default, has K overall. Both are exact for the batch of all ranks: W ranks with K slices of their
own have the value and the gradient of one process with those W K slices, as
tests/test_claims_formulas.py shows. So one process stands for four ranks here, and K slices of four
ranks' own are the variant of 4 K slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import charts
import choices
import common
import torch
import trainer
import verdicts
from common import Job, Metrics
from torch import Tensor

from vicreg_losses import SlicedSketchLoss

RANKS = 4
SLICES = (16, 64, 256)
QUICK_SLICES = (2, 8)
DRAWS = 64


def train(job: Job) -> Metrics:
    """Train one network; the variant is the number of slices over all ranks."""
    size, data = job.size, trainer.load(job.data, job.size)
    slices = int(job.variant)
    network = trainer.build(size, job.seed)
    images = data.views.plain(data.train[:: len(data.train) // size.batch][: size.batch])
    before = gradient_noise(network(images.to(size.device)), slices, job.seed)
    objective = choices.visreg(size, job.seed, num_slices=slices)
    lr = choices.RATES["visreg"]
    trainer.fit(network, objective, data, scale=size, seed=job.seed, lr=lr)
    measured = trainer.measures(network, data)
    network.train()  # as the loss sees the embeddings
    after = gradient_noise(network(images.to(size.device)), slices, job.seed)
    return {"noise_before": before, "noise_after": after, **measured}


def gradient_noise(z: Tensor, slices: int, seed: int, draws: int = DRAWS) -> float:
    """Variance of the shape term's gradient over draws of the slices, by the squared mean gradient.

    ``E |g - E g|^2 / |E g|^2`` of the gradient g by the embeddings ``z``, without the bias of
    estimating ``E g`` from ``draws`` draws.
    """
    z = z.detach().requires_grad_()
    loss = SlicedSketchLoss(slices, seed=seed)
    gradients = torch.stack([torch.autograd.grad(loss(z), z)[0].double() for _ in range(draws)])
    mean = gradients.mean(0)
    variance = float((gradients - mean).square().sum() / (draws - 1))
    return variance / max(float(mean.square().sum()) - variance / draws, 1e-30)


def claims(runs: common.Runs) -> list[dict[str, str]]:
    """Own against shared slices, for each K whose W-fold was trained."""
    numbers = list(dict.fromkeys(int(run["variant"]) for run in runs))
    pairs = [(str(k), str(RANKS * k)) for k in numbers if RANKS * k in numbers]
    sets = list(dict.fromkeys(run["data"] for run in runs))
    probes = [
        verdicts.compared(
            runs, data, "probe", (own, shared), f"K = {shared}: own slices of 4 ranks beat shared"
        )
        for data in sets
        for shared, own in pairs
    ]
    return probes + [noise_claim(runs, data, *pair) for data in sets for pair in pairs]


def noise_claim(runs: common.Runs, data: str, shared: str, own: str) -> dict[str, str]:
    """Whether the noise of the gradient falls by the number of ranks, within a quarter."""
    ratios = [
        a / b
        for a, b in zip(
            verdicts.values(runs, data, shared, "noise_before"),
            verdicts.values(runs, data, own, "noise_before"),
            strict=True,
        )
    ]
    within = all(0.75 * RANKS < ratio < 1.25 * RANKS for ratio in ratios)
    text = f"K = {shared}: own slices divide the gradient's variance by {RANKS}"
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    verdict = "holds here" if within else "not by that"
    return verdicts.claim(text, data, verdict, f"ratios by seed {shown}")


def draw(summary: verdicts.Summary, path: Path) -> None:
    """Probe and gradient noise against the number of slices."""
    metrics = {
        "probe": "probe accuracy",
        "noise_before": "gradient noise, untrained",
        "noise_after": "gradient noise, trained",
    }
    charts.curves(
        summary, metrics, path, lambda variant: ("VISReg", float(variant)), "slices of all ranks"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train all variants, print the tables, and write slices.json, .csv and .png."""
    settings = common.arguments(__doc__, argv)
    study = common.Study("slices", "VISReg by slices over all ranks", settings)
    numbers = QUICK_SLICES if settings.scale == "quick" else SLICES
    columns = {
        "probe": "probe",
        "knn": "k-NN",
        "rank": "rank of z",
        "noise_before": "gradient noise, untrained",
        "noise_after": "trained",
    }
    study.conduct(train, [str(k) for k in numbers], columns, claims, draw)


if __name__ == "__main__":
    main()
