"""Deviations: of samples from their mean, of views from the mean of some of them.

On a CPU large batches are taken some rows at a time, so that what is made of them stays in a cache:
fresh memory of the size of the batch costs more there than the arithmetic.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from . import _compat
from ._request import batch_shape, computing_dtype
from ._torch import center, energy, squared_sums

# Elements of a view that are taken at a time, and of a batch that is taken as a whole.
_ROWS = 1 << 19
_WHOLE = 1 << 20


class Deviations(NamedTuple):
    """Samples less their mean, and what that leaves behind.

    Attributes:
        centered: (V, N, D), fresh memory; where it was asked for.
        high, low: the mean is their sum, (V, 1, D): exact to more than a rounding.
        squares: sums of squares over samples, (V, 1, D).
    """

    centered: Tensor | None
    high: Tensor
    low: Tensor
    squares: Tensor


def batch(views: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The views as one (V, N, D) tensor of the computing dtype; whether it is a fresh copy."""
    dtype = computing_dtype(views)
    if len(views) > 1:
        return torch.stack([view.to(dtype) for view in views]), True
    z = views[0].to(dtype)
    return (z if z.dim() == 3 else z.unsqueeze(0)), views[0].dtype != dtype


def deviations(views: Sequence[Tensor], keep: bool) -> Deviations:
    """Deviations from the mean over samples, as :func:`._torch.center` has them.

    Args:
        views: one (N, D) or (V, N, D) tensor, or several (N, D).
        keep: whether the centred samples themselves are needed.
    """
    blocks = _row_blocks(views)
    if not blocks or _is_small(views):
        z, ours = batch(views)
        if torch.compiler.is_compiling() and z.device.type == "cpu" and z.dtype == torch.float32:
            high, low, squares = _moments_in_one_pass(z)
            return Deviations((z - high).sub_(low) if keep else None, high, low, squares)
        centered, high, low = center(z, inplace=ours)
        return Deviations(centered, high, low, squared_sums(centered))
    flat, shape = _flat(views), batch_shape(views)
    dtype = computing_dtype(views)
    scratch = flat[0].new_empty((2, blocks[0].stop, shape[2]), dtype=dtype)
    kept = scratch.new_empty(shape) if keep else None
    high = torch.stack([view.mean(0, keepdim=True, dtype=dtype) for view in flat])
    low = torch.zeros_like(high)
    squares = torch.zeros_like(high, dtype=torch.float64)  # over many blocks

    def centered_rows(i: int, rows: slice, out: Tensor) -> Tensor:
        some = flat[i][rows]
        return torch.sub(some, high[i], out=out[: len(some)])

    for i in range(len(flat)):
        for rows in blocks:
            low[i].add_(centered_rows(i, rows, scratch[0]).sum(0, keepdim=True))
        low[i].div_(shape[1])
        for rows in blocks:
            x = centered_rows(i, rows, scratch[0] if kept is None else kept[i, rows]).sub_(low[i])
            squares[i].add_(torch.mul(x, x, out=scratch[1, : len(x)]).sum(0, keepdim=True))
    return Deviations(kept, high, low, squares.to(dtype))


