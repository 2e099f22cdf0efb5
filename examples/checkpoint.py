"""What a training consists of, saved and restored."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

Settings = argparse.Namespace


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message is one line and names the path."""


@dataclass
class Run:
    """One objective's training: all that changes while it trains, and so all that is saved.

    It is the same on all ranks. ``model`` is the network, or the network over all ranks.
    """

    name: str
    network: nn.Sequential
    model: nn.Module
    objective: nn.Module
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    STATEFUL = ("network", "objective", "optimiser")
    PLAIN = ("name", "step", "seconds", "history")

    def save(self, path: Path, settings: Settings) -> None:
        """Write a checkpoint that is whole whenever the process dies."""
        saved = {key: getattr(self, key).state_dict() for key in self.STATEFUL}
        saved |= {key: getattr(self, key) for key in self.PLAIN}
        local = ("resume", "out", "device", "workers")
        kept = {key: value for key, value in vars(settings).items() if key not in local}
        saved["settings"] = kept | {"data": settings.data and str(settings.data)}
        scratch = path.with_suffix(".tmp")
        torch.save(saved, scratch)
        os.replace(scratch, path)

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue exactly where ``checkpoint`` was saved."""
        for key in self.STATEFUL:
            getattr(self, key).load_state_dict(checkpoint[key])
        for key in self.PLAIN:
            setattr(self, key, checkpoint[key])


def load_checkpoints(path: Path) -> dict[str, Any]:
    """Read one checkpoint, or all of a folder, by objective."""
    files = sorted(path.glob("checkpoint-*.pt")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: no checkpoints in this folder")
    found = {}
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            found[checkpoint["name"]] = checkpoint
        except (OSError, EOFError, LookupError, RuntimeError, TypeError, UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{file}: not a checkpoint of this script: {reason}") from error
    return found
