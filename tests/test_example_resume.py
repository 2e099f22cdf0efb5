"""A killed training, resumed, is bit for bit the training that was not killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from trainer_runs import NEEDED

pytestmark = NEEDED
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "pretrain.py"
TINY = ("--device", "cpu", "--limit", 100, "--expander", "8-8", "--batch-size", 20)
# Six steps, two an epoch, that draw slices, average the network, and log between the steps.
SIX_STEPS = (*TINY, "--epochs", 3, "--accumulate", 2, "--loss", "visreg", "--add", "sketch")
MORE = ("--ema", 0.9, "--local-views", 1, "--log-every", 4, "--lr", 1e-2)
Launch = Callable[..., subprocess.Popen[str]]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is saved."""


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts the script, on one thread."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal, bit for bit, but for the seconds that it took and the folder it is in."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"seconds", "out", "save_every"}:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def whole(pretrain: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint at the end of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert pretrain.main([*map(str, (*SIX_STEPS, *MORE)), "--out", str(out)]) == 0
    return checkpoint(out)


@pytest.mark.parametrize("step", range(1, 6))
def test_killed_at_any_step_and_resumed(
    pretrain: ModuleType,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """The checkpoint is as old as the last save; the steps since then are taken again."""
    training = import_module("training")
    train_step = training.train_step

    def killed(run: Any, batches: Any) -> Any:
        logged = train_step(run, batches)
        if run.step == step:
            raise Killed
        return logged

    arguments = [*map(str, (*SIX_STEPS, *MORE)), "--out", str(tmp_path), "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", killed)
        with pytest.raises(Killed):
            pretrain.main(arguments)
    assert checkpoint(tmp_path)["step"] == step
    torch.manual_seed(step)  # the global generator is in another state than it was
    assert pretrain.main(["--resume", str(tmp_path)]) == 0
    assert_same(checkpoint(tmp_path), whole)
    assert logged_steps(tmp_path) == [1, 4, 6]


def logged_steps(folder: Path) -> list[int]:
    """The steps of the loss that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_sigkill_at_an_unknown_step_with_a_scaler(
    pretrain: ModuleType, launch: Launch, tmp_path: Path
) -> None:
    """In float16, whose scaler must go on where it was."""
    small = ("--device", "cpu", "--limit", 50, "--image-size", 14, "--expander", "8-8")
    common = (*small, "--batch-size", 20, "--loss", "byol", "--precision", "fp16", "--epochs", 3)
    process = launch(*common, "--out", tmp_path / "killed", "--save-every", 1)
    assert pretrain.main([*map(str, common), "--out", str(tmp_path / "whole")]) == 0
    path = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.exists()
    assert checkpoint(path.parent)["precision"]["scale"] > 0
    assert pretrain.main(["--resume", str(path.parent)]) == 0
    assert_same(checkpoint(path.parent), checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_signals_save_and_end(
    pretrain: ModuleType,
    launch: Launch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
) -> None:
    endless = (*TINY, "--epochs", 10**6, "--warmup-epochs", 1, "--log-every", 10**5)
    process = launch(*endless, "--out", tmp_path)
    path = tmp_path / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.count("\n") == 1, err
    assert f"saved; --resume {tmp_path} continues" in err
    step = checkpoint(tmp_path)["step"]
    assert step >= 1
    epochs = step // 4 + 1  # four steps an epoch
    assert pretrain.main(["--resume", str(tmp_path), "--epochs", str(epochs)]) == 0
    assert checkpoint(tmp_path)["step"] == 4 * epochs
