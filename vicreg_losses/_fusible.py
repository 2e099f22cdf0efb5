"""The sketches as plain operations around one pass over all projections, for compiled code.

Inductor fuses the Epps-Pulley statistic into two loops: one evaluates all harmonics of a projection
and adds them up, the other evaluates them again and combines them into the gradient.
Called one by one the operations would be slow; eager code takes :mod:`._epps_pulley`. The sort of
the other statistic is an opaque operator.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from . import _compat
from ._epps_pulley import terms, wide_knot_table
from ._torch import long_sum, quantiles, wasserstein_, wide

Statistic: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def sketch(
    x: Tensor, directions: Tensor, statistic: Statistic, factor: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Mean over slices and views of a statistic of the projections, and its gradient.

    Args:
        x: samples, (V, N, D).
        directions: unit columns, (D, K), of the dtype of ``x``.
        statistic: maps projections (K V, N) to values (K V,) and their gradient, if it is needed.
        factor: what that gradient is still to be multiplied by.

    Returns:
        The mean, 0-dim of the wide dtype, and its gradient (V, N, D).
    """
    views, samples, dimensions = x.shape
    slices = directions.shape[1]
    p = directions.T @ x.reshape(-1, dimensions).T
    value, slope = statistic(p.view(slices * views, samples))
    mean = value.mean(dtype=wide(x))
    if slope is None:
        return mean, None
    back = directions.T * (factor / (slices * views))
    return mean, (slope.view(slices, -1).T @ back).view(x.shape)


def epps_pulley(knots: int, t_max: float, keep_gradient: bool) -> Statistic:
    """The Epps-Pulley statistic of each row against N(0, 1)."""

    def statistic(p: Tensor) -> tuple[Tensor, Tensor | None]:
        samples = p.shape[1]
        table = wide_knot_table(knots, t_max, wide(p), p.device).to(p.dtype)
        cosines, sines = _harmonics(p, table)
        c, s = (torch.stack([long_sum(wave, 1) for wave in waves], 1) for waves in (cosines, sines))
        value, a, b = terms(c / samples, s / samples, table, samples)
        if not keep_gradient:
            return value, None
        slope = torch.zeros_like(p)
        for j, (cosine, sine) in enumerate(zip(cosines, sines, strict=True)):
            slope = slope + a[:, j : j + 1] * cosine + b[:, j : j + 1] * sine
        return value, slope

    return statistic


def wasserstein(rule: str, keep_gradient: bool) -> Statistic:
    """Mean square of sorted projections less the quantiles; the gradient lacks ``2 / N``."""

    def statistic(p: Tensor) -> tuple[Tensor, Tensor | None]:
        value: Tensor = _wasserstein_op(p, rule, keep_gradient)
        return value, p if keep_gradient else None

    return statistic


@_compat.operator(
    "wasserstein_(Tensor(a!) p, str rule, bool keep_gradient) -> Tensor",
    lambda p, *_: p.new_empty(p.shape[0]),
)
def _wasserstein_op(p: Tensor, rule: str, keep_gradient: bool) -> Tensor:
    return wasserstein_(p, quantiles(p.shape[1], rule, p), keep_gradient)


def _harmonics(p: Tensor, table: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """``cos(t p)`` and ``sin(t p)`` for each t, from powers as in :mod:`._epps_pulley`."""

    def evaluate(j: int) -> tuple[Tensor, Tensor]:
        angle = p * (j * table[0, 0])
        return torch.cos(angle), torch.sin(angle)

    count = table.shape[1]
    waves = [evaluate(1)]
    while (known := len(waves)) < count:
        cosine, sine = waves[-1]
        waves += [(c * cosine - s * sine, s * cosine + c * sine) for c, s in waves[: count - known]]
        known = len(waves)
        if known < count and known.bit_length() % 2:  # a power of 4
            waves[-1] = evaluate(known)
    cosines, sines = zip(*waves, strict=True)
    return list(cosines), list(sines)
