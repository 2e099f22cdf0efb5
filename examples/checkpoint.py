"""Checkpoints that are whole whenever the process dies, and that run no code when they are read."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

NAME = "checkpoint.pt"


class CheckpointError(Exception):
    """A checkpoint cannot be read or written; the message is one line and names the path."""


def write(path: Path, saved: Any) -> None:
    """Replace ``path`` by what is saved, or leave it as it is.

    The new file is complete, and on the disk, before it takes the name of the old one.

    Raises:
        CheckpointError: It cannot be written, e.g. because the disk is full.
    """
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        with open(scratch, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
        scratch.unlink(missing_ok=True)
        kept = "; the previous one is as it was" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {_first_line(error)}{kept}") from error


def set_aside(folder: Path) -> Path | None:
    """Rename the checkpoint of an earlier run in ``folder``, so that a new one loses nothing."""
    path, aside = folder / NAME, folder / "checkpoint-previous.pt"
    if not path.exists():
        return None
    os.replace(path, aside)
    return aside


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or that of a folder, without running code that it may hold.

    Raises:
        CheckpointError: There is none, or it is something else.
    """
    file = path / NAME if path.is_dir() else path
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, UnpicklingError) as error:
        problem = f"{file}: not a checkpoint of this script: {_first_line(error)}"
        raise CheckpointError(problem) from error
    if not isinstance(saved, dict) or "settings" not in saved:
        raise CheckpointError(f"{file}: not a checkpoint of this script: it has no settings")
    return saved


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
