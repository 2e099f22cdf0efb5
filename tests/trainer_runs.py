"""What the tests of the reference trainer share: its packages, its shortest run, its refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from needed import needs

NEEDED = needs(
    *("torchvision", "timm", "lightning_fabric", "torchmetrics", "tensorboard"),
    *("mlxtend", "rich", "sklearn", "matplotlib"),
)
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
