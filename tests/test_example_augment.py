"""The examples' augmentations: crops, flips, rotations and lists of views; all by their draws."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from needed import needs
from torch import Tensor
from view_checks import (
    WHOLE,
    assert_fraction,
    assert_same_distribution,
    assert_uniform,
    imported,
    noise,
    seeded,
)

pytestmark = needs("torchvision", "scipy")
PRESETS = ("DIGITS", "FASHION", "PHOTOS", "SMALL_PHOTOS")


@pytest.fixture(scope="module")
def augment() -> Iterator[ModuleType]:
    yield from imported("augment")


@pytest.fixture
def functional(augment: ModuleType) -> Any:
    """What each operation is compared with."""
    return augment.v2.functional


def ramps(samples: int, size: int = 64) -> Tensor:
    """Images of which red is the column and green the row, so that a view tells its crop."""
    line = torch.arange(size, dtype=torch.uint8)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([columns, rows, rows]).expand(samples, 3, size, size)


def crops(views: Tensor, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Widths (signed), heights and centres (N, 2) of 2x2 views of ``ramps``, in parts of it.

    The pixels of such a view lie at a quarter and three quarters of the crop.
    """
    place = (views.double() * 255 + 0.5) / size
    width = 2 * (place[:, 0, :, 1] - place[:, 0, :, 0]).mean(1)
    height = 2 * (place[:, 1, 1] - place[:, 1, 0]).mean(1)
    return width, height, place[:, :2].mean((2, 3))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("world", [2, 3])
def test_views_do_not_depend_on_the_number_of_ranks(
    augment: ModuleType, monkeypatch: pytest.MonkeyPatch, preset: str, world: int
) -> None:
    views = getattr(augment, preset)
    images = noise(12, channels=len(views.first.mean))
    whole = views(images, seeded(), 2, 1)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    parts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(views(images.chunk(world)[rank], seeded(), 2, 1))
    for view, of_ranks in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(of_ranks), view)


@pytest.mark.parametrize("preset", PRESETS)
def test_samples_differ_seeds_repeat(augment: ModuleType, preset: str) -> None:
    views = getattr(augment, preset)
    same = noise(1, channels=len(views.first.mean)).expand(6, -1, -1, -1)
    first, second = views(same, seeded())
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 12
    again = views(same, seeded())
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    assert not torch.equal(views(same, seeded(1))[0], first)


@pytest.mark.parametrize("preset", PRESETS)
def test_views_are_normalised_float_channels_last(
    augment: ModuleType, functional: Any, preset: str
) -> None:
    views = getattr(augment, preset)
    images = noise(4, channels=len(views.first.mean), size=28)
    with torch.autocast("cpu", torch.bfloat16):  # which must not reach the pixels
        made = [*views(images, seeded(), 3, 2), views.plain(images)]
    assert [view.shape[2:] for view in made] == [(28, 28)] * 3 + [(12, 12)] * 2 + [(28, 28)]
    low, high = (
        (k - torch.tensor(views.first.mean)) / torch.tensor(views.first.std) for k in (0, 1)
    )
    for view, plain in zip(made, views(images, seeded(), 3, 2), strict=False):
        torch.testing.assert_close(view, plain, rtol=0, atol=0)
    for view in made:
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert (view >= low.view(-1, 1, 1) - 1e-5).all()
        assert (view <= high.view(-1, 1, 1) + 1e-5).all()
    scaled = functional.to_dtype(images, torch.float32, scale=True)
    expected = functional.normalize(scaled, [*views.first.mean], [*views.first.std])
    torch.testing.assert_close(made[-1], expected, check_stride=False)


@pytest.mark.parametrize("size", [16, 11, 32])
def test_whole_image_is_torchvisions_resize(
    augment: ModuleType, functional: Any, size: int
) -> None:
    images = noise(3)
    views = augment.Augmentation(**WHOLE)(images, seeded(), size)
    expected = functional.resize(images / 255, [size, size], antialias=False)
    torch.testing.assert_close(views, expected, atol=1e-5, rtol=0, check_stride=False)


def test_crops_are_torchvisions(augment: ModuleType) -> None:
    """Area, aspect and place follow the same law, and no crop leaves the image."""
    width, height, centre = crops(augment.Augmentation()(ramps(3000), seeded(), 2))
    assert (width > 0).all()
    half = torch.stack([width, height], 1) / 2
    assert ((centre - half) > -1e-5).all()
    assert ((centre + half) < 1 + 1e-5).all()
    torch.manual_seed(0)
    crop = augment.v2.RandomResizedCrop(2)
    params = [crop.make_params([torch.empty(3, 2000, 2000, device="meta")]) for _ in range(3000)]
    box = torch.tensor([[p["width"], p["height"], p["left"], p["top"]] for p in params]) / 2000
    assert_same_distribution(width * height, box[:, 0] * box[:, 1])
    assert_same_distribution((width / height).log(), (box[:, 0] / box[:, 1]).log())
    for axis in (0, 1):
        own = (centre - half)[:, axis] / (1 - 2 * half[:, axis])
        theirs = box[:, 2 + axis] / (1 - box[:, axis])
        inside = (half[:, axis] < 0.45), (box[:, axis] < 0.9)  # where the quotient is exact
        assert_same_distribution(own[inside[0]], theirs[inside[1]])


