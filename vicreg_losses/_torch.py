"""Primitives in plain PyTorch, for any device, in float32 or float64.

No autograd, no collectives, no host sync off the CPU. Batches are (V, N, D): V views, N samples,
D dimensions; K is the number of slices.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._sort import sort_residual_

# Elements of projections alive at a time, for each thread of a CPU or on another device: enough to
# keep a GEMM and the sort busy, and a small part of a cache or of the memory.
_CPU_CHUNK = 1 << 21
_CHUNK = 1 << 24
# Elements of a harmonic at a time, for each thread of a CPU: the least that PyTorch's element-wise
# operations split between threads, so that all harmonics together stay in the last cache.
_CPU_GRAIN = 32768
# Off-diagonal share of the Gram energy below which float32 cannot tell it from the diagonal.
_DIAGONAL_DOMINATES = 0.25


def wide(x: Tensor) -> torch.dtype:
    """The dtype for long sums: float64, but for a device that has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside, whatever the caller has."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def energy(x: Tensor) -> Tensor:
    """Sum of squares over all elements, as a 0-dim tensor of the wide dtype.

    In wide precision all along: a float32 accumulator for a long sum is wrong by percents, and
    squares leave float32's range long before the loss does.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide(x))
    return norm.square_()


def center(z: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """Subtract the mean over samples.

    Twice: the second pass takes off what the rounding of the mean left, which in float32 at an
    offset of 1e6 would reach the statistics. What a constant column leaves is a multiple of its
    last place, so the second mean is exact and the column becomes exactly 0.

    Args:
        z: embeddings, (V, N, D).
        inplace: whether ``z`` may be overwritten.

    Returns:
        The centred embeddings (V, N, D) and the mean (V, 1, D).
    """
    high = z.mean(1, keepdim=True)
    centered = z.sub_(high) if inplace else z - high
    low = centered.mean(1, keepdim=True)
    return centered.sub_(low), low.add_(high)


def squared_sums(centered: Tensor) -> Tensor:
    """Sum over samples of the squares: (V, N, D) -> (V, 1, D)."""
    return centered.square().sum(1, keepdim=True)


def covariance_energy(centered: Tensor, squares: Tensor, gram: bool) -> tuple[Tensor, Tensor]:
    """Sum over views of the squared off-diagonal elements of ``centered^T centered``.

    Both forms use ``||Xc^T Xc||_F = ||Xc Xc^T||_F`` and compute half of a symmetric product.

    Args:
        centered: centred embeddings, (V, N, D).
        squares: sums of squares over samples, (V, 1, D): the diagonal.
        gram: whether to form the N x N Gram matrix, else the D x D product.

    Returns:
        The energy, 0-dim of the wide dtype, and the product: (V, N, N), or (V, D, D) with a zero
        diagonal.
    """
    left = centered if gram else centered.mT
    inner, total = _symmetric_product(left, zero_diagonal=not gram)
    if gram:
        diagonal = energy(squares)
        if _diagonal_dominates(centered, diagonal, total):
            exact = centered.double()
            total = _symmetric_product(exact, zero_diagonal=False)[1]
            diagonal = energy(squared_sums(exact))
        total = (total - diagonal).clamp_(min=0)
    return total, inner


def covariance_product(
    centered: Tensor, squares: Tensor, inner: Tensor, gram: bool, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A quarter of the gradient of the energy, times ``scale``.

    With C the product of the D x D form without its diagonal, m the diagonal and G the N x N form:
    ``Xc C = G Xc - Xc diag(m)``.

    Args:
        centered: as given to :func:`covariance_energy`.
        squares: likewise.
        inner: from there.
        gram: likewise.
        scale: 0-dim factor.

    Returns:
        A matrix (V, N, D), and a factor (V, 1, D) of ``centered`` that is still to be added to it:
        the Gram form leaves its diagonal to a pass that the caller may share.
    """
    if not gram:
        return torch.bmm(centered, inner * scale), None
    if _diagonal_dominates(centered, energy(squares), energy(inner)):
        exact = centered.double()
        product = torch.bmm(torch.bmm(exact, exact.mT), exact)
        product.addcmul_(exact, squared_sums(exact), value=-1)
        return product.mul_(scale).to(centered.dtype), None
    return torch.bmm(inner * scale, centered), squares * -scale


def _diagonal_dominates(centered: Tensor, diagonal: Tensor, total: Tensor) -> bool:
    """Whether float32 would lose the rest. A host decision: off the CPU it would wait, so no."""
    if centered.dtype != torch.float32 or centered.device.type != "cpu":
        return False
    return bool(total - diagonal < _DIAGONAL_DOMINATES * total)


