"""Checkpoints that are whole whenever the process dies, and that run no code when they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"
PARTS = ("settings", "step", "network")  # what every one has


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


def set_aside(folder: Path, names: Sequence[str]) -> Path | None:
    """Move an earlier run's files to a folder within ``folder``: a new one loses nothing."""
    if not (folder / NAME).exists():
        return None
    aside = next(p for n in count(1) if not (p := folder / f"previous-{n}").exists())
    aside.mkdir()
    for name in (NAME, *names):
        if (folder / name).exists():
            os.replace(folder / name, aside / name)
    return aside


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or that of a folder, without running code that it may hold.

    Raises:
        CheckpointError: There is none, or it is something else.
    """
    file = path / NAME if path.is_dir() else path
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of a damaged file raises whatever it likes
        problem = f"{file}: not a checkpoint of this script: {_first_line(error)}"
        raise CheckpointError(problem) from error
    lacking = [part for part in PARTS if not isinstance(saved, dict) or part not in saved]
    if lacking:
        problem = f"it has no {', '.join(lacking)}"
        raise CheckpointError(f"{file}: not a checkpoint of this script: {problem}")
    return saved


def restore(path: object, saved: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Load the states of ``parts``.

    Raises:
        CheckpointError: One is missing, or is that of something else.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: does not fit this run: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
