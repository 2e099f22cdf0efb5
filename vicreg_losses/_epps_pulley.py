"""The Epps-Pulley statistic of rows and its gradient, in plain PyTorch: sums of harmonics."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._torch import CHUNK, wide

# Elements of a harmonic at a time, for each thread of a CPU: the least that PyTorch's element-wise
# operations split between threads, so that all harmonics together stay in the last cache.
_CPU_GRAIN = 32768


def knot_table(knots: int, t_max: float, like: Tensor) -> Tensor:
    """Positions t, targets ``exp(-t^2/2)`` and weights of the Epps-Pulley sum: (3, knots - 1).

    The knot at t = 0 is left out: it adds 0 to the value and to the gradient. The weights are the
    trapezoid rule's, doubled for the negative half line (so 2 dt inside), times ``exp(-t^2/2)``.
    """
    if like.device.type == "cpu":
        table = torch.from_numpy(_knot_table_on_cpu(knots, t_max))
    else:
        table = _wide_knot_table(knots, t_max, wide(like), like.device)
    return table.to(like.dtype)


@functools.lru_cache(maxsize=16)
def _knot_table_on_cpu(knots: int, t_max: float) -> NDArray[np.float64]:
    return _wide_knot_table(knots, t_max, torch.float64, torch.device("cpu")).numpy()


def _wide_knot_table(knots: int, t_max: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    dt = t_max / (knots - 1)
    t = torch.arange(1, knots, dtype=dtype, device=device) * dt
    target = torch.exp(-0.5 * t.square())
    weight = 2 * dt * target
    weight[-1] /= 2
    return torch.stack((t, target, weight))


def epps_pulley_(p: Tensor, table: Tensor, keep_gradient: bool) -> Tensor:
    """Epps-Pulley statistic of each row against N(0, 1); ``p`` becomes its gradient.

    Args:
        p: projections, (K, N), contiguous; overwritten by the gradient of the sum of the returned
            values (with ``keep_gradient``).
        table: from :func:`knot_table`.
        keep_gradient: whether the gradient is needed.

    Returns:
        The statistic of each slice, (K,).
    """
    slices, samples = p.shape
    statistic = p.new_empty(slices)
    for begin, block, waves in _wave_blocks(p, table):
        value, coefficients = epps_pulley_from_means(waves.mean(-1), table, samples)
        statistic[begin : begin + len(block)] = value
        if keep_gradient:
            torch.bmm(coefficients, waves, out=block.unsqueeze(1))
    return statistic


def wave_sums(p: Tensor, table: Tensor) -> Tensor:
    """Sums over samples of ``cos(t p)``, then of ``sin(t p)``: (K, N) -> (K, 2 J)."""
    sums = p.new_zeros(len(p), 2 * table.shape[1])
    for begin, block, waves in _wave_blocks(p, table):
        torch.sum(waves, -1, out=sums[begin : begin + len(block)])
    return sums


def combine_waves_(p: Tensor, table: Tensor, coefficients: Tensor) -> None:
    """Overwrite each row by a sum of its waves: (K, N), coefficients (K, 1, 2 J)."""
    for begin, block, waves in _wave_blocks(p, table):
        torch.bmm(coefficients[begin : begin + len(block)], waves, out=block.unsqueeze(1))


def _wave_blocks(p: Tensor, table: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some rows at a time: the first one's index, the rows, and their waves (k, 2 J, N)."""
    slices, samples = p.shape
    if samples == 0:
        return
    on_cpu = p.device.type == "cpu"
    elements = _CPU_GRAIN * torch.get_num_threads() if on_cpu else CHUNK // 8
    rows = min(slices, max(1, elements // samples))
    waves = p.new_empty(rows, 2 * table.shape[1], samples)
    for begin in range(0, slices, rows):
        block = p[begin : begin + rows]
        some = waves[: block.shape[0]]
        _harmonics(block, table[0, 0], some)
        yield begin, block, some


def _harmonics(p: Tensor, step: Tensor, waves: Tensor) -> None:
    """``cos(j step p)`` for j = 1 .. J, then ``sin``: (k, N) -> ``waves`` (k, 2 J, N).

    Only powers of 4 are evaluated; the others follow from two earlier ones by the addition
    theorem. A shorter chain of evaluations would let the rounding of the first one grow by J.
    """
    count = waves.shape[1] // 2
    cosines, sines = waves[:, :count].unbind(1), waves[:, count:].unbind(1)
    anchor = 1
    for j in range(1, count + 1):
        cosine, sine = cosines[j - 1], sines[j - 1]
        if j == 4 * anchor:
            anchor = j
        if j == anchor:
            angle = p * (j * step)
            torch.cos(angle, out=cosine)
            torch.sin(angle, out=sine)
            continue
        a, b = (anchor, j - anchor) if j < 2 * anchor else (j // 2, j - j // 2)
        cos_a, sin_a, cos_b, sin_b = cosines[a - 1], sines[a - 1], cosines[b - 1], sines[b - 1]
        torch.mul(cos_a, cos_b, out=cosine).addcmul_(sin_a, sin_b, value=-1)
        torch.mul(sin_a, cos_b, out=sine).addcmul_(cos_a, sin_b)


def epps_pulley_from_means(
    means: Tensor, table: Tensor, samples: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Statistic (k,) and coefficients (k, 1, 2 J) of the waves in its gradient.

    With c, s the means of ``cos(t p)`` and ``sin(t p)``: ``T = N sum_t w [(c - phi)^2 + s^2]``, so
    ``dT/dp_i = 2 sum_t w t [s cos(t p_i) - (c - phi) sin(t p_i)]``.
    """
    t, target, weight = table
    cosine, sine = means.unflatten(1, (2, -1)).unbind(1)
    excess = cosine - target
    value = samples * ((excess.square() + sine.square()) @ weight)
    scale = 2 * weight * t
    return value, torch.cat((sine * scale, -excess * scale), 1).unsqueeze(1)
