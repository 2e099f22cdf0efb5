"""Does the variance term prevent collapse? SimSiam and BYOL with a part left out, with and without.

The claim of VICReg (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906): the variance term, added to
methods that avoid collapse by architecture, stabilises them where that architecture is missing.

The term is added in two places: to the embeddings z, and to their directions ``D^1/2 z / |z|``,
which is what the cosine sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import charts
import choices
import common
import trainer
import verdicts
from choices import BYOL, SIMSIAM, Method, Siamese
from common import Job, Metrics

UNTRAINED = "untrained"
COLLAPSED = 0.1
COMPLETE = ("SimSiam", "BYOL")
BASES = {
    "SimSiam": SIMSIAM,
    "SimSiam, no stop-gradient": replace(SIMSIAM, stop_gradient=False),
    # Without a predictor and its EMA, BYOL is the same.
    "SimSiam, no predictor": replace(SIMSIAM, predictor=None),
    "BYOL": BYOL,
    "BYOL, no EMA": replace(BYOL, momentum=False),
}
PLACES = {" + variance of z": "z", " + variance of z/|z|": "direction"}


def methods() -> dict[str, Method]:
    """The variants: BYOL, which does not collapse, with the term in one place only."""
    found = {}
    for name, method in BASES.items():
        found[name] = method
        for suffix, place in PLACES.items():
            if place == "direction" or method.predictor != "byol":
                found[name + suffix] = replace(method, variance=place)
    return found


METHODS = methods()


def train(job: Job) -> Metrics:
    """Train one network and measure its embeddings and features."""
    scale, data = job.size, trainer.load(job.data, job.size)
    network = trainer.build(scale, job.seed)
    if job.variant == UNTRAINED:
        return trainer.measures(network, data)
    objective = Siamese(METHODS[job.variant], network, scale)
    lr = choices.RATES["siamese"]
    spread = trainer.fit(network, objective, data, scale=scale, seed=job.seed, lr=lr)
    return {"batch_std": spread, **trainer.measures(network, data)}


def collapsed(run: dict[str, Any]) -> bool:
    """Whether the embeddings of a run point in one direction, or vary along one only."""
    return run["unit_spread"] < COLLAPSED or run["rank"] < 2


def claims(runs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of each method and place: is collapse prevented, and does the term change the probe?"""
    found = []
    for data in dict.fromkeys(run["data"] for run in runs):
        for variant, method in METHODS.items():
            if method.variance is None:
                continue
            name = variant.partition(" + ")[0]
            if name not in COMPLETE:
                found.append(prevented(runs, data, name, variant))
            text = f"{variant}: the term raises the probe"
            found.append(verdicts.compared(runs, data, "probe", (variant, name), text))
    return found


def prevented(runs: Sequence[dict[str, Any]], data: str, name: str, variant: str) -> dict[str, str]:
    """Whether ``name`` collapses, and ``variant``, which has the term, does not, at every seed."""
    before, after = (
        [run for run in runs if (run["data"], run["variant"]) == (data, one)]
        for one in (name, variant)
    )
    if not any(map(collapsed, before)):
        verdict = "nothing to prevent: it does not collapse here"
    elif not any(map(collapsed, after)):
        verdict = "holds here" if all(map(collapsed, before)) else "holds where it collapses"
    else:
        verdict = "not prevented"
    counts = f"{sum(map(collapsed, before))} of {len(before)} seeds collapse without the term"
    detail = f"{counts}, {sum(map(collapsed, after))} with it"
    return verdicts.claim(f"{variant}: the term prevents collapse", data, verdict, detail)


def draw(summary: verdicts.Summary, path: Path) -> None:
    """Probe, spread and rank, with and without the term."""
    metrics = {"probe": "probe accuracy", "unit_spread": "spread of z / |z|", "rank": "rank of z"}
    charts.bars(summary, metrics, path, faint=lambda name: " + " not in name)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all variants, print the tables, and write collapse.json, .csv and .png."""
    settings = common.arguments(__doc__, argv)
    study = common.Study("collapse", "Siamese methods with a part left out", settings)
    variants = [UNTRAINED, *METHODS]
    columns = {
        "probe": "probe",
        "knn": "k-NN",
        "unit_spread": "spread of z/|z|",
        "rank": "rank of z",
        "batch_std": "std of z",
    }
    study.conduct(train, variants, columns, claims, draw)


if __name__ == "__main__":
    main()
