"""The examples' batches: their order, and images that cannot be decoded."""

import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from image_folders import JUNK, make_folder, make_official
from needed import needs
from torch.utils.data import DataLoader, Subset
from view_checks import imported

pytestmark = needs("torchvision", "mlxtend", "sklearn")


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    yield from imported("data")


def arrays(data: ModuleType) -> Any:
    """200 samples in memory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return data.InMemory(images, torch.arange(200) % 7)


def spoil(path: Path, rows: list[int], content: bytes | None = JUNK) -> list[str]:
    """Overwrite, or cut off, images of a folder by their numbers; give back their paths."""
    images = sorted(path.rglob("*.png"))
    for row in rows:
        whole = images[row].read_bytes()
        images[row].write_bytes(whole[:-30] if content is None else content)
    return [str(images[row]) for row in rows]


def read(batches: DataLoader[Any]) -> list[tuple[list[int], list[int]]]:
    """Batches of ``make_folder`` as numbers of images and labels."""
    return [(images[:, 0, 0, 0].tolist(), labels.tolist()) for images, labels in batches]


@pytest.mark.parametrize("content", [JUNK, None, b""], ids=["junk", "truncated", "empty"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced(
    data: ModuleType, tmp_path: Path, content: bytes | None, workers: int
) -> None:
    """2 of 200 is 1 %, which is allowed: the next image comes instead, whoever reads."""
    folder = make_folder(tmp_path / "pets", 100)
    images = data.load(folder, size=8)
    rows = images.train.rows
    broken = [rows[10], rows[11]]
    paths = spoil(folder, broken, content)
    expected = [*rows[:10], rows[12], rows[12], *rows[12:]]
    for _ in range(2):
        batches = read(data.ordered_batches(images.train, 32, workers))
        assert [number for numbers, _ in batches for number in numbers] == expected
        assert [label for _, labels in batches for label in labels] == [n // 100 for n in expected]
        assert images.unreadable.count() == 2
    assert images.unreadable.first() == min(paths)
    images.unreadable.check()
    images.unreadable.check(2)
    with pytest.raises(data.DataError, match=r"3 of 200 images \(1.5%\) cannot be read, more than"):
        images.unreadable.check(3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [3, 200], ids=["above-1%", "all"])
def test_too_many_unreadable_images_are_an_error(
    data: ModuleType, tmp_path: Path, workers: int, broken: int
) -> None:
    folder = make_folder(tmp_path / "pets", 100)
    images = data.load(folder, size=8)
    paths = spoil(folder, sorted(images.train.rows)[:broken])
    with pytest.raises(data.DataError) as caught:
        read(data.shuffled_batches(images.train, 16, 0, 0, workers))
    assert not multiprocessing.active_children()
    message = str(caught.value)
    found = r"3 of 200 images \(1.5%\)" if broken == 3 else r"\d+ of 200 images \(\d+.\d%\)"
    assert re.match(found + " cannot be read, more than 1%; the first: ", message)
    assert any(path in message for path in paths)
    assert "(cannot identify image file" in message
    assert "\n" not in message


def test_unreadable_image_of_val_is_named(data: ModuleType, tmp_path: Path) -> None:
    folder = make_official(tmp_path / "net")
    images = data.load(folder, size=8)
    images.unreadable.check(0)
    path = folder / "val" / "dogs" / "0001.png"
    path.write_bytes(JUNK)
    with pytest.raises(data.DataError, match=r"1 of 24 images \(4.2%\)"):
        read(data.ordered_batches(images.held_out, 4, 0))
    assert images.unreadable.first() == str(path)
    images.unreadable.found.zero_()
    with pytest.raises(data.DataError, match="the first: read by another rank"):
        images.unreadable.check(1)


@pytest.mark.parametrize("name", ["arrays", "folder"])
def test_order_is_the_seeds_alone(data: ModuleType, tmp_path: Path, name: str) -> None:
    samples = arrays(data)
    if name == "folder":
        samples = data.load(make_folder(tmp_path / "pets", 100), size=8).train

    def epoch(seed: int, first: int = 0, workers: int = 0, part: slice = slice(None)) -> list[Any]:
        batches = data.shuffled_batches(samples, 32, seed, first, workers, part)
        read = [(images, labels.tolist()) for images, labels in batches]
        assert len(read) == len(batches)
        return [(hash(images.numpy().tobytes()), len(images), labels) for images, labels in read]

    whole = epoch(0)
    assert [count for _, count, _ in whole] == [32] * (len(samples) // 32)
    assert epoch(0, workers=2) == whole
    assert epoch(0, first=2) == whole[2:]
    assert epoch(0, first=len(whole)) == []
    assert epoch(1) != whole
    halves = [epoch(0, part=part) for part in (slice(0, 16), slice(16, 32))]
    for (_, _, labels), first, second in zip(whole, *halves, strict=True):
        assert labels == first[2] + second[2]


def test_ordered_batches_take_all(data: ModuleType) -> None:
    samples = arrays(data)
    batches = list(data.ordered_batches(samples, 64, 0))
    assert [len(images) for images, _ in batches] == [64, 64, 64, 8]
    assert torch.equal(torch.cat([images for images, _ in batches]), samples.images)
    part = Subset(samples, range(1, 200, 3))
    (images, labels), *rest = data.ordered_batches(part, 100, 0)
    assert torch.equal(images, samples.images[1:200:3])
    assert torch.equal(labels, samples.labels[1:200:3])
    assert not rest
