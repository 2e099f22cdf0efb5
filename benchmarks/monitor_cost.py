"""``python -m benchmarks.monitor_cost``: what ``EmbeddingMonitor`` adds to a training step.

Two steps on this machine's CPU, a ResNet-18 and a single linear layer, with the monitor in two of
three, so that both kinds see the same machine. The share is the time inside ``monitor.update`` over
that of the steps around it; the difference of whole steps is below their scatter. Prints a
table; ``--out FILE`` writes the figures.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import measure
from vicreg_losses import VICRegLoss
from vicreg_losses.diagnostics import EmbeddingMonitor


def resnet(batch: int = 64) -> tuple[nn.Module, Tensor]:
    """A ResNet-18 with a projector 512-2048-2048, and images."""
    from torchvision.models import resnet18

    backbone = resnet18(num_classes=1)
    backbone.fc = nn.Identity()
    hidden = [nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 2048)]
    return nn.Sequential(backbone, *hidden), torch.randn(batch, 3, 64, 64)


def linear(batch: int = 256) -> tuple[nn.Module, Tensor]:
    """The other end: one layer of 256 dimensions."""
    return nn.Linear(256, 256), torch.randn(batch, 256)


# Name, network with its input, and how many steps have the monitor.
STEPS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int]] = {
    "ResNet-18, 64 images of 64 x 64, projector 512-2048-2048": (resnet, 200),
    "one linear layer, 256 samples of 256 dimensions": (linear, 2000),
}


def training_step(
    model: nn.Module, x: Tensor, loss: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Tensor]:
    """Two views forward, the loss backward, the optimizer; returns the embeddings."""
    views = [model(x + 0.1 * torch.randn_like(x)) for _ in range(2)]
    optimizer.zero_grad()
    loss(*views).backward()
    optimizer.step()
    return views


def cost(network: tuple[nn.Module, Tensor], steps: int, every: int = 50) -> dict[str, Any]:
    """Seconds of the steps and of the monitor in them.

    Args:
        network: a model and its input.
        steps: how many steps have the monitor; half as many more do not.
        every: steps from one report to the next.
    """
    model, x = network
    loss, optimizer = VICRegLoss(), torch.optim.SGD(model.parameters(), 1e-4)
    monitor = EmbeddingMonitor(every=every)
    training_step(model, x, loss, optimizer)
    plain: list[float] = []
    watched: list[float] = []
    inside: list[float] = []
    while len(watched) < steps:
        begin = time.perf_counter()
        views = training_step(model, x, loss, optimizer)
        between = time.perf_counter()
        if len(watched) > 2 * len(plain):
            plain.append(between - begin)
            continue
        monitor.update(*views)
        end = time.perf_counter()
        watched.append(end - begin)
        inside.append(end - between)
    reports = inside[every - 1 :: every]
    return {
        "every": every,
        "samples": monitor.samples,
        "dimensions": views[0].shape[1],
        "steps_with": len(watched),
        "steps_without": len(plain),
        "median_step_without_ms": 1e3 * statistics.median(plain),
        "median_step_with_ms": 1e3 * statistics.median(watched),
        "report_ms": 1e3 * statistics.median(reports),
        "counting_us": 1e6 * statistics.median(inside),
        "monitor_s": sum(inside),
        "steps_s": sum(watched) - sum(inside),
        "share_percent": 100 * sum(inside) / (sum(watched) - sum(inside)),
    }


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine = record["machine"]
    head = (
        f"`python -m benchmarks.monitor_cost`: {machine['cpu']}, {machine['threads']} thread(s), "
        f"torch {machine['torch']}.\n\n"
        "| step | without | report, every 50 | other steps | share of all steps |\n"
        "|---|---|---|---|---|\n"
    )
    rows = [
        f"| {name} | {r['median_step_without_ms']:.3g} ms | {r['report_ms']:.3g} ms "
        f"| {r['counting_us']:.2g} us | {r['share_percent']:.2g} % |\n"
        for name, r in record["steps"].items()
    ]
    return head + "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor_cost", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=None, help="PyTorch's CPU threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    steps = {name: cost(make(), count) for name, (make, count) in STEPS.items()}
    record = {"machine": measure.machine(), "steps": steps}
    Console().print(table(record), markup=False, soft_wrap=True)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
