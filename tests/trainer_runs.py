"""What the tests of the reference trainer share: its packages, its shortest run, its refusals."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Not importorskip, which would make collecting any test wait for these imports.
PACKAGES = (
    *("torchvision", "timm", "lightning_fabric", "torchmetrics", "tensorboard"),
    *("mlxtend", "rich", "sklearn", "matplotlib"),
)
NEEDED = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    for name in PACKAGES
]
TINY = ("--device", "cpu", "--limit", "100", "--expander", "8-8", "--batch-size", "40")
SHORT = (*TINY, "--epochs", "1", "--log-every", "1")  # two steps
Capture = pytest.CaptureFixture[str]
Run = Callable[..., int]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def refused(run: Run, capsys: Capture, *arguments: object) -> str:
    """The one line with which the script refuses arguments, without writing anything."""
    capsys.readouterr()
    assert run(*arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("pretrain.py: error: ")
    assert line.count("\n") == 1, line
    return line
