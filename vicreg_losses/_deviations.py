"""Deviations of views from the mean of some of them: the arithmetic of the invariance term."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from ._request import computing_dtype
from ._torch import energy


def squared_deviations(views: Sequence[Tensor], num_global: int) -> Tensor:
    """Sum over views, samples and dimensions of ``(z - c)^2``, 0-dim, of the wide dtype.

    Args:
        views: one (V, N, D) tensor, or several (N, D).
        num_global: c is the mean of so many of the first.
    """
    flat = _flat(views)
    if num_global == len(flat) == 2:
        return energy(_difference(flat)) / 2  # z - c = -difference / 2, difference / 2
    return torch.stack([energy(part) for part in _deviations(flat, num_global)]).sum()


def slopes(
    views: Sequence[Tensor], num_global: int, scale: Callable[[float], Tensor]
) -> list[Tensor]:
    """``scale(2)`` times the gradient of half of it for each view, or of (V, N, D) at once.

    That gradient is ``e - [among the first G] * sum(e) / G`` with the deviations e.

    Args:
        views: as above.
        num_global: G.
        scale: gives a 0-dim scale times a number.
    """
    flat = _flat(views)
    if num_global == len(flat) == 2:
        slope = _difference(flat).mul_(scale(1))
        parts = [-slope, slope]
    else:
        parts = _deviations(flat, num_global)
        if num_global < len(flat):
            share = reduce(torch.add, parts[num_global:]) / num_global
            for part in parts[:num_global]:
                part -= share
        twice = scale(2)
        parts = [part.mul_(twice) for part in parts]
    return [torch.stack(parts)] if views[0].dim() == 3 else parts


def _flat(views: Sequence[Tensor]) -> Sequence[Tensor]:
    return views[0].unbind(0) if views[0].dim() == 3 else views


def _difference(views: Sequence[Tensor]) -> Tensor:
    dtype = computing_dtype(views)
    return views[1].to(dtype) - views[0].to(dtype)


def _deviations(views: Sequence[Tensor], num_global: int) -> list[Tensor]:
    """Each view less the mean of the first ones, by differences to view 0.

    Differences of views are exact to their own rounding at any common offset; a mean is not.
    """
    dtype = computing_dtype(views)
    origin = views[0].to(dtype)
    parts = [torch.zeros_like(origin), *(view.to(dtype) - origin for view in views[1:])]
    if num_global > 1:
        middle = reduce(torch.add, parts[1:num_global]) / num_global
        for part in parts:
            part -= middle
    return parts
