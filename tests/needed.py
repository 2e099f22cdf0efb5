"""Skips a test by the name of what it needs and is not installed."""

from importlib.util import find_spec

import pytest


def needs(*packages: str) -> list[pytest.MarkDecorator]:
    """A mark for each package; unlike ``importorskip`` it does not wait for their imports."""
    return [
        pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
        for name in packages
    ]
