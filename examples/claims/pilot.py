"""The learning rate of each objective: one grid for all, on a seed that no other script uses.

The best mean probe accuracy over the data sets goes into ``choices.RATES``, by hand. SimSiam and
BYOL share a rate. Coefficients are the published ones and are not searched.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import choices
import common
import trainer
from common import Job, Metrics

SEED = 100
RATES = (3e-3, 1e-2, 3e-2)
SIAMESE = {"simsiam": choices.SIMSIAM, "byol": choices.BYOL}
JOINT = {"vicreg": choices.vicreg, "visreg": choices.visreg, "lejepa": choices.lejepa}


def train(job: Job) -> Metrics:
    """Train one network of the grid; the variant is "objective rate"."""
    name, rate = job.variant.split()
    scale, data = job.size, trainer.load(job.data, job.size)
    network = trainer.build(scale, job.seed)
    if name in SIAMESE:
        objective = choices.Siamese(SIAMESE[name], network, scale)
    else:
        objective = JOINT[name](scale, job.seed)
    trainer.fit(network, objective, data, scale=scale, seed=job.seed, lr=float(rate))
    return trainer.measures(network, data)


def best(runs: common.Runs) -> dict[str, float]:
    """The rate of the best mean probe of each objective; of SimSiam and BYOL together."""
    probes: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        name, rate = run["variant"].split()
        name = "siamese" if name in SIAMESE else name
        probes.setdefault((name, float(rate)), []).append(run["probe"])
    means = {key: statistics.fmean(values) for key, values in probes.items()}
    names = dict.fromkeys(name for name, _ in means)
    return {name: max(RATES, key=lambda rate, n=name: means[n, rate]) for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """Train the grid, print what is best, and write pilot.json and .csv."""
    settings = common.arguments(__doc__, argv)
    settings.seeds = 1
    study = common.Study("pilot", f"Pilot on seed {SEED}", settings)
    variants = [f"{name} {rate:g}" for name in (*JOINT, *SIAMESE) for rate in RATES]
    runs = common.run(train, study.jobs(variants, first_seed=SEED), settings.workers)
    columns = {"probe": "probe", "knn": "k-NN", "unit_spread": "spread of z/|z|"}
    chosen = [
        {"claim": f"{name}: the best rate", "data": "mean", "verdict": f"{rate:g}", "detail": ""}
        for name, rate in best(runs).items()
    ]
    study.finish(runs, columns, chosen)


if __name__ == "__main__":
    main()
