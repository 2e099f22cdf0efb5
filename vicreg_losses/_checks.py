"""Every user error: which argument, what was expected, what came."""

import math
import os
import warnings
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import _compat

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Largest distance from 1 of the length of a unit vector that was rounded to 16 bits.
_UNIT_TOLERANCE = 1e-2


def one_of(name: str, value: object, valid: Sequence[str]) -> None:
    """Check an option against its valid values."""
    if value not in valid:
        listed = ", ".join(repr(v) for v in valid)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}.")


def integer(name: str, value: object, least: int) -> None:
    """Check a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}.")


def seed(name: str, value: object) -> None:
    """Check the seed of a generator."""
    integer(name, value, 0)
    if value >= 1 << 63:  # type: ignore[operator]
        raise ValueError(f"{name}: expected less than 2^63, got {value}.")


def real(name: str, value: object, *, positive: bool = False) -> None:
    """Check a finite number that is not negative."""
    if torch.compiler.is_compiling():  # a float may be symbolic; the constructor has checked it
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        kind = "positive" if positive else "not negative"
        raise ValueError(f"{name}: expected a finite number that is {kind}, got {value}.")


def fraction(name: str, value: object) -> None:
    """Check a number from 0 to 1."""
    real(name, value)
    if value > 1:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}.")


def embeddings(
    views: Tensor | Sequence[Tensor], min_views: int = 1, min_samples: int = 2
) -> tuple[Tensor, ...]:
    """Check the embeddings of one or more views.

    Args:
        views: one (N, D) or (V, N, D) tensor, or a sequence of (N, D) tensors.
        min_views: the least number of views.
        min_samples: the least number of samples.

    Returns:
        The tensor as given, alone, or the views, each (N, D).
    """
    several = (list, tuple)  # torch 2.8 compiles no isinstance with a union
    tensors: tuple[Tensor, ...]
    tensors = tuple(views) if isinstance(views, several) else (views,)  # type: ignore[assignment]
    if not tensors:
        raise ValueError("embeddings: expected at least one view, got none.")
    for tensor in tensors:
        embedding_tensor(tensor)
    first = tensors[0]
    if len(tensors) == 1:
        if first.dim() not in (2, 3):
            raise ValueError(
                "embeddings: expected shape (N, D), or (V, N, D) for V views, got "
                f"{_shape(first)}. Flatten or pool other dimensions first."
            )
    else:
        _same_views(tensors)
    samples, dimensions = first.shape[-2:]
    count = first.shape[0] if first.dim() == 3 else len(tensors)
    if count < min_views:
        raise ValueError(f"embeddings: expected at least {min_views} view(s), got {count}.")
    if samples < min_samples:
        raise ValueError(
            f"embeddings: expected at least {min_samples} samples in the batch, got {samples} "
            f"(shape {_shape(first)}); batch statistics need more than one."
        )
    if dimensions < 1:
        raise ValueError(f"embeddings: expected at least 1 dimension, got shape {_shape(first)}.")
    return tensors


def embedding_tensor(tensor: object) -> None:
    """Check that it is a dense floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"embeddings: expected a torch.Tensor, got {type(tensor).__name__}.")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            "embeddings: expected a plain torch.Tensor, got a DTensor; pass the local shard, "
            "tensor.to_local()."
        )
    if _compat.is_batched(tensor):
        raise TypeError(
            "embeddings: expected a tensor outside torch.vmap, got one inside it; these losses "
            "are statistics of a batch. Pass the views as one (V, N, D) tensor."
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(
            f"embeddings: expected a dense tensor, got layout {tensor.layout}; use .to_dense(), or "
            ".to_padded_tensor() and a mask for a nested one."
        )
    if tensor.dtype not in FLOATING:
        raise TypeError(
            "embeddings: expected dtype float16, bfloat16, float32 or float64, got "
            f"{str(tensor.dtype).removeprefix('torch.')}; convert with .float()."
        )


def _same_views(tensors: tuple[Tensor, ...]) -> None:
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        if tensor.dim() != 2:
            raise ValueError(
                f"embeddings: expected shape (N, D) for each of several views, got {_shape(tensor)}"
                f" for view {i}. Pass one (V, N, D) tensor alone."
            )
        if tensor.shape != first.shape:
            raise ValueError(
                f"embeddings: expected views of one shape, got {_shape(first)} for view 0 and "
                f"{_shape(tensor)} for view {i}."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"embeddings: expected views on one device, got {first.device} for view 0 and "
                f"{tensor.device} for view {i}."
            )


def directions(tensor: object, like: Tensor | None = None) -> None:
    """Check explicit directions against embeddings; their length where no device need be read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"directions: expected a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"directions: expected a floating dtype, got {tensor.dtype}.")
    if tensor.layout != torch.strided:
        raise TypeError(f"directions: expected a dense tensor, got layout {tensor.layout}.")
    dimensions = "D" if like is None else like.shape[-1]
    known = tensor.dim() == 2 and (like is None or tensor.shape[0] == like.shape[-1])
    if not known or tensor.numel() < 1:
        raise ValueError(
            f"directions: expected shape (D, K) = ({dimensions}, K), one unit column a slice, got "
            f"{_shape(tensor)}."
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"directions: expected device {like.device}, got {tensor.device}.")
    if tensor.requires_grad:
        raise ValueError("directions: expected no requires_grad, as they get no gradient; detach.")
    debug = os.environ.get("VICREG_LOSSES_DEBUG", "") not in ("", "0")
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return
    if tensor.device.type == "meta" or not (tensor.device.type == "cpu" or debug):
        return
    norms = torch.linalg.vector_norm(tensor.detach().float(), dim=0)
    if not bool(((norms - 1).abs() <= _UNIT_TOLERANCE).all()):
        raise ValueError(
            "directions: expected columns of length 1, got lengths from "
            f"{norms.min().item():.3g} to {norms.max().item():.3g}; divide by the norm over dim 0."
        )


_LOOKS = 1000  # calls that are looked at: a trainer that normalizes does so from the start
_looks: dict[str, int] = {}


def warn_of_unit_norm(name: str, tensors: Sequence[Tensor], gamma: float = 1.0) -> None:
    """Warn, once for each name, if the rows of the first view have length 1.

    Looked at on the CPU only, as elsewhere it would wait for the device, and in the first calls. A
    standard deviation of D^-1/2 is all that such rows can reach, so a ``gamma`` of that is no cause
    to warn.
    """
    first = tensors[0]
    if torch.compiler.is_compiling():
        return
    looks = _looks.get(name, 0)
    if looks >= _LOOKS:
        return
    _looks[name] = looks + 1
    if first.device.type != "cpu" or type(first) not in (Tensor, torch.nn.Parameter):
        return
    if first.numel() == 0:
        return
    view = first.detach() if first.dim() == 2 else first.detach()[0]
    reachable = view.shape[1] ** -0.5
    if gamma <= 1.001 * reachable:
        return
    # One row tells at most calls.
    if not _has_unit_length(view.select(0, 0)) or not all(map(_has_unit_length, view[1:16])):
        return
    _looks[name] = _LOOKS
    warnings.warn(
        f"{name}: the rows of the embeddings have length 1, so their standard deviation cannot "
        f"exceed D^-1/2 = {reachable:.3g} per dimension. Regularize them before they are "
        "normalized, or multiply them by D^1/2 (or set the hinge's gamma to D^-1/2 and its eps to "
        "1e-4 / D).",
        UserWarning,
        stacklevel=4,
    )


def forget_warning(name: str) -> None:
    """Let the next calls warn again."""
    _looks.pop(name, None)


def _has_unit_length(row: Tensor) -> bool:
    x = row.float()
    return abs(torch.dot(x, x).item() - 1) <= 2 * _UNIT_TOLERANCE


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