def _symmetric_product(left: Tensor, zero_diagonal: bool) -> tuple[Tensor, Tensor]:
    """``left @ left^T`` by block rows of the lower triangle, and its energy."""
    size = left.shape[1]
    blocks = min(8, size // 128)
    if blocks < 2:
        inner = torch.bmm(left, left.mT)
        if zero_diagonal:
            inner.diagonal(dim1=1, dim2=2).zero_()
        return inner, energy(inner)
    inner = left.new_empty(left.shape[0], size, size)
    total = torch.zeros((), dtype=wide(left), device=left.device)
    for i in range(blocks):
        begin, end = size * i // blocks, size * (i + 1) // blocks
        square = torch.bmm(left[:, begin:end], left[:, begin:end].mT)
        if zero_diagonal:
            square.diagonal(dim1=1, dim2=2).zero_()
        inner[:, begin:end, begin:end] = square
        total += energy(square)
        if begin:
            below = torch.bmm(left[:, begin:end], left[:, :begin].mT)
            inner[:, begin:end, :begin] = below
            inner[:, :begin, begin:end] = below.mT
            total += 2 * energy(below)
    return inner, total


def quantiles(samples: int, rule: str, like: Tensor) -> Tensor:
    """Targets of the sorted projections: increasing, symmetric about 0, (N,).

    Args:
        samples: N.
        rule: "paper", ``ndtri(i / (N + 1))``; or "exact", the mean of N(0, 1) over each of N bins
            of equal probability.
        like: gives the device and the dtype.
    """
    if like.device.type == "cpu":
        q = torch.from_numpy(_quantiles_on_cpu(samples, rule))
    else:
        q = _wide_quantiles(samples, rule, wide(like), like.device)
    return q.to(like.dtype)


@functools.lru_cache(maxsize=16)
def _quantiles_on_cpu(samples: int, rule: str) -> NDArray[np.float64]:
    # An array, because a cached tensor would carry inference mode from one call to another.
    return _wide_quantiles(samples, rule, torch.float64, torch.device("cpu")).numpy()


def _wide_quantiles(samples: int, rule: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    i = torch.arange(samples + 1, dtype=dtype, device=device)
    if rule == "paper":
        q = torch.special.ndtri(i[1:] / (samples + 1))
    else:
        edges = torch.special.ndtri(i / samples)
        density = torch.exp(-0.5 * edges.square()) / math.sqrt(2 * math.pi)
        q = samples * (density[:-1] - density[1:])
    return (q - q.flip(0)) / 2


def wasserstein_(p: Tensor, targets: Tensor, keep_gradient: bool) -> Tensor:
    """Mean over samples of ``(sort(p) - targets)^2`` in each row; ``p`` becomes its gradient.

    Args:
        p: projections, (K, N), contiguous; overwritten by the gradient of the sum of the returned
            values (with ``keep_gradient``).
        targets: quantiles, (N,).
        keep_gradient: whether the gradient is needed.

    Returns:
        The statistic of each slice, (K,).
    """
    samples = p.shape[1]
    sums = sort_residual_(p, targets, keep_gradient)
    if keep_gradient:
        p *= 2 / samples
    return sums / samples


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
    on_cpu = p.device.type == "cpu"
    elements = _CPU_GRAIN * torch.get_num_threads() if on_cpu else _CHUNK // 8
    rows = min(slices, max(1, elements // samples))
    waves = p.new_empty(rows, 2 * table.shape[1], samples)

    for begin in range(0, slices, rows):
        block = p[begin : begin + rows]
        some = waves[: block.shape[0]]
        _harmonics(block, table[0, 0], some)
        value, coefficients = _epps_pulley_from_means(some.mean(-1), table, samples)
        statistic[begin : begin + rows] = value
        if keep_gradient:
            torch.bmm(coefficients, some, out=block.unsqueeze(1))
    return statistic


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


def _epps_pulley_from_means(means: Tensor, table: Tensor, samples: int) -> tuple[Tensor, Tensor]:
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


def sketch(
    x: Tensor, directions: Tensor, statistic: Callable[[Tensor], Tensor], keep_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Mean over slices (and views) of a statistic of the projections, and its gradient.

    Some slices at a time: project, evaluate, project back. Nothing of size N x K exists.

    Args:
        x: samples, (V, N, D).
        directions: unit columns, (D, K), of the dtype of ``x``.
        statistic: maps projections (k, N) to values (k,); overwrites them by their gradient.
        keep_gradient: whether ``statistic`` does so, and the gradient is needed.

    Returns:
        The mean, 0-dim of the wide dtype, and its gradient (V, N, D).
    """
    views, samples, _ = x.shape
    slices = directions.shape[1]
    elements = _CPU_CHUNK * torch.get_num_threads() if x.device.type == "cpu" else _CHUNK
    chunk = max(16, elements // (views * samples))
    total = torch.zeros((), dtype=wide(x), device=x.device)
    gradient = torch.zeros_like(x) if keep_gradient else None
    for begin in range(0, slices, chunk):
        w = directions[:, begin : begin + chunk].T.expand(views, -1, -1)  # (V, k, D)
        p = torch.bmm(w, x.mT)  # (V, k, N)
        total += statistic(p.flatten(0, 1)).sum(dtype=total.dtype)
        if gradient is not None:
            gradient.baddbmm_(p.mT, w)
    count = views * slices
    if gradient is not None:
        gradient /= count
    return total / count, gradient
