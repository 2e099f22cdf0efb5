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
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    for name in ("torchvision", "mlxtend", "rich", "sklearn", "matplotlib")
]
pytestmark.append(
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="torch.distributed has no gloo",
    )
)
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TINY = ("--device", "cpu", "--arch", "nano", "--limit", 200, "--width", 16)
TWENTY_STEPS = (*TINY, "--batch-size", 40, "--epochs", 5, "--lr", 1e-2)
Curves = dict[str, list[float]]
Launch = Callable[..., subprocess.Popen[str]]


def nano() -> nn.Module:
    """The parts of a ResNet that the script replaces, and hardly more."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Identity(),
            norm1=nn.BatchNorm2d(64),
            relu=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(64, 32, 3, stride=2, bias=False),
            norm2=nn.BatchNorm2d(32),
            relu2=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(32, 1),
        )
    )


def load() -> ModuleType:
    """The script as a module, with a network that is small enough for tests, in float64, and SGD.

    In float32 a training makes differences of one in 100 from those of one in 1e7 (Adam within
    three steps, as it divides noise by noise where a gradient is about zero). Nor would Adam show a
    gradient W times too large.
    """
    sys.path.insert(0, str(EXAMPLES))
    module = import_module("pretrain")
    module.ARCHITECTURES["nano"] = nano
    build_network, new_run = module.build_network, module.new_run

    def in_double(settings: Any, channels: int) -> nn.Module:
        network = build_network(settings, channels).double()
        network[0].register_forward_pre_hook(lambda _, given: given[0].double())
        return network

    def with_sgd(name: str, settings: Any, channels: int) -> Any:
        run = new_run(name, settings, channels)
        run.optimiser = torch.optim.SGD(run.network.parameters(), settings.lr, momentum=0.9)
        return run

    module.build_network, module.new_run = in_double, with_sgd
    return module


def main() -> int:
    """What a rank of the tests runs: the script, which may be made to fail."""
    module = load()
    train_step = module.train_step

    def step(run: Any, *rest: Any) -> Any:
        if run.step == 2 and os.environ.get("FAILING_RANK") == os.environ["RANK"]:
            raise RuntimeError("of one rank")
        return train_step(run, *rest)

    module.train_step = step
    return module.main()


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    module = load()
    yield module
    sys.path.remove(str(EXAMPLES))
    del sys.modules["pretrain"]


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
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def losses(out: Path) -> Curves:
    outcomes = json.loads((out / "results.json").read_text())["outcomes"]
    return {row["name"]: [at["total"] for at in row["history"]] for row in outcomes[1:]}


def test_two_ranks_give_the_losses_of_one(
    example: ModuleType, launch: Launch, tmp_path: Path
) -> None:
    """To the rounding of float32, in which the views are; the rest is computed in float64."""
    one, two = (
        [*map(str, TWENTY_STEPS), "--quick", "--out", str(tmp_path / name)]
        for name in ("one", "two")
    )
    over_two = launch(*TORCHRUN, __file__, *two)
    assert example.main(one) == 0
    code, err = finish(over_two)
    assert code == 0, err
    expected = losses(tmp_path / "one")
    assert expected.keys() == {"invariance", "vicreg", "visreg"}
    for name, curve in losses(tmp_path / "two").items():
        assert len(curve) == 20
        assert curve[-1] < 0.95 * curve[0]  # it trains, so gradients count
        # The views alone are float32, and rounded once a step.
        rounding = len(curve) * torch.finfo(torch.float32).eps
        assert curve == pytest.approx(expected[name], rel=rounding, abs=0)


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
    short = (*TINY, "--objectives", "visreg", "--batch-size", 80, "--out", tmp_path)
    assert example.main([*map(str, short), "--epochs", "1", "--quick"]) == 0
    checkpoint = tmp_path / "checkpoint-visreg.pt"
    begun = torch.load(checkpoint, weights_only=True)
    assert begun["step"] == 2

    with socket.socket() as free:
        free.bind(("localhost", 0))
        rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1]}
    both = [
        launch(
            *(__file__, "--resume", checkpoint, "--device", "cpu"),
            *("--epochs", 10**6),
            RANK=rank,
            WORLD_SIZE=2,
            **rendezvous,
        )
        for rank in range(2)
    ]
    before, deadline = checkpoint.stat().st_mtime_ns, time.monotonic() + 60
    while checkpoint.stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    (code, err), (other, silent) = map(finish, both)
    assert (code, other) == (130, 130), err + silent
    assert f"interrupted; --resume {tmp_path} continues" in err
    assert "interrupted" not in silent
    saved = torch.load(checkpoint, weights_only=True)
    step = saved["step"]
    assert step > 2
    assert saved["objective"]["step"] == step
    assert saved["network"].keys() == begun["network"].keys()
    assert saved["history"][: len(begun["history"])] == begun["history"]

    more = ["--resume", str(checkpoint), "--epochs", str(step // 2 + 1), "--quick"]
    assert example.main([*more, "--device", "cpu"]) == 0
    assert torch.load(checkpoint, weights_only=True)["step"] == step // 2 * 2 + 2


def test_a_rank_that_fails_ends_the_other(launch: Launch, tmp_path: Path) -> None:
    arguments = (*TINY, "--batch-size", 40, "--epochs", 10**6, "--out", tmp_path)
    code, err = finish(launch(*TORCHRUN, __file__, *arguments, FAILING_RANK=1))
    assert code != 0
    assert "RuntimeError: of one rank" in err


if __name__ == "__main__":
    sys.exit(main())
