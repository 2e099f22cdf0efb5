"""Pretrain a small ResNet without labels, three ways: invariance alone, VICReg and VISReg.

Invariance alone asks only that two views of an image get equal embeddings, so it collapses; the
regularizers of ``vicreg_losses`` prevent that. Run it on the embedded digits, or on your images::

    python examples/pretrain.py
    python examples/pretrain.py --data path/to/imagefolder --arch resnet50 --epochs 100
    torchrun --nproc-per-node=2 examples/pretrain.py

Over several ranks the batch is divided, and what is computed stays the same. Ctrl-C and SIGTERM
leave a checkpoint of the current step; ``--resume runs/demo`` continues from it, on any number of
ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

# OpenMP reads this when torch is imported. Its threads otherwise spin while they wait for each
# other, which on cores shared with another process made a step up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ranks
import report
import torch
from checkpoint import CheckpointError, Run, Settings, load_checkpoints
from data import Augmentation, DataError, Images, load_digits, load_folder, shuffled_batches
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet50
from torchvision.models.resnet import BasicBlock

from vicreg_losses import InvarianceLoss, VICRegLoss, VISRegLoss, distributed

OBJECTIVES: dict[str, Callable[[], nn.Module]] = {
    "invariance": InvarianceLoss,
    "vicreg": VICRegLoss,
    "visreg": lambda: VISRegLoss(weight=0.5, num_slices=256),
}
ARCHITECTURES: dict[str, Callable[[], ResNet]] = {
    "resnet-tiny": lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
    "resnet18": resnet18,
    "resnet50": resnet50,
}
QUICK = {"epochs": 2, "batch_size": 64, "limit": 1000}
SEED_STRIDE = 1_000_003  # keeps the generators of different seeds apart


def build_network(settings: Settings, channels: int) -> nn.Sequential:
    """A torchvision ResNet, and the projector whose output the objectives see."""
    torch.manual_seed(settings.seed)  # every objective starts from the same weights
    backbone = ARCHITECTURES[settings.arch]()
    kernel = 3 if settings.image_size <= 64 else 7  # 7x7 is too coarse for the strokes of a digit
    backbone.conv1 = nn.Conv2d(channels, 64, kernel, stride=2, padding=kernel // 2, bias=False)
    width, features = settings.width, backbone.fc.in_features
    backbone.fc = nn.Identity()
    projector = nn.Sequential(
        nn.Linear(features, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width),
    )
    network = nn.Sequential(backbone, projector)
    return network.to(settings.device, memory_format=torch.channels_last)


def new_run(name: str, settings: Settings, channels: int) -> Run:
    """An objective with a fresh network and optimiser."""
    network = build_network(settings, channels)
    model = ranks.parallel(network, settings.device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=1e-4)
    return Run(name, network, model, OBJECTIVES[name]().to(settings.device), optimiser)


def batch_size(images: Images, settings: Settings) -> int:
    """Images per step, on all ranks together."""
    return min(settings.batch_size, len(images.train))


def train_step(
    run: Run, images: Tensor, augment: Augmentation, settings: Settings
) -> dict[str, Tensor]:
    """Take one optimiser step; give back the loss, its terms and this rank's embeddings."""
    # Seeded by the step, so a resumed run draws the views that it would have drawn.
    generator = torch.Generator(settings.device)
    generator.manual_seed(settings.seed * SEED_STRIDE + run.step)
    images = images.to(settings.device, non_blocking=True)
    views = torch.cat([augment(images, generator) for _ in range(2)])
    with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.amp):
        z_a, z_b = run.model(views).chunk(2)

    loss, terms = measure(run.objective, z_a, z_b)  # or just: loss = objective(z_a, z_b)

    run.optimiser.zero_grad()
    loss.backward()
    run.optimiser.step()
    return {"total": loss.detach(), **terms, "embeddings": z_a.detach()}


