"""The scripts of examples/claims as modules, and what they need."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from needed import needs

CLAIMS = Path(__file__).resolve().parents[1] / "examples" / "claims"
NEEDS = needs(
    *("torchvision", "lightly", "lightning_fabric", "torchmetrics"),
    *("mlxtend", "rich", "sklearn", "matplotlib"),
)


def module(name: str) -> Any:
    """One of the scripts, or of what they share."""
    if str(CLAIMS) not in sys.path:
        sys.path.insert(0, str(CLAIMS))
    return import_module(name)
