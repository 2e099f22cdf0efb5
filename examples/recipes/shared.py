"""What the recipes share besides training: their options, the batches of views, a printed line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms.v2.functional import to_pil_image

from vicreg_losses import diagnostics

sys.path.append(str(Path(__file__).resolve().parents[1]))  # data.py of the examples
from data import DataError, load

SIZE = 28  # pixels, of an image and of a view
Transform = Callable[..., list[Tensor]]


def arguments(argv: list[str] | None, what: str) -> argparse.Namespace:
    """Parse the options that all recipes have, and seed what draws."""
    parser = argparse.ArgumentParser(description=f"Train {what}, with one line of vicreg-losses.")
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist or FOLDER")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of an epoch; by default for all images once")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--without", action="store_true", help="leave the one line out")
    options = parser.parse_args(argv)
    for name, least in {"epochs": 1, "steps": 1, "batch": 2}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            _refuse(f"--{name}: expected {least} or more, got {value}")
    torch.manual_seed(0)
    np.random.seed(0)  # lightly's solarization
    return options


class _Views(Dataset[list[Tensor]]):
    """The views of one image after the other."""

    def __init__(self, images: Dataset[tuple[Tensor, int]], transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> list[Tensor]:
        try:
            image, _ = self.images[index]
        except DataError as error:  # too many of a folder's images cannot be decoded
            _refuse(str(error))
        return self.transform(to_pil_image(image).convert("RGB"))


def batches_of_views(options: argparse.Namespace, transform: Transform) -> DataLoader[list[Tensor]]:
    """The batches of an epoch: for N images a list of views, (N, 3, SIZE, SIZE) float each."""
    try:
        images = load(options.data, size=SIZE).train
    except DataError as error:
        _refuse(str(error))
    if len(images) < options.batch:
        _refuse(f"--batch: expected at most the {len(images)} images, got {options.batch}")
    count = options.batch * (options.steps or len(images) // options.batch)
    order = RandomSampler(images, num_samples=count)
    return DataLoader(_Views(images, transform), options.batch, sampler=order)


def show(epoch: int, step: int, loss: Tensor, z: Tensor) -> None:
    """Print what tells of collapse: the standard deviation and the effective rank of ``z``."""
    found = diagnostics.embedding_report(z)
    print(
        f"epoch {epoch}  step {step:4d}  loss {loss.item():7.3f}  std {found.std_median:.3f}  "
        f"effective rank {found.effective_rank:.1f} of {min(z.shape)}"
    )


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)
