"""Where a training runs: device, ranks and precision by Lightning Fabric, loader processes."""

from __future__ import annotations

from pathlib import Path

import ranks
import torch
from data import Images
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from settings import Settings, SettingsError

# Views of this size or less are 1x1 before the last stage of a ResNet, whose 3x3 convolution of
# stride 2 leaves most of its weights' gradient unwritten: oneDNN in bfloat16, seen in PyTorch 2.15.
ONE_PIXEL = 16


def new_fabric(settings: Settings, out: Path | None = None, step: int = 0) -> Fabric:
    """Devices, precision and ranks, by Lightning Fabric; the ranks are ``torchrun``'s.

    TensorBoard's points after ``step`` are those of a run that was killed, and are dropped.
    """
    device = place(settings.device)
    precision = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.precision]
    plugin = MixedPrecision(precision, device.type) if precision.endswith("mixed") else Precision()
    plugins = [plugin, TorchElasticEnvironment()] if ranks.size() > 1 else [plugin]
    logged = [TensorBoardLogger(out, "", "tensorboard", purge_step=step + 1)] if out else []
    fabric = Fabric(
        accelerator=device.type,
        devices=ranks.neighbours(),
        num_nodes=ranks.size() // ranks.neighbours(),
        strategy=DDPStrategy() if ranks.size() > 1 else "auto",
        plugins=plugins,
        loggers=logged,
    )
    fabric.launch()
    return fabric


def place(device: str) -> torch.device:
    """The kind of device that "auto" is here."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if has["cuda"] else "cpu"
    if not has.get(device, True):
        raise SettingsError(f"--device: expected one that this machine has, got {device}")
    return torch.device(device)


def check(settings: Settings) -> None:
    """Refuse a device that is not here, and what PyTorch computes wrongly on it."""
    views = [settings.image_size] + [settings.local_size] * bool(settings.local_views)
    device = place(settings.device)
    if device.type == "cpu" and settings.precision == "bf16" and min(views) <= ONE_PIXEL:
        raise SettingsError(
            f"--precision: bf16 on a CPU: expected views of more than {ONE_PIXEL} pixels, "
            f"got {min(views)}; take 32 or fp16"
        )


def precision_of(fabric: Fabric) -> Precision:
    """Fabric's precision plugin: it has the scaler of fp16, which Fabric does not save."""
    return fabric.strategy.precision


def workers(settings: Settings, images: Images) -> int:
    """Loader processes of this rank."""
    return images.workers if settings.workers is None else settings.workers
