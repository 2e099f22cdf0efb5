"""The example, as its users run it: from the command line, in short forms."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Not importorskip, which would make collecting any test wait for these imports.
pytestmark = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    for name in ("torchvision", "mlxtend", "rich", "sklearn", "matplotlib")
]
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "pretrain.py"
Started = tuple[subprocess.Popen[str], Path]
Capture = pytest.CaptureFixture[str]


def start(*arguments: object) -> subprocess.Popen[str]:
    """Run the script with ``arguments``, from the source tree and on one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--device", "cpu", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def make_folder(path: Path, per_class: int = 5) -> Path:
    """An ImageFolder of two classes of small PNGs."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for name in ("cats", "dogs"):
        (path / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = torch.randint(256, (12, 10, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(path / name / f"{index}.png")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "pets")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A short run on the digits, and its output folder."""
    out = tmp_path_factory.mktemp("quick")
    process = start("--quick", "--epochs", 1, "--limit", 200, "--width", 16, "--out", out)
    yield process, out
    process.kill()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Started]:
    """A run on a folder of images that only Ctrl-C ends, and its output folder."""
    out = tmp_path_factory.mktemp("endless")
    shape = ("--data", folder, "--image-size", 16, "--width", 8, "--workers", 0)
    process = start(*shape, "--objectives", "visreg", "--epochs", 10**6, "--out", out)
    yield process, out
    process.kill()


@pytest.fixture(scope="module", autouse=True)
def example(quick: Started, endless: Started) -> Iterator[ModuleType]:
    """The script as a module, for what needs no process of its own; imported as the two start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the two processes have the cores
    sys.path.insert(0, str(SCRIPT.parent))
    spec = spec_from_file_location("pretrain", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["pretrain"] = module  # where dataclasses look for a class's module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda path: path / "nowhere", "nowhere: no such folder"),
        (lambda path: make_folder(path / "void", per_class=0), "void: expected"),
        (lambda path: (path / "bare").mkdir() or path / "bare", "bare: expected"),
        (lambda path: make_folder(path / "few", per_class=1), "few: cannot hold out"),
    ],
    ids=["missing", "empty", "no-classes", "too-few"],
)
def test_unusable_folder_is_named(
    example: ModuleType, tmp_path: Path, capsys: Capture, spoil: Callable[[Path], Path], named: str
) -> None:
    out = tmp_path / "out"
    assert example.main(["--data", str(spoil(tmp_path)), "--out", str(out)]) == 2
    assert_one_line(capsys.readouterr().err, named)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"no image", None], ids=["junk", "truncated"])
def test_unreadable_image_is_named(
    example: ModuleType, tmp_path: Path, capsys: Capture, content: bytes | None
) -> None:
    pets = make_folder(tmp_path / "pets")
    broken = pets / "dogs" / "3.png"
    broken.write_bytes(broken.read_bytes()[:-60] if content is None else content)
    assert example.main(["--data", str(pets), "--workers", "0", "--out", str(tmp_path / "o")]) == 2
    assert_one_line(capsys.readouterr().err, f"{broken}: cannot be read as an image")


def test_unusable_checkpoint_is_named(example: ModuleType, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = tmp_path / "checkpoint-vicreg.pt"
    checkpoint.write_bytes(b"no checkpoint")
    assert example.main(["--resume", str(checkpoint)]) == 2
    assert_one_line(capsys.readouterr().err, f"{checkpoint}: not a checkpoint")
    assert example.main(["--resume", str(tmp_path / "nowhere.pt")]) == 2
    assert_one_line(capsys.readouterr().err, "nowhere.pt: not a checkpoint")


def test_verdict_names_what_did_not_win(example: ModuleType) -> None:
    def verdict(**accuracies: float) -> str | None:
        rows = [example.report.Outcome(name, value, 1.0, 1.0) for name, value in accuracies.items()]
        return example.report.complaint(rows)

    assert verdict(untrained=0.9, invariance=0.8, vicreg=0.97, visreg=0.96) is None
    assert "VISReg" in verdict(untrained=0.9, invariance=0.8, vicreg=0.97, visreg=0.9)
    assert "invariance alone" in verdict(untrained=0.1, invariance=0.96, vicreg=0.97)


def test_interrupted_run_continues(example: ModuleType, endless: Started, capsys: Capture) -> None:
    process, out = endless
    checkpoint = out / "checkpoint-visreg.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert_one_line(err, f"interrupted; --resume {out} continues")
    saved = torch.load(checkpoint, weights_only=True)
    step = saved["step"]
    assert step >= 1
    assert saved["objective"]["step"] == step

    # One batch an epoch, so two epochs more are two steps more.
    assert example.main(["--resume", str(checkpoint), "--epochs", str(step + 2)]) == 0
    assert "VISReg" in capsys.readouterr().out
    resumed = torch.load(checkpoint, weights_only=True)
    assert resumed["step"] == resumed["objective"]["step"] == step + 2
    history = json.loads((out / "results.json").read_text())["outcomes"][1]["history"]
    assert history[: len(saved["history"])] == saved["history"]
    assert history[-1]["epoch"] == step + 1


def test_quick_run_writes_everything(quick: Started) -> None:
    process, out = quick
    code, printed, err = finish(process)
    assert code == 0, err
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    outcomes = json.loads((out / "results.json").read_text())["outcomes"]
    assert [row["name"] for row in outcomes] == ["untrained", "invariance", "vicreg", "visreg"]
    for row, title in zip(
        outcomes, ("untrained", "invariance alone", "VICReg", "VISReg"), strict=True
    ):
        assert title in printed
        assert 0 <= row["accuracy"] <= 1
        assert all(math.isfinite(value) for record in row["history"] for value in record.values())
    for name in ("invariance", "vicreg", "visreg"):
        saved = torch.load(out / f"checkpoint-{name}.pt", weights_only=True)
        assert saved["step"] == 2  # 160 images in batches of 64


def assert_one_line(text: str, expected: str) -> None:
    assert text.count("\n") == 1, text
    assert expected in text
