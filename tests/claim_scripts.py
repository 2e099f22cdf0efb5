"""The scripts of examples/claims as modules, and what they need."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CLAIMS = Path(__file__).resolve().parents[1] / "examples" / "claims"
# Not importorskip, which would make collecting any test wait for these imports.
NEEDS = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    for name in (
        *("torchvision", "lightly", "lightning_fabric", "torchmetrics"),
        *("mlxtend", "rich", "sklearn", "matplotlib"),
    )
]


def module(name: str) -> Any:
    """One of the scripts, or of what they share."""
    if str(CLAIMS) not in sys.path:
        sys.path.insert(0, str(CLAIMS))
    return import_module(name)
