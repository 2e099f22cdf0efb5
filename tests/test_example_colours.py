"""The examples' augmentations of colour: torchvision's, one sample at a time, at what was drawn."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from needed import needs
from torch import Tensor
from view_checks import (
    WHOLE,
    assert_fraction,
    assert_uniform,
    imported,
    noise,
    seeded,
)

pytestmark = needs("torchvision", "scipy")


@pytest.fixture(scope="module")
def augment() -> Iterator[ModuleType]:
    yield from imported("augment")


@pytest.fixture
def functional(augment: ModuleType) -> Any:
    """What each operation is compared with."""
    return augment.v2.functional


def contrast_of(view: Tensor, image: Tensor) -> float:
    return float(view.std() / image.std())


def saturation_of(view: Tensor, image: Tensor) -> float:
    return float((view[0] - view[1]).abs().mean() / (image[0] - image[1]).abs().mean())


def brightness_of(view: Tensor, image: Tensor) -> float:
    return float(view.mean() / image.mean())


@pytest.mark.parametrize(
    ("name", "factor_of"),
    [
        ("brightness", brightness_of),
        ("contrast", contrast_of),
        ("saturation", saturation_of),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_at_the_drawn_factor(
    augment: ModuleType,
    functional: Any,
    name: str,
    factor_of: Callable[[Tensor, Tensor], float],
    channels: int,
) -> None:
    if name == "contrast":  # of gray, where the mean of the gray is that of the colour
        images = noise(400, 1, 8, 90, 160).expand(-1, channels, -1, -1)
    else:
        images = noise(400, channels, 8, 90, 160)
    pixels = images / 255
    views = augment.Augmentation(**WHOLE, jitter=0.8, **{name: 0.4})(images, seeded())
    if name == "saturation" and channels == 1:
        torch.testing.assert_close(views, pixels, atol=1e-6, rtol=0, check_stride=False)
        return
    factors = torch.tensor([factor_of(*pair) for pair in zip(views, pixels, strict=True)])
    changed = (factors - 1).abs() > 1e-4
    assert_fraction(changed, 0.8)
    assert_uniform(factors[changed], 0.6, 1.4)
    adjust = getattr(functional, f"adjust_{name}")
    for view, image, factor in zip(views, pixels, factors.tolist(), strict=True):
        expected = adjust(image, factor)
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=0, check_stride=False)


def test_colours_in_a_row_are_torchvisions(augment: ModuleType, functional: Any) -> None:
    """With factors that keep within [0, 1], for the clamp comes once here."""
    pixels = noise(5, low=100, high=150) / 255
    factors = torch.tensor(
        [[0.8, 1.2, 1.1], [1.1, 0.7, 0.8], [1, 1.3, 1], [1.2, 1, 0.6], [1, 1, 1]]
    )
    shifts, gray = (
        torch.tensor([0, 1, -1, 0, 1]) / 3,
        torch.tensor([False, False, True, True, False]),
    )
    views = augment.adjust_colours(pixels, *factors.T, shifts, gray)
    for row, image in enumerate(pixels):
        brightness, contrast, saturation = factors[row].tolist()
        image = functional.adjust_contrast(
            functional.adjust_brightness(image, brightness), contrast
        )
        image = functional.adjust_saturation(image, saturation)
        image = functional.adjust_hue(image, float(shifts[row]))
        image = functional.rgb_to_grayscale(image, 3) if gray[row] else image
        torch.testing.assert_close(views[row], image, atol=2e-5, rtol=0)


def test_hue_turns_about_gray(augment: ModuleType, functional: Any) -> None:
    """It keeps the mean of the channels and the distance from it, and turns as HSV does."""
    images = noise(600, size=4, low=110, high=140)
    views = augment.Augmentation(**WHOLE, jitter=1, hue=0.1)(images, seeded()).double()
    pixels = images.double() / 255
    torch.testing.assert_close(views.mean(1), pixels.mean(1), atol=1e-6, rtol=0)
    before, after = (x - x.mean(1, keepdim=True) for x in (pixels, views))
    torch.testing.assert_close(before.norm(dim=1), after.norm(dim=1), atol=1e-6, rtol=0)
    cos = (before * after).sum((1, 2, 3)) / before.square().sum((1, 2, 3))
    sin = (torch.linalg.cross(before, after, dim=1).sum(1) / math.sqrt(3)).sum((1, 2))
    sin = sin / before.square().sum((1, 2, 3))
    shifts = torch.atan2(sin, cos) / (2 * math.pi)
    assert_uniform(shifts, -0.1, 0.1)
    for image, view, shift in zip(pixels[:20], views[:20], shifts[:20].tolist(), strict=True):
        expected, own = functional.adjust_hue(image, shift) - image, view - image
        assert torch.cosine_similarity(expected.flatten(), own.flatten(), 0) > 0.75


@pytest.mark.parametrize(("sigma", "radius"), [(0.1, 1), (0.5, 1), (1.3, 3), (2.0, 7)])
def test_blur_is_torchvisions(
    augment: ModuleType, functional: Any, sigma: float, radius: int
) -> None:
    pixels = noise(3) / 255
    sigmas = torch.tensor([sigma, 0, sigma / 2 + 0.05])
    blurred = augment.gaussian_blur(pixels, sigmas, radius)
    for index in (0, 2):
        own = float(sigmas[index])
        expected = functional.gaussian_blur(pixels[index], [2 * radius + 1] * 2, [own, own])
        torch.testing.assert_close(blurred[index], expected, atol=1e-5, rtol=0)
    assert torch.equal(blurred[1], pixels[1])


@pytest.mark.parametrize("name", ["grayscale", "blur", "solarize"])
def test_operations_come_with_their_probability(
    augment: ModuleType, functional: Any, name: str
) -> None:
    images = noise(300, size=40)
    pixels = images / 255

    def chosen(probability: float) -> Tensor:
        views = augment.Augmentation(**WHOLE, **{name: probability})(images, seeded())
        changed = (views - pixels).abs().amax((1, 2, 3)) > 1e-4
        if name != "blur":
            operation = {
                "grayscale": lambda x: functional.rgb_to_grayscale(x, 3),
                "solarize": lambda x: functional.solarize(x, 0.5),
            }[name]
            expected = operation(pixels[changed])
            torch.testing.assert_close(
                views[changed], expected, atol=1e-5, rtol=0, check_stride=False
            )
        return changed

    assert_fraction(chosen(0.3), 0.3)
    # A sigma of less than 0.2 leaves all as it is: a neighbour weighs exp(-12) or less.
    assert chosen(1.0).double().mean() > (0.9 if name == "blur" else 0.999)


def test_blur_has_a_kernel_of_a_tenth_of_the_view(
    augment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def record(views: Tensor, sigma: Tensor, radius: int) -> Tensor:
        asked[2 * radius + 1] = sigma
        return views

    monkeypatch.setattr(augment, "gaussian_blur", record)
    for size in (224, 96, 12):
        augment.Augmentation(**WHOLE, blur=1)(noise(400), seeded(size), size)
    assert list(asked) == [23, 9, 1]
    assert_uniform(asked[9], 0.1, 2)
