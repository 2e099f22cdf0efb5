"""``python -m benchmarks.training``: what the losses cost in a training step of a ResNet.

A step is forward, backward and optimiser of a torchvision ResNet and its expander on synthetic
images that are on the device already, two views of each. It is run in turns with no loss but a mean
of squares (the floor), with the published formula by autograd, and with ours, for VICReg, VISReg,
SimSiam, and SimSiam with the variance added. On a GPU the network is channels-last, under bfloat16
autocast; the losses are computed in float32. Nothing is reported unless ours agree with the
published formulas in float64 on the network's embeddings.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

# OpenMP reads this when torch is imported. Threads that spin while they wait take the core from
# whoever else has work, on shared cores from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torchvision
from torch import Tensor

import vicreg_losses as vl
from benchmarks import measure
from benchmarks.gpu_measure import MIB, Bench, Row, print_table, run_process, write_json
from benchmarks.training_cases import (
    ARCHITECTURES,
    TINY,
    Loss,
    Network,
    Outputs,
    Setup,
    check,
    floor,
    objectives,
)

DEFAULTS = {
    "cuda": {
        "arch": "resnet50", "batch_size": 256, "image_size": 224, "width": 8192, "slices": 4096,
    },
    "cpu": {"arch": TINY, "batch_size": 128, "image_size": 32, "width": 512, "slices": 512},
}  # fmt: skip
Call = Callable[[], None]


class Trainer:
    """A network, its optimiser and a batch, with which every loss takes its steps.

    The learning rate is zero: the work is the same, and so are the embeddings at every step.
    """

    def __init__(self, setup: Setup, predicts: bool) -> None:
        torch.manual_seed(0)
        cuda = setup.device == "cuda"
        layout = {"memory_format": torch.channels_last if cuda else torch.contiguous_format}
        self.network = Network(setup, predicts).to(setup.device, **layout)
        self.optimiser = torch.optim.SGD(self.network.parameters(), lr=0.0, momentum=0.9)
        shape = (2 * setup.batch_size, 3, setup.image_size, setup.image_size)
        self.images = torch.randn(shape, device=setup.device).to(**layout)
        self.autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    def outputs(self) -> Outputs:
        """Of the batch."""
        with self.autocast:
            return self.network(self.images)

    def step(self, loss: Callable[[Outputs], Tensor]) -> None:
        """A training step."""
        loss(self.outputs()).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def in_turns(calls: dict[str, Call], seconds: float, sync: Call) -> dict[str, list[float]]:
    """Milliseconds of every call, in turns for about ``seconds``, three times or more."""

    def timed(call: Call, count: int) -> float:
        sync()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        sync()
        return 1e3 * (time.perf_counter() - begin) / count

    for call in calls.values():
        timed(call, 1)
    once = {name: timed(call, 1) for name, call in calls.items()}
    counts = {name: max(1, int(10 / once[name])) for name in calls}  # what is short, more often
    round_ms = sum(once[name] * count for name, count in counts.items())
    rounds = min(100, max(3, int(1e3 * seconds / round_ms)))
    turns = [
        {name: timed(call, counts[name]) for name, call in calls.items()} for _ in range(rounds)
    ]
    return {name: [turn[name] for turn in turns] for name in calls}


def measure_network(setup: Setup, predicts: bool) -> list[Row]:
    """A row for the floor of this network, then one for each objective and side."""
    bench, trainer = Bench(setup.device == "cpu"), Trainer(setup, predicts)
    chosen = {one.name: one for one in objectives(setup)[predicts]}
    with torch.no_grad():
        out = trainer.outputs()
    errors = {name: check(one, out, setup.slices) for name, one in chosen.items()}
    steps: dict[str, Call] = {"floor": stepping(trainer, [floor])}
    alone: dict[str, Call] = {}
    for name, one in chosen.items():
        base = [chosen[one.on_top_of].published] if one.on_top_of else []
        for side, loss in one.sides().items():
            steps[f"{name}, {side}"] = stepping(trainer, [*base, loss])
            alone[f"{name}, {side}"] = standing(loss, out)
    step_ms = in_turns(steps, 0.4 * setup.seconds, bench.sync)
    alone_ms = in_turns(alone, 0.1 * setup.seconds, bench.sync)

    def row_of(name: str, side: str, key: str) -> Row:
        row = {"objective": name, "loss": side, "predictor": predicts}
        row |= throughput(setup.batch_size, step_ms[key])
        return row | {"peak_mib": bench.peak_mib(steps[key])}

    rows = [row_of("floor", "", "floor")]
    for name, one in chosen.items():
        base_ms = step_ms[f"{one.on_top_of}, published" if one.on_top_of else "floor"]
        for side in one.sides():
            key = f"{name}, {side}"
            row = row_of(name, side, key) | costs(step_ms[key], base_ms, alone_ms[key])
            row |= {"on_top_of": one.on_top_of or "floor", **errors[name][side]}
            row |= {"alone_peak_mib": bench.peak_mib(alone[key])}
            if side == "ours":
                pairs = zip(alone_ms[f"{name}, published"], alone_ms[key], strict=True)
                row["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
            rows.append(row)
    return rows


def stepping(trainer: Trainer, losses: Sequence[Loss]) -> Call:
    """A training step with the sum of ``losses``."""
    return lambda: trainer.step(lambda out: sum(loss(out, None) for loss in losses))


def standing(loss: Loss, out: Outputs) -> Call:
    """Forward and backward of the loss alone, from the same embeddings."""
    leaves = Outputs(*(x if x is None else x.detach().requires_grad_() for x in out))

    def call() -> None:
        loss(leaves, None).backward()
        for leaf in leaves:
            if leaf is not None:
                leaf.grad = None

    return call


def throughput(batch_size: int, step_ms: list[float]) -> Row:
    """Of whole steps; an image is two views."""
    median = statistics.median(step_ms)
    return {"images_per_second": 1e3 * batch_size / median, "step_ms": median, "runs": len(step_ms)}


def costs(step_ms: list[float], base_ms: list[float], alone_ms: list[float]) -> Row:
    """Of the loss: its share of the step, as a difference and by its time alone."""
    pairs = zip(step_ms, base_ms, strict=True)
    return {
        "share_of_step": statistics.median((step - base) / step for step, base in pairs),
        "alone_ms": statistics.median(alone_ms),
        "alone_share": statistics.median(alone_ms) / statistics.median(step_ms),
    }


def machine(setup: Setup) -> Row:
    """What the figures depend on."""

    def git(*command: str) -> str | None:
        code, text = run_process(["git", *command], 10) if shutil.which("git") else (None, "")
        return text.strip() if code == 0 else None

    changes = git("status", "--porcelain")
    row: Row = {
        **measure.machine(),
        "torchvision": torchvision.__version__,
        "vicreg_losses": vl.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "precision": "bfloat16 autocast" if setup.device == "cuda" else "float32",
    }
    if setup.device == "cuda":
        chip = torch.cuda.get_device_properties(0)
        row |= {"gpu": chip.name, "memory_mib": chip.total_memory // MIB}
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return row


def show(rows: Sequence[Row], setup: Setup) -> None:
    """Print the table."""
    cells = [
        [
            f"(mean of squares{' of p' * row['predictor']})"
            if not row["loss"]
            else row["objective"],
            row["loss"],
            row["images_per_second"],
            row["step_ms"],
            percent(row.get("share_of_step")),
            row["peak_mib"],
            row.get("alone_ms"),
            percent(row.get("alone_share")),
            row.get("alone_peak_mib"),
            row.get("ratio"),
        ]
        for row in rows
    ]
    of_step = ("images/s", "step ms", "loss's share", "peak MiB")
    of_loss = ("loss alone ms", "of step", "peak MiB", "published / ours")
    title = (
        f"{setup.arch}, {setup.batch_size} images of {setup.image_size} px in two views, "
        f"width {setup.width}, {setup.slices} slices, {setup.device}"
    )
    print_table(title, ("objective", "loss", *of_step, *of_loss), cells)


def percent(share: float | None) -> str | None:
    """Of a share; noise makes some negative. None where there is none."""
    return None if share is None else f"{100 * share:.1f} %"


def parse(arguments: Sequence[str] | None) -> tuple[Setup, Path | None, argparse.ArgumentParser]:
    """The setup, its defaults by the device, and the folder of the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer runs")
    add("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    add("--arch", choices=ARCHITECTURES, help=f"by default resnet50; {TINY} on a CPU")
    add(
        "--batch-size", type=int, help="images in a step; by default 256; 128 on a CPU, 64 if quick"
    )
    add("--image-size", type=int, help="by default 224, 32 on a CPU")
    add("--width", type=int, help="of the expander; by default 8192, 512 on a CPU")
    add("--slices", type=int, help="of VISReg; by default 4096, 512 on a CPU")
    add("--impl", default="auto", choices=("auto", "torch", "triton"), help="of our losses")
    add("--seconds", type=float, help="for all steps; by default 40, 8 if quick")
    add("--out", type=Path, help="write training.json to this folder")
    given = vars(parser.parse_args(arguments))
    out, quick = given.pop("out"), given.pop("quick")
    if given["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected one that this machine has, got cuda")
    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and given["impl"] == "triton":
        parser.error("--impl: expected auto or torch on a CPU, got triton")
    defaults = {**DEFAULTS[device], "device": device, "seconds": 8.0 if quick else 40.0}
    if quick and device == "cpu":
        defaults["batch_size"] = 64
    chosen = {key: defaults[key] if value is None else value for key, value in given.items()}
    for name, least in {"batch_size": 2, "image_size": 32, "width": 2, "slices": 1}.items():
        if chosen[name] < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: expected {least} or more, got {chosen[name]}")
    return Setup(**chosen), out, parser


def main(arguments: Sequence[str] | None = None) -> None:
    setup, out, parser = parse(arguments)
    torch.backends.cudnn.benchmark = setup.device == "cuda"
    try:
        rows = [row for predicts in (False, True) for row in measure_network(setup, predicts)]
    except torch.OutOfMemoryError:
        parser.error(f"--batch-size: expected one that fits in memory, got {setup.batch_size}")
    found = machine(setup)
    show(rows, setup)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        record = {"machine": found, "setup": dataclasses.asdict(setup), "rows": rows}
        write_json(out / "training.json", record)


if __name__ == "__main__":
    main()
