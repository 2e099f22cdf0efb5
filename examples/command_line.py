"""The command line of ``pretrain.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings import ADDED, DEVICES, LOSSES, OPTIMIZERS, PRECISIONS, PRESETS


def parse(argv: Sequence[str] | None, about: str) -> tuple[dict[str, Any], argparse.Namespace]:
    """What the command line gives, and what it asks to do: ``quick``, ``resume``, ``eval``."""
    parsed = vars(argument_parser(about).parse_args(argv))
    if "add" in parsed:
        parsed["add"] = dict(parsed["add"])
    asked = {key: parsed.pop(key, None) for key in ("quick", "resume", "eval")}
    return parsed, argparse.Namespace(**asked)


def argument_parser(about: str) -> argparse.ArgumentParser:
    """The command line; what it leaves out is not in the namespace."""
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        epilog="Defaults in brackets are those of VICReg's paper for image folders; the preset "
        "'small', for digits and fashion-mnist, has its own. See settings.py for all of them.",
    )
    group = parser.add_argument_group("what to train on").add_argument
    group("--data", help="digits [default], fashion-mnist, a torchvision data set, or a folder")
    group("--root", help="where torchvision's data sets are, or are downloaded to [data]")
    group("--image-size", type=positive, help="of global views [that of the set; of files 224]")
    group("--local-size", type=positive, help="of local views [3/7 of the image size]")
    group("--stored-size", type=positive, help="of what is cropped [files: 3/2 of the image size]")
    group("--limit", type=positive, help="use no more images than this")
    group("--workers", type=natural, help="loader processes of each rank [as many as cores]")
    group = parser.add_argument_group("what to train with").add_argument
    group("--loss", choices=LOSSES, help="the objective [vicreg]")
    group("--add", nargs="+", type=added, metavar="TERM[=WEIGHT]", help=_ADD)
    group("--global-views", type=positive, help="large views of each image [2]")
    group("--local-views", type=natural, help="small views of each image [0]")
    group("--preset", choices=PRESETS, help="where defaults come from [by the data]")
    group("--arch", help="torchvision ResNet, or resnet-tiny [resnet50]")
    group("--expander", type=widths, help="layers from features to embeddings [8192-8192-8192]")
    group("--predictor", type=positive, help="hidden width of SimSiam's and BYOL's predictor")
    group = parser.add_argument_group("how to train").add_argument
    group("--optimizer", choices=OPTIMIZERS, help="[lars]")
    group("--lr", type=above_zero, help="highest learning rate, for a batch of 256 [0.2]")
    group("--weight-decay", type=not_negative, help="not of biases and norms [1e-6]")
    group("--epochs", type=positive, help="passes over the images [100]")
    group("--warmup-epochs", type=not_negative, help="of them, with rising learning rate [10]")
    group("--batch-size", type=int, help="images in a pass, on all ranks [2048]")
    group("--accumulate", type=positive, help="passes in an optimiser step [1]")
    group("--clip", type=above_zero, help="largest norm of the gradient [none]")
    group("--ema", type=float, help="decay of an averaged network; 0 for none [byol: 0.996]")
    group("--precision", choices=PRECISIONS, help="of the network [32]; the losses take any")
    group("--compile", action="store_true", help="compile the network with torch.compile")
    group("--seed", type=seed, help="of weights, order, views and slices [0]")
    group("--device", choices=DEVICES, help="[auto]")
    group = parser.add_argument_group("what to write, and when").add_argument
    group("--out", help="folder for checkpoint, backbone, curves, results [runs/LOSS-DATA]")
    group("--save-every", type=positive, metavar="STEPS", help="save more often than every epoch")
    group("--log-every", type=positive, metavar="STEPS", help="[a 64th of the steps]")
    group("--eval-every", type=positive, metavar="EPOCHS", help="k-NN meanwhile [only at the end]")
    group = parser.add_mutually_exclusive_group().add_argument
    group("--quick", action="store_true", help="short, to see that all of it runs")
    group("--resume", type=Path, metavar="PATH", help="continue a checkpoint, or that of a folder")
    group("--eval", type=Path, metavar="PATH", help="train a linear probe on a checkpoint instead")
    return parser


_ADD = "one line more: " + ", ".join(f"{name}[={weight:g}]" for name, weight in ADDED.items())


def added(text: str) -> tuple[str, float]:
    """A term to add, and its weight."""
    name, _, weight = text.partition("=")
    if name not in ADDED:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(ADDED)}, got {name!r}")
    return name, above_zero(weight) if weight else ADDED[name]


def widths(text: str) -> str:
    """Layer widths joined by "-"."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split("-")):
        raise argparse.ArgumentTypeError(f"expected widths such as 8192-8192-8192, got {text!r}")
    return text


def positive(text: str) -> int:
    """An argument of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def seed(text: str) -> int:
    """A number that may be multiplied by a million and stay a seed."""
    if not 0 <= (value := int(text)) < 2**40:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**40 - 1, got {text}")
    return value


def natural(text: str) -> int:
    """An argument of 0 or more."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number, 0 or more, got {text}")
    return value