def measure(objective: nn.Module, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and, to log them, its terms, in one pass."""
    if isinstance(objective, InvarianceLoss):
        return objective(z_a, z_b), {}
    terms = objective.terms(z_a, z_b)
    return objective.total(terms), {name: term.detach() for name, term in terms._asdict().items()}


def train(run: Run, images: Images, settings: Settings, bar: Progress) -> None:
    """Train from ``run.step`` to the last epoch, saving after each epoch and upon Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the checkpoint holds the last whole step.
    """
    checkpoint = settings.out / f"checkpoint-{run.name}.pt"
    batch = batch_size(images, settings)
    per_epoch = len(images.train) // batch
    total = per_epoch * settings.epochs
    task = bar.add_task(report.TITLES[run.name], total=total, completed=run.step, loss="")
    before, started = run.seconds, time.perf_counter()
    run.network.train()
    with deferred_interrupt() as interrupted:
        while run.step < total:
            epoch, first = divmod(run.step, per_epoch)
            seed, part = settings.seed * SEED_STRIDE + epoch, ranks.part(batch)
            for pixels, _ in shuffled_batches(
                images.train, batch, seed, first, settings.workers, part
            ):
                set_learning_rate(run, settings.lr, total)
                logged = train_step(run, pixels, images.augment, settings)
                if run.step % max(1, total // 64) == 0 or run.step == total - 1:
                    run.history.append(record(logged, run.step / per_epoch))
                run.step += 1
                run.seconds = before + time.perf_counter() - started
                bar.update(task, completed=run.step, loss=f"{run.history[-1]['total']:.4g}")
                if interrupted():
                    break
            if ranks.rank() == 0:
                run.save(checkpoint, settings)
            if interrupted():
                raise KeyboardInterrupt(f"; --resume {settings.out} continues")


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Make Ctrl-C and SIGTERM a flag to read between two steps; a second Ctrl-C stops at once.

    The ranks read the flag together, as often as each other, and all get the same answer.
    """
    asked = False

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, ask) for number in signals]
    try:
        yield lambda: ranks.agree(asked)
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def set_learning_rate(run: Run, peak: float, total: int) -> None:
    """Linear warm-up over a tenth of the steps, then a cosine to zero."""
    warmup = max(1, total // 10)
    done = max(0.0, (run.step - warmup) / max(1, total - warmup))
    factor = min((run.step + 1) / warmup, (1 + math.cos(math.pi * done)) / 2)
    for group in run.optimiser.param_groups:
        group["lr"] = peak * factor


def record(logged: Mapping[str, Tensor], epoch: float) -> dict[str, float]:
    """One point of every curve, of the batch of all ranks."""
    scalars = {key: float(value) for key, value in logged.items() if key != "embeddings"}
    smallest_std, effective_rank = report.health(distributed.all_gather(logged["embeddings"]))
    health = {"smallest_std": smallest_std, "effective_rank": effective_rank}
    return {"epoch": epoch, **scalars, **health}


def evaluate_untrained(images: Images, settings: Settings) -> report.Outcome:
    """Judge the starting weights; batch norm sees images first, as in any trained network."""
    network = build_network(settings, images.channels).train()
    batch = batch_size(images, settings)
    with torch.inference_mode():
        for pixels, _ in islice(shuffled_batches(images.train, batch, 0, 0, settings.workers), 16):
            network(pixels.to(settings.device) / 255)
    return report.evaluate(report.UNTRAINED, network, images, settings)


def pretrain(
    settings: Settings, checkpoints: Mapping[str, Any], console: Console
) -> list[report.Outcome]:
    """Train and evaluate every objective, after a look at the untrained network."""
    if settings.data is None:
        images = load_digits(settings.image_size, settings.limit)
    else:
        images = load_folder(settings.data, settings.image_size, settings.limit, settings.workers)
    ranks.check(batch_size(images, settings))
    with ranks.group(settings.device):
        return train_all(images, settings, checkpoints, console)


def train_all(
    images: Images, settings: Settings, checkpoints: Mapping[str, Any], console: Console
) -> list[report.Outcome]:
    """Train every objective; rank 0 evaluates, as the others wait, and has the outcomes."""
    outcomes = []
    first = ranks.rank() == 0
    if first:
        settings.out.mkdir(parents=True, exist_ok=True)
        outcomes.append(evaluate_untrained(images, settings))
    ranks.agree(False)
    counts = ("{task.completed}/{task.total} steps", "loss {task.fields[loss]}")
    columns = ("{task.description:>16}", BarColumn(), *counts, TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        for name in settings.objectives:
            run = new_run(name, settings, images.channels)
            if name in checkpoints:
                run.restore(checkpoints[name])
            train(run, images, settings, bar)
            if first:
                outcome = report.evaluate(name, run.network, images, settings)
                outcomes.append(replace(outcome, seconds=run.seconds, history=run.history))
            ranks.agree(False)
    return outcomes


def parse(argv: Sequence[str] | None) -> tuple[Settings, dict[str, Any]]:
    """Settings, and checkpoints to continue; flags given win over a checkpoint's and --quick's."""
    parser = argument_parser()
    settings = parser.parse_args(argv)
    checkpoints = load_checkpoints(settings.resume) if settings.resume else {}
    if checkpoints:
        saved = next(iter(checkpoints.values()))["settings"]
        if settings.resume.is_file():
            saved = {**saved, "objectives": list(checkpoints)}
        folder = settings.resume if settings.resume.is_dir() else settings.resume.parent
        parser.set_defaults(**saved, out=folder)
    elif settings.quick:
        parser.set_defaults(**QUICK)
    settings = parser.parse_args(argv)
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.device = ranks.place(torch.device(settings.device))
    if settings.image_size is None:
        settings.image_size = 224 if settings.data else 28
    if settings.workers is None:
        cores = max(1, (os.cpu_count() or 1) // ranks.neighbours())
        settings.workers = cores if settings.data else 0
    return settings, checkpoints


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder with one sub-folder of images per class; None: digits")
    add("--arch", choices=ARCHITECTURES, default="resnet-tiny", help="torchvision ResNet")
    add("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="what to run")
    add("--epochs", type=positive, default=6, help="passes over the images, for each objective")
    add("--batch-size", type=positive, default=256, help="images per step, on all ranks")
    add("--image-size", type=positive, help="height and width; None: 28 for digits, else 224")
    add("--width", type=positive, default=256, help="dimensions of the embeddings")
    add("--lr", type=float, default=4e-3, help="highest learning rate of AdamW")
    add("--limit", type=positive, help="use no more images than this")
    add("--seed", type=int, default=0, help="of weights, order and views")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add(
        "--workers",
        type=int,
        help="loader processes of each rank; None: 0 for digits, else as many as there are cores",
    )
    add("--amp", action="store_true", help="run the network in bfloat16")
    add("--out", type=Path, default=Path("runs/demo"), help="for curves, results, checkpoints")
    add("--quick", action="store_true", help="a short form, which only shows that all of it runs")
    add("--resume", type=Path, help="checkpoint, or folder of them, to continue as it was set up")
    return parser


def positive(text: str) -> int:
    """An argument of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give back the exit status."""
    console = Console(quiet=ranks.rank() > 0)
    try:
        settings, checkpoints = parse(argv)
        outcomes = pretrain(settings, checkpoints, console)
    except (DataError, CheckpointError, ranks.BatchError) as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if ranks.rank() == 0:
            print(f"pretrain.py: interrupted{stop}", file=sys.stderr)
        return 130
    if ranks.rank() > 0:
        return 0
    console.print(report.table(outcomes, settings.width))
    report.figure(outcomes, settings.out / "curves.png")
    results = {"settings": vars(settings), "outcomes": [asdict(row) for row in outcomes]}
    (settings.out / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    console.print(f"curves.png, results.json and checkpoints are in {settings.out}", soft_wrap=True)
    wrong = None if settings.quick or settings.data else report.complaint(outcomes)
    if wrong:
        print(f"pretrain.py: error: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
