"""The Epps-Pulley sketch as plain operations, which a compiler fuses into two loops.

One loop evaluates all harmonics of a projection and adds them up, the other evaluates them again
and combines them into the gradient: nothing of size N x K but the projections and their gradient.
Called one by one the operations would be slow; eager code takes :mod:`._epps_pulley`.
"""

import torch
from torch import Tensor

from ._epps_pulley import terms, wide_knot_table
from ._torch import wide


def epps_pulley_sketch(
    x: Tensor, directions: Tensor, knots: int, t_max: float, keep_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Mean over slices and views of the statistic of the projections, and its gradient.

    Args:
        x: samples, (V, N, D).
        directions: unit columns, (D, K), of the dtype of ``x``.
        knots: number of points t.
        t_max: the last of them.
        keep_gradient: whether the gradient is needed.

    Returns:
        The mean, 0-dim of the wide dtype, and its gradient (V, N, D).
    """
    views, samples, dimensions = x.shape
    slices = directions.shape[1]
    table = wide_knot_table(knots, t_max, wide(x), x.device).to(x.dtype)
    p = directions.T @ x.reshape(-1, dimensions).T
    cosines, sines = _harmonics(p.view(slices, views, samples), table)
    c, s = (torch.stack([wave.sum(-1) for wave in waves], -1) for waves in (cosines, sines))
    value, a, b = terms(c / samples, s / samples, table, samples)
    mean = value.mean(dtype=wide(x))
    if not keep_gradient:
        return mean, None
    slope = sum(
        a[..., j, None] * cosines[j] + b[..., j, None] * sines[j] for j in range(len(cosines))
    )
    assert isinstance(slope, Tensor)
    slope = slope.view(slices, -1).T @ (directions.T / (slices * views))
    return mean, slope.view(x.shape)


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
