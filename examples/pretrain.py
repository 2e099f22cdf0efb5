"""Pretrain a ResNet without labels: VICReg, VISReg, LeJEPA, SimSiam, BYOL, SimCLR, Barlow Twins.

To any of them ``--add`` adds one line of this library::

    python examples/pretrain.py                                        # VICReg on digits, small
    python examples/pretrain.py --loss simsiam --add variance --data fashion-mnist
    python examples/pretrain.py --data path/to/imagenet --batch-size 256 --precision bf16
    torchrun --nproc-per-node=8 examples/pretrain.py --data path/to/imagenet --precision bf16

Over several ranks the batch is divided, and what is computed stays the same. Ctrl-C and SIGTERM
leave a checkpoint of the current step; ``--resume FOLDER`` continues from it, on any number of
ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# OpenMP reads this when torch is imported. Its threads otherwise spin while they wait for each
# other, which on cores shared with another process made a step up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import checkpoint
import command_line
import devices
import networks
import ranks
import report
import settings as options
import training
from checkpoint import CheckpointError
from data import DataError, Images, load
from evaluation import linear_evaluation
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from settings import Settings, SettingsError
from training import Run, TrainingError

BACKBONE = "backbone.pt"
RESULTS = (BACKBONE, "results.json", "curves.png", "linear.json", "tensorboard")
PROBE = {"epochs": 100, "batch_size": 256, "lr": 0.02}  # VICReg's linear evaluation


class Stopped(Exception):
    """Ctrl-C or SIGTERM came, and the last whole step is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


REFUSED = (DataError, CheckpointError, SettingsError, ranks.BatchError)


def load_images(settings: Settings) -> Images:
    """The images of ``settings``, whose views have the sizes that it says."""
    root = Path(settings.root)
    images = load(settings.data, size=settings.stored_size, limit=settings.limit, root=root)
    sizes = {"size": settings.image_size, "local_size": settings.local_size}
    return replace(images, views=replace(images.views, **sizes))


def pretrain(
    settings: Settings, console: Console, saved: Mapping[str, Any] | None = None
) -> report.Outcome | None:
    """Train, from the beginning or from where ``saved`` was; evaluate and export the backbone.

    Returns:
        What came of it, on rank 0; None on the others.

    Raises:
        Stopped: Ctrl-C or SIGTERM came, and the last whole step is saved.
    """
    options.check(settings)
    networks.check(settings.arch)
    devices.check(settings)
    device = devices.place(settings.device)
    images = load_images(settings)
    if len(images.held_out) < 2:
        found = f"{len(images.train)} and {len(images.held_out)} images"
        raise DataError(f"{settings.data}: expected two or more to hold out, got {found}")
    ranks.check(training.batch_size(images, settings))
    make_folder(Path(settings.out))
    with ranks.group(device):
        first = ranks.rank() == 0
        step = saved["step"] if saved else 0
        if first and not saved and (aside := checkpoint.set_aside(Path(settings.out), RESULTS)):
            console.print(f"an earlier run is now in {aside}", soft_wrap=True)
        fabric = devices.new_fabric(settings, Path(settings.out) if first else None, step)
        run = training.new_run(settings, images, fabric)
        if saved:
            run.restore(saved, settings.out)
        with progress(console) as bar:
            task = bar.add_task(report.title(name_of(settings)), total=run.total, loss="")
            bar.update(task, completed=run.step)
            stopped = training.train(run, bar, task, lambda epoch: between_epochs(run, epoch))
        outcome = finish(run) if first and not stopped else None
        ranks.wait()
    if stopped:
        raise Stopped(stopped)
    return outcome


