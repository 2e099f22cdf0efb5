"""Watch a collapse, and what prevents it: three trainings on the digits, and a verdict.

Invariance alone asks only that two views of an image get equal embeddings, so it collapses; VICReg
and VISReg do not. ::

    python examples/demo.py            # one to three minutes on two free cores
    python examples/demo.py --quick    # shows only that all of it runs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pretrain  # before torch: it sets what OpenMP reads

# isort: split
import networks
import report
import settings as options
import torch
from data import Images
from rich.console import Console
from settings import Settings

LOSSES = ("invariance", "vicreg", "visreg")
SHOWN = 16 * 256


def untrained(settings: Settings) -> report.Outcome:
    """Judge the starting weights; batch norm sees images first, as in any trained network."""
    images = pretrain.load_images(settings)
    network = networks.build(settings).train()
    show(network, images)
    return report.evaluate(report.UNTRAINED, network, images, torch.device("cpu"), 0)


@torch.inference_mode()
def show(network: networks.Network, images: Images) -> None:
    """Let batch norm's running statistics become those of the images."""
    for pixels, _ in report.ordered_batches(images.train, report.BATCH, 0):
        network([images.views.plain(pixels)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give back the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="short, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, views and slices")
    asked = parser.parse_args(argv)
    console, outcomes = Console(), []
    try:
        for loss in LOSSES:
            given = {"loss": loss, "seed": asked.seed, "out": str(asked.out / loss)}
            settings = Settings(**options.defaults({**given, "device": "cpu"}, asked.quick))
            if not outcomes:
                outcomes.append(untrained(settings))
            outcomes.append(pretrain.pretrain(settings, console))
    except pretrain.Stopped as stop:
        print(f"demo.py: {stop}", file=sys.stderr)
        return 128 + stop.number
    except pretrain.REFUSED as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    console.print(report.table(outcomes, settings.expander.split("-")[-1]))
    report.figure(outcomes, asked.out / "curves.png")
    results = [asdict(outcome) for outcome in outcomes]
    (asked.out / "results.json").write_text(json.dumps({"outcomes": results}, indent=2) + "\n")
    console.print(f"curves.png, results.json and the runs are in {asked.out}", soft_wrap=True)
    wrong = None if asked.quick else report.complaint(outcomes)
    if wrong:
        print(f"demo.py: error: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
