"""The example over two ranks on CPUs: the losses of one, a batch divided, and how all end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import NEEDED

pytestmark = list(NEEDED)
pytestmark.append(
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="torch.distributed has no gloo",
    )
)
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TINY = ("--device", "cpu", "--limit", 200, "--expander", "16-16")
# SGD, as Adam would not show a gradient W times too large.
SGD = ("--optimizer", "sgd", "--lr", 1e-2, "--warmup-epochs", 0)
EIGHT_STEPS = (*TINY, *SGD, "--batch-size", 40, "--epochs", 2, "--log-every", 1)
LOSSES = ("vicreg", "visreg", "lejepa", "simsiam", "byol")
PEERS = ("simclr", "barlow") if find_spec("lightly") else ()
Curves = dict[str, list[float]]
Launch = Callable[..., subprocess.Popen[str]]


class Nano(nn.Sequential):
    """The parts of a ResNet that the script uses, and hardly more."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(3, 16, 3, stride=2, bias=False),
                norm1=nn.BatchNorm2d(16),
                relu=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(16, 32, 3, stride=2, bias=False),
                norm2=nn.BatchNorm2d(32),
                relu2=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(32, 1),
            )
        )


def load() -> ModuleType:
    """The script as a module, with a network that is small enough for tests, in float64.

    In float32 a training makes differences of one in 100 from those of one in 1e7.
    """
    sys.path.insert(0, str(EXAMPLES))
    module = import_module("pretrain")
    networks = import_module("networks")
    build = networks.build

    def in_double(settings: Any) -> nn.Module:
        network = build(settings).double()
        for part in (network.backbone, network.expander):
            part.register_forward_pre_hook(lambda _, given: given[0].double())
        return network

    networks.build_backbone = lambda arch, image_size: Nano()
    networks.build = in_double
    import_module("report").figure = lambda outcomes, path: None
    return module


def main(arguments: list[str]) -> int:
    """What a rank of the tests runs: the script for each of some losses; it may be made to fail."""
    module, training, ranks = load(), import_module("training"), import_module("ranks")
    train_step = training.train_step

    def step(run: Any, batches: Any) -> Any:
        if run.step == 2 and os.environ.get("FAILING_RANK") == os.environ["RANK"]:
            raise RuntimeError("of one rank")
        return train_step(run, batches)

    training.train_step = step
    if "LOSSES" not in os.environ:
        return module.main(arguments)
    out = os.environ["OUT"]
    with ranks.group(torch.device("cpu")):
        ranks.group = nullcontext
        losses = os.environ["LOSSES"].split()
        return max(module.main([*arguments, *each(loss, out)]) for loss in losses)


def each(loss: str, out: str | Path) -> list[str]:
    """Arguments of a loss; the added terms take part in one of them."""
    more = ["--add", "variance", "covariance", "sketch"] if loss == "simsiam" else []
    return ["--loss", loss, "--out", f"{out}/{loss}", *more]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    names = ("networks", "pretrain", "report", "training")
    kept = {name: import_module(name).__dict__.copy() for name in names}
    yield load()
    sys.path.remove(str(EXAMPLES))
    for name in names:
        import_module(name).__dict__.update(kept[name])


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts Python with arguments, from the source tree and on one thread."""
    started = []

    def start(*arguments: object, **environment: object) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        more |= {key: str(value) for key, value in environment.items()}
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()  # which torchrun hands on; a killed one would leave its ranks behind
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def curve(out: Path) -> list[float]:
    history = json.loads((out / "results.json").read_text())["outcome"]["history"]
    return [at["loss"] for at in history]


def test_two_ranks_give_the_losses_of_one(
    example: ModuleType, launch: Launch, tmp_path: Path
) -> None:
    """To the rounding of float32, in which the views are; the rest is computed in float64."""
    arguments, losses = list(map(str, EIGHT_STEPS)), (*LOSSES, *PEERS)
    environment = {"LOSSES": " ".join(losses), "OUT": tmp_path / "two"}
    over_two = launch(*TORCHRUN, __file__, *arguments, **environment)
    for loss in losses:
        assert example.main([*arguments, *each(loss, tmp_path / "one")]) == 0
    code, err = finish(over_two)
    assert code == 0, err
    for loss in losses:
        expected, found = curve(tmp_path / "one" / loss), curve(tmp_path / "two" / loss)
        assert len(found) == 8
        assert min(found[4:]) < max(found[:4])  # it trains, so gradients count
        # The views alone are float32, and rounded once a step.
        rounding = len(found) * torch.finfo(torch.float32).eps
        assert found == pytest.approx(expected, rel=rounding, abs=rounding), loss


@pytest.mark.parametrize("batch", [41, 2])
def test_batch_that_cannot_be_divided_is_refused(
    example: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "out"
    assert example.main([*map(str, TINY), "--batch-size", str(batch), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"pretrain.py: error: a batch of {batch} images: expected a multiple of")
    assert err.count("\n") == 1
    assert not out.exists()


def test_one_two_and_one_rank_continue_each_other(
    example: ModuleType, launch: Launch, tmp_path: Path
) -> None:
    """SIGTERM, which reaches the second of two ranks alone, leaves a checkpoint that both hold."""
    short = (*TINY, "--loss", "visreg", "--batch-size", 80, "--out", tmp_path)
    assert example.main([*map(str, short), "--epochs", "1"]) == 0
    checkpoint = tmp_path / "checkpoint.pt"
    begun = torch.load(checkpoint, weights_only=True)
    assert begun["step"] == 2

    with socket.socket() as free:
        free.bind(("localhost", 0))
        rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1]}
    both = [
        launch(
            *(__file__, "--resume", checkpoint, "--device", "cpu"),
            *("--epochs", 10**6, "--log-every", 10**6),
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=2,
            LOCAL_WORLD_SIZE=2,
            **rendezvous,
        )
        for rank in range(2)
    ]
    before, deadline = checkpoint.stat().st_mtime_ns, time.monotonic() + 240
    while checkpoint.stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert checkpoint.stat().st_mtime_ns != before
    both[1].send_signal(signal.SIGTERM)
    (code, err), (other, silent) = map(finish, both)
    assert (code, other) == (143, 143), err + silent
    assert f"SIGTERM: saved; --resume {tmp_path} continues" in err
    assert "saved" not in silent
    saved = torch.load(checkpoint, weights_only=True)
    step = saved["step"]
    assert step > 2
    assert saved["objective"]["base.composite.step"] == step
    assert saved["network"].keys() == begun["network"].keys()
    assert saved["history"][: len(begun["history"])] == begun["history"]

    more = ["--resume", str(checkpoint), "--epochs", str(step // 2 + 1)]
    assert example.main([*more, "--device", "cpu"]) == 0
    assert torch.load(checkpoint, weights_only=True)["step"] == step // 2 * 2 + 2


def test_a_rank_that_fails_ends_the_other(launch: Launch, tmp_path: Path) -> None:
    arguments = (*TINY, "--batch-size", 40, "--epochs", 10**6, "--out", tmp_path)
    code, err = finish(launch(*TORCHRUN, __file__, *arguments, FAILING_RANK=1))
    assert code != 0
    assert "RuntimeError: of one rank" in err


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
