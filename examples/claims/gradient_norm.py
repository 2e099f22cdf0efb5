"""Gradient at collapse: how the norm of each regularizer's gradient depends on the scale of z.

The experiment of VISReg's collapse figure (2026, arXiv:2606.02572), without training: two views of
64 embeddings of 512 dimensions and length r, 64 slices, r from 1e-5 to 10. Measured is the norm of
the gradient of one embedding, the mean over embeddings. No data set is used, whatever --data says.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import verdicts
from lightly.loss import BarlowTwinsLoss
from matplotlib.figure import Figure
from torch import Tensor, nn

from vicreg_losses import (
    CovarianceLoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
)

VIEWS, SAMPLES, DIMENSIONS, SLICES = 2, 64, 512, 64
SCALES = [10 ** (power / 4) for power in range(-20, 5)]
SHOWN = [1e-5, 1e-4, 1e-2, 1.0, 10.0]
NEAR, FAR = 1e-4, 1e-2
LAMBDA = 5e-3
Loss = Callable[[Tensor], Tensor]


def pooled_vicreg(z: Tensor) -> Tensor:
    """The "VICReg" of VISReg's repository: squared, views pooled; while every std is below 1."""
    pooled = z.flatten(0, 1)
    return 25 * VarianceLoss(form="squared")(pooled) + CovarianceLoss()(pooled)


def lightly_barlow(z: Tensor) -> Tensor:
    """Barlow Twins as lightly has it: standardised by a BatchNorm, whose eps is 1e-5."""
    return BarlowTwinsLoss(lambda_param=LAMBDA)(z[0], z[1])


def barlow(z: Tensor) -> Tensor:
    """Barlow Twins standardised without an eps, as in VISReg's figure."""
    a, b = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    correlation = a.T @ b / z.shape[1]
    diagonal = correlation.diagonal()
    others = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + LAMBDA * others


def sliced_wasserstein(z: Tensor, directions: Tensor) -> Tensor:
    """Mean of ``(sort(z w) - q)^2`` as VISReg's shape term, but of embeddings as they are."""
    samples = z.shape[1]
    normal = torch.distributions.Normal(z.new_zeros(()), z.new_ones(()))
    targets = normal.icdf(torch.arange(1, samples + 1, dtype=z.dtype) / (samples + 1))
    projected = (z @ directions).sort(dim=1).values
    return (projected - targets.unsqueeze(1)).square().mean()


def losses(directions: Tensor) -> dict[str, Loss]:
    """The regularizers, on the same slices."""
    visreg = VISRegLoss(weight=1.0)
    return {
        "VICReg, official": VICRegLoss(invariance=0.0),
        "VICReg, squared and pooled": pooled_vicreg,
        "Barlow Twins, no eps": barlow,
        "Barlow Twins, lightly": lightly_barlow,
        "sliced Wasserstein": lambda z: sliced_wasserstein(z, directions),
        "SIGReg": SlicedSketchLoss(statistic="epps_pulley", directions=directions),
        "VISReg": lambda z: visreg(z, directions=directions),
        "VISReg, scale alone": VarianceLoss(form="squared"),
        "VISReg, shape alone": SlicedSketchLoss(directions=directions),
    }


def directions(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit columns, (D, K)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = torch.randn(DIMENSIONS, SLICES, generator=generator, dtype=dtype)
    return nn.functional.normalize(drawn, dim=0)


def embeddings(seed: int) -> Tensor:
    """Rows of length 1 in random directions, (V, N, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(VIEWS, SAMPLES, DIMENSIONS, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(drawn, dim=2)


def gradient_norm(loss: Loss, z: Tensor) -> float:
    """Norm of the gradient of ``loss`` by an embedding, the mean over the embeddings ``z``."""
    z = z.detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rows of the embeddings have length 1")  # r = 1
        (gradient,) = torch.autograd.grad(loss(z), z)
    return float(torch.linalg.vector_norm(gradient, dim=2).mean())


def measure(seeds: int, scales: Sequence[float]) -> list[dict[str, Any]]:
    """A record for every loss and seed: the norm at each scale."""
    records = []
    for seed in range(seeds):
        z = embeddings(seed)
        for name, loss in losses(directions(seed)).items():
            norms = {f"r={r:.2g}": float(f"{gradient_norm(loss, z * r):.6g}") for r in scales}
            records.append({"data": "random", "variant": name, "seed": seed, **norms})
    return records


def slope(near: float, far: float) -> float:
    """Power of r with which the norm changes between NEAR and FAR."""
    return math.log(far / near) / math.log(FAR / NEAR)


def behaviour(power: float) -> str:
    """What a gradient of that power of r does as r falls to 0."""
    if power > 0.5:
        return "vanishes"
    return "grows" if power < -0.5 else "stays"


EXPECTED = {
    "VICReg, squared and pooled": "stays",
    "VICReg, official": "stays",
    "Barlow Twins, no eps": "grows",
    "Barlow Twins, lightly": "grows",
    "sliced Wasserstein": "stays",
    "SIGReg": "vanishes",
    "VISReg": "grows",
    "VISReg, scale alone": "stays",
}


def claims(summary: verdicts.Summary) -> list[dict[str, str]]:
    """Whether each gradient does at collapse what the paper's figure or text says of it."""
    found = []
    for name, expected in EXPECTED.items():
        near, far = (summary["random"][name][f"r={r:.2g}"][0] for r in (NEAR, FAR))
        power = slope(near, far)
        verdict = "holds here" if behaviour(power) == expected else f"no: it {behaviour(power)}"
        text = f"{name}: the gradient {expected} at collapse"
        detail = f"norm {near:.1e} at r = {NEAR:g}, {far:.1e} at {FAR:g}: as r^{power:+.2f}"
        found.append(verdicts.claim(text, "random", verdict, detail))
    return found


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Norm against r, the mean over seeds."""
    canvas = Figure(figsize=(8, 5), layout="constrained")
    axes = canvas.add_subplot()
    summary = verdicts.summarise(runs)["random"]
    for name, norms in summary.items():
        points = sorted((float(key[2:]), mean) for key, (mean, _) in norms.items())
        style = "--" if name.endswith("alone") else "-"
        axes.loglog(*zip(*points, strict=True), style, label=name)
    axes.set(xlabel="length r of the embeddings", ylabel="norm of the gradient")
    axes.set_title(f"V = {VIEWS}, N = {SAMPLES}, D = {DIMENSIONS}, K = {SLICES}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write gradient_norm.json, .csv and .png."""
    settings = common.arguments(__doc__, argv)
    study = common.Study("gradient_norm", "Norm of the gradient at length r", settings)
    runs = measure(settings.seeds, SHOWN if settings.scale == "quick" else SCALES)
    columns = {f"r={r:.2g}": f"r = {r:g}" for r in SHOWN}
    study.finish(runs, columns, claims(verdicts.summarise(runs)))
    draw(runs, settings.out / "gradient_norm.png")


if __name__ == "__main__":
    main()
