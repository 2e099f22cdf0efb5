"""What the tests of the examples' augmentations share: images, generators, laws of draws."""

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

EXAMPLES = str(Path(__file__).resolve().parents[1] / "examples")
WHOLE = {"area": (1.0, 1.0), "aspect": 1.0}


def imported(name: str) -> Iterator[ModuleType]:
    """A module of the examples, which import each other by plain names."""
    sys.path.insert(0, EXAMPLES)
    yield import_module(name)
    sys.path.remove(EXAMPLES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(samples: int, channels: int = 3, size: int = 16, low: int = 0, high: int = 256) -> Tensor:
    shape = (samples, channels, size, size)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=seeded(7))


def assert_same_distribution(one: Tensor, other: Tensor) -> None:
    from scipy.stats import ks_2samp

    assert ks_2samp(one.numpy(), other.numpy()).pvalue > 0.01


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    from scipy.stats import kstest

    assert kstest(values.numpy(), "uniform", (low, high - low)).pvalue > 0.01


def assert_fraction(chosen: Tensor, expected: float) -> None:
    """Within 4.5 standard deviations of the expected count."""
    deviation = math.sqrt(expected * (1 - expected) / len(chosen))
    assert abs(float(chosen.double().mean()) - expected) <= 4.5 * deviation