def _moments_in_one_pass(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean as a sum of two, and the sums of squares, from wide sums about the first sample.

    Of loops that a compiler makes. No sample is further from the mean than sqrt(N) standard
    deviations, so at most N times the squares cancel, and float64 leaves float32's digits up to
    millions of samples.
    """
    pivot = z[:, :1].double()
    x = z.double() - pivot
    total = x.sum(1, keepdim=True)
    middle = total / z.shape[1]
    squares = (x.square().sum(1, keepdim=True) - total * middle).clamp_(min=0)
    mean = pivot + middle
    high = mean.to(z.dtype)
    return high, (mean - high).to(z.dtype), squares.to(z.dtype)


def scaled_deviations(views: Sequence[Tensor], high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """``(z - high - low) * scale``, (V, N, D).

    Args:
        views: as above.
        high: as :class:`Deviations` has it.
        low: likewise.
        scale: (V, 1, D).
    """
    blocks = _row_blocks(views, scale)
    if not blocks:
        return (batch(views)[0] - high).sub_(low) * scale
    result = high.new_empty(batch_shape(views))
    for i, view in enumerate(_flat(views)):
        for rows in blocks:
            torch.sub(view[rows], high[i], out=result[i, rows]).sub_(low[i]).mul_(scale[i])
    return result


def squared_distances(views: Sequence[Tensor], num_global: int) -> Tensor:
    """Sum over views, samples and dimensions of ``(z - c)^2``, 0-dim, of the wide dtype.

    Args:
        views: as above.
        num_global: c is the mean of so many of the first views.
    """
    flat = _flat(views)
    parts = []
    for rows in _row_blocks(views) or [slice(None)]:
        some = [view[rows] for view in flat]
        if num_global == len(flat) == 2:  # z - c = -difference / 2, difference / 2
            parts.append(energy(_difference(some)) / 2)
        else:
            parts += [energy(part) for part in _distances(some, num_global)]
    return torch.stack(parts).sum()


def add_slopes(
    total: Tensor | None, views: Sequence[Tensor], num_global: int, scale: Tensor
) -> Tensor:
    """``total`` plus ``scale`` times the gradient of :func:`squared_distances`; may overwrite it.

    That gradient is ``2 (e - [among the first G] * sum(e) / G)`` with the distances ``e = z - c``.

    Args:
        total: (V, N, D), or ``None`` for 0.
        views: as above.
        num_global: G.
        scale: 0-dim.
    """
    flat, blocks = _flat(views), _row_blocks(views, scale)
    if not blocks or (total is None and _is_small(views)):
        slopes = torch.stack(_slopes(flat, num_global, scale))
        return slopes if total is None else total + slopes
    if total is None:
        total = flat[0].new_zeros(batch_shape(views), dtype=computing_dtype(views))
    for rows in blocks:
        for i, slope in enumerate(_slopes([view[rows] for view in flat], num_global, scale)):
            total[i, rows].add_(slope)
    return total


def _slopes(views: Sequence[Tensor], num_global: int, scale: Tensor) -> list[Tensor]:
    if num_global == len(views) == 2:
        slope = _difference(views) * scale
        return [-slope, slope]
    parts = _distances(views, num_global)
    if num_global < len(views):
        share = reduce(torch.add, parts[num_global:]) / num_global
        parts = [part - share if i < num_global else part for i, part in enumerate(parts)]
    return [part * (2 * scale) for part in parts]


def _row_blocks(views: Sequence[Tensor], scale: Tensor | None = None) -> list[slice]:
    """Which samples to take at a time; nothing, where results cannot be written into memory."""
    if views[0].device.type != "cpu" or torch.compiler.is_compiling() or _compat.in_transform():
        return []
    if scale is not None and _compat.is_batched_gradient(scale):
        return []
    _, samples, dimensions = batch_shape(views)
    rows = max(1, samples if _is_small(views) else _ROWS // dimensions)
    return [slice(i, min(i + rows, samples)) for i in range(0, samples, rows)]


def _is_small(views: Sequence[Tensor]) -> bool:
    return math.prod(batch_shape(views)) <= _WHOLE


def _flat(views: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(views) > 1:
        return views
    return views[0].unbind(0) if views[0].dim() == 3 else views


def _difference(views: Sequence[Tensor]) -> Tensor:
    dtype = computing_dtype(views)
    return views[1].to(dtype) - views[0].to(dtype)


def _distances(views: Sequence[Tensor], num_global: int) -> list[Tensor]:
    """Each view less the mean of the first ones, by differences to view 0.

    Differences of views are exact to their own rounding at any common offset; a mean is not.
    """
    dtype = computing_dtype(views)
    origin = views[0].to(dtype)
    parts = [view.to(dtype) - origin for view in views[1:]]
    if num_global == 1:
        return [torch.zeros_like(origin), *parts]
    middle = reduce(torch.add, parts[: num_global - 1]) / num_global
    return [-middle, *(part - middle for part in parts)]