def make_folder(out: Path) -> None:
    """Find out before the training whether its results can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out: expected a folder to write to: {error}") from error
    if not os.access(out, os.W_OK):
        raise SettingsError(f"--out: expected a folder to write to, got {out}, which is read-only")


def name_of(settings: Settings) -> str:
    """The loss, and what was added to it."""
    return "+".join([settings.loss, *settings.add])


def progress(console: Console) -> Progress:
    """A bar for each run."""
    counts = ("{task.completed:.0f}/{task.total:.0f} steps", "loss {task.fields[loss]}")
    columns = ("{task.description:>16}", BarColumn(), *counts, TimeElapsedColumn())
    return Progress(*columns, console=console)


def judge(run: Run) -> report.Outcome:
    """Look at the network on held-out images, on this rank."""
    workers = devices.workers(run.settings, run.images)
    device = run.fabric.device
    return report.evaluate(name_of(run.settings), run.evaluated, run.images, device, workers)


def between_epochs(run: Run, epoch: int) -> bool:
    """Evaluate after every ``eval_every`` epochs but the last; whether it did."""
    every = run.settings.eval_every
    if not every or epoch % every or epoch == run.settings.epochs:
        return False
    if ranks.rank() == 0:
        outcome = judge(run)
        found = {"linear_probe": outcome.accuracy, "knn": outcome.knn}
        found = {name: value for name, value in found.items() if value is not None}
        run.fabric.log_dict(found, run.step)
        run.evaluations.append({"epoch": epoch, **found})
    ranks.wait()
    return True


def finish(run: Run) -> report.Outcome:
    """Evaluate, and write the backbone, the results and the curves."""
    checkpoint.write(run.out / BACKBONE, networks.exported(run.evaluated.backbone))
    outcome = replace(judge(run), seconds=run.seconds, history=run.history)
    seen = run.step * run.batch * run.settings.accumulate
    results = {
        "settings": asdict(run.settings),
        "outcome": asdict(outcome),
        "evaluations": run.evaluations,
        "images_per_second": seen / run.seconds if run.seconds else None,
        "unreadable_images": run.images.unreadable.count(),
    }
    (run.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if outcome.history:
        report.figure([outcome], run.out / "curves.png")
    return outcome


def probe(path: Path, given: Mapping[str, Any], console: Console) -> dict[str, float]:
    """Train a linear classifier on the frozen backbone of a checkpoint.

    ``given`` may name another data set, and the epochs, batch and learning rate of the probe.
    """
    saved = checkpoint.read(path)
    known = set(PROBE) | {"data", "root", "limit", "workers", "device", "precision", "out", "seed"}
    if given.get("batch_size", 2) < 2 * ranks.size():
        raise SettingsError(f"--batch-size: expected 2 for each rank, got {given['batch_size']}")
    if wrong := given.keys() - known:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(wrong))
        raise SettingsError(f"--eval: expected none of {names}: the checkpoint has them")
    settings = Settings(**options.resumed(saved["settings"], {}, path))
    kept = {key: value for key, value in given.items() if key not in PROBE}
    settings = replace(settings, **kept)
    options.check(settings)
    images = load_images(settings)
    with ranks.group(devices.place(settings.device)):
        fabric = devices.new_fabric(settings)
        network = networks.build(settings)
        averaged = "teacher" in saved and settings.loss != "byol"
        state = saved["teacher"] if averaged else saved["network"]
        state = {key.removeprefix("module."): state[key] for key in state}
        checkpoint.restore(path, {"network": state}, {"network": network})
        network.to(fabric.device)
        choices = {key: given.get(key, value) for key, value in PROBE.items()}
        with progress(console) as bar:
            task = bar.add_task("linear probe", total=choices["epochs"], loss="-")
            found = linear_evaluation(
                networks.Features(network),
                images,
                fabric,
                **choices,
                cached=settings.data in options.SMALL_DATA,
                seed=settings.seed,
                workers=devices.workers(settings, images),
                on_epoch=lambda done: bar.update(task, completed=done),
            )
    folder = Path(given.get("out", path if path.is_dir() else path.parent))
    make_folder(folder)
    if ranks.rank() == 0:
        other = "" if settings.data == saved["settings"]["data"] else f"-{Path(settings.data).name}"
        results = {"data": settings.data, **choices, **found}
        (folder / f"linear{other}.json").write_text(json.dumps(results, indent=2) + "\n")
    return found


def begin(given: dict[str, Any], quick: bool, resume: Path | None) -> tuple[Settings, Any]:
    """Settings, and the checkpoint to continue from, if any."""
    if resume is None:
        return Settings(**options.defaults(given, quick)), None
    saved = checkpoint.read(resume)
    folder = resume if resume.is_dir() else resume.parent
    given = {"out": str(folder), **given}
    return Settings(**options.resumed(saved["settings"], given, resume)), saved


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the script as it would end a shell's, where no training defers it."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give back the exit status."""
    with exit_on_sigterm():
        return run_command(argv, Console(quiet=ranks.rank() > 0))


def run_command(argv: Sequence[str] | None, console: Console) -> int:
    """Do what the command line asks; its errors are one line each."""
    out = ""
    try:
        given, asked = command_line.parse(argv, __doc__)
        if asked.eval:
            found = probe(asked.eval, given, console)
            console.print("linear probe: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
            return 0
        settings, saved = begin(given, bool(asked.quick), asked.resume)
        out = settings.out
        outcome = pretrain(settings, console, saved)
    except REFUSED as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        if ranks.rank() == 0:
            print(f"pretrain.py: {stop}: saved; --resume {out} continues", file=sys.stderr)
        return 0 if stop.number == signal.SIGINT else 128 + stop.number
    except KeyboardInterrupt:  # before or after the steps, or a second one
        print("pretrain.py: interrupted", file=sys.stderr)
        return 130
    if ranks.rank() == 0:
        console.print(report.table([outcome], settings.expander.split("-")[-1]))
        console.print(f"checkpoint, backbone, curves and results are in {out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