def test_crop_that_never_fits_is_cut_off(augment: ModuleType) -> None:
    """As wide as high in pixels, but the image is not: its width has no room for that."""
    tall = ramps(8)[:, :, :, :32]
    view = augment.Augmentation(area=(0.9, 1), aspect=1)(tall, seeded(), 2)
    width, height, centre = crops(view)
    torch.testing.assert_close(2 * width, torch.ones(8).double(), atol=1e-5, rtol=0)
    assert (height < 0.75).all()  # 32 / 64, times sqrt(1 / (1/2))
    torch.testing.assert_close(2 * centre[:, 0], torch.full((8,), 0.5).double(), atol=1e-5, rtol=0)


def test_zoom_out_repeats_the_edge(augment: ModuleType) -> None:
    white = torch.full((4, 1, 8, 8), 255, dtype=torch.uint8)
    view = augment.Augmentation(area=(1.2, 1.2), aspect=1)(white, seeded())
    torch.testing.assert_close(view, torch.ones(4, 1, 8, 8), check_stride=False)
    width, _, _ = crops(augment.Augmentation(area=(1.2, 1.2), aspect=1)(ramps(4), seeded(), 2))
    torch.testing.assert_close(width, torch.full((4,), math.sqrt(1.2)).double())


def test_flips_and_rotations(augment: ModuleType) -> None:
    width, _, _ = crops(augment.Augmentation(**WHOLE, flip=0.3)(ramps(2000), seeded(), 2))
    torch.testing.assert_close(width.abs(), torch.ones(2000).double())
    assert_fraction(width < 0, 0.3)
    view = augment.Augmentation(**WHOLE, degrees=15)(ramps(2000), seeded(), 2) * 255 / 32
    along_x, along_y = (
        (view[:, 0, 0, 1] - view[:, 0, 0, 0]),
        (view[:, 0, 1, 0] - view[:, 0, 0, 0]),
    )
    assert_uniform(torch.rad2deg(torch.atan2(along_y, along_x)), -15, 15)
    torch.testing.assert_close(torch.hypot(along_x, along_y), torch.ones(2000), rtol=1e-4, atol=0)
    down_x, down_y = ((view[:, 1, 0, 1] - view[:, 1, 0, 0]), (view[:, 1, 1, 0] - view[:, 1, 0, 0]))
    torch.testing.assert_close(down_x, -along_y, atol=1e-4, rtol=0)  # no shear
    torch.testing.assert_close(down_y, along_x, atol=1e-4, rtol=0)


def test_views_take_turns_and_local_ones_are_small(augment: ModuleType) -> None:
    one = augment.Augmentation(area=(0.1, 0.6))
    views = augment.Views(one, replace(one, flip=1.0), replace(one, area=(0.05, 0.25)), 2, 2)
    made = [crops(view) for view in views(ramps(500), seeded(), 3, 2)]
    areas = [width.abs() * height for width, height, _ in made]
    assert [bool((width < 0).all()) for width, _, _ in made] == [False, True, False, False, False]
    for area in areas[:3]:
        assert_uniform(area, 0.25, 0.6)
    for area in areas[3:]:
        assert_uniform(area, 0.05, 0.25)
    width, height, _ = crops(views(ramps(500), seeded())[0])
    assert_uniform(width * height, 0.1, 0.6)


def test_sizes_of_views(augment: ModuleType, functional: Any) -> None:
    images = noise(2, 1, 28)
    views = replace(augment.DIGITS, size=224)
    assert [view.shape[3] for view in views(images, seeded(), 1, 1)] == [224, 96]
    plain = functional.resize(images, [20, 20], antialias=True)
    views = replace(augment.DIGITS, size=20, local_size=9)
    assert [view.shape[3] for view in views(images, seeded(), 1, 1)] == [20, 9]
    torch.testing.assert_close(views.plain(images), augment.DIGITS.plain(plain))


def test_presets_are_the_sources(augment: ModuleType) -> None:
    """VICReg's official code: the first view is always blurred, the second may be solarized."""
    first, second = augment.PHOTOS.first, augment.PHOTOS.second
    assert (first.area, first.aspect, first.flip, first.jitter) == ((0.08, 1.0), 4 / 3, 0.5, 0.8)
    assert (first.brightness, first.contrast, first.saturation, first.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (first.grayscale, first.blur, first.solarize) == (0.2, 1.0, 0.0)
    assert second == replace(first, blur=0.1, solarize=0.2)
    unblurred = [replace(one, blur=0.0) for one in (first, second)]
    assert [augment.SMALL_PHOTOS.first, augment.SMALL_PHOTOS.second] == unblurred
    for gray in (augment.DIGITS, augment.FASHION):
        off = ("saturation", "hue", "grayscale", "blur", "solarize")
        assert not any(
            getattr(gray.first, field.name) for field in fields(gray.first) if field.name in off
        )
    assert augment.DIGITS.first.flip == 0


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 4, 4), "torch.float32 of shape (2, 3, 4, 4)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "torch.uint8 of shape (3, 4, 4)"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.uint8), "torch.uint8 of shape (2, 4, 4, 4)"),
    ],
)
def test_other_images_are_refused(augment: ModuleType, images: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match="images: expected uint8") as caught:
        augment.DIGITS.first(images, seeded())
    assert found in str(caught.value)
    with pytest.raises(ValueError, match="expected 3 channels, got 1"):
        augment.PHOTOS.first(noise(2, 1), seeded())
