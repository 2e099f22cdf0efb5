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
CHUNK = 1 << 24
# Elements that a CPU widens at once; beyond, those whose squares it adds up in float32, and the
# least sum that has lost none of them.
_WIDENED = 1 << 15
_ENERGY = 256
_SMALLEST = 1e-20
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
    squares leave float32's range long before the loss does. On a CPU, which would make a wide copy
    of all elements, a float32 accumulator takes a few at a time, where their squares are in range.
    """
    eager = not torch.compiler.is_compiling()
    if eager and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > _WIDENED:
        many = x.numel() // _ENERGY * _ENERGY
        rows, rest = x.reshape(-1).tensor_split([many])
        norms = torch.linalg.vector_norm(rows.view(-1, _ENERGY), dim=1).double()
        total = norms.square_().sum() + energy(rest)
        if _SMALLEST < total < math.inf:
            return total
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide(x))
    return norm.square_()


def center(z: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the mean over samples.

    Twice: the second pass takes off what the rounding of the mean left, which in float32 at an
    offset of 1e6 would reach the statistics. What a constant column leaves is a multiple of its
    last place, so the second mean is exact and the column becomes exactly 0.

    Args:
        z: embeddings, (V, N, D).
        inplace: whether ``z`` may be overwritten.

    Returns:
        The centred embeddings (V, N, D), and the mean as a sum of two (V, 1, D).
    """
    high = z.mean(1, keepdim=True)
    centered = z.sub_(high) if inplace else z - high
    low = centered.mean(1, keepdim=True)
    return centered.sub_(low), high, low


def squared_sums(centered: Tensor) -> Tensor:
    """Sum over samples of the squares: (V, N, D) -> (V, 1, D)."""
    return long_sum(centered.square(), 1).unsqueeze(1)


def long_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over samples, in the dtype of ``x``.

    Compiled code adds one number after the other on a CPU, so that errors grow with their count,
    but in a wide accumulator; everything else adds sums of a few.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return x.sum(dim, dtype=wide(x)).to(x.dtype)
    return x.sum(dim)


def covariance_energy(
    centered: Tensor, squares: Tensor, gram: bool, keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Sum over views of the squared off-diagonal elements of ``centered^T centered``.

    Both forms use ``||Xc^T Xc||_F = ||Xc Xc^T||_F`` and compute half of a symmetric product.

    Args:
        centered: centred embeddings, (V, N, D).
        squares: sums of squares over samples, (V, 1, D): the diagonal.
        gram: whether to form the N x N Gram matrix, else the D x D product.
        keep: whether the product is needed.

    Returns:
        The energy, 0-dim of the wide dtype, and the product, if it is needed: (V, N, N), or
        (V, D, D) with a zero diagonal.
    """
    left = centered if gram else centered.mT
    total, inner = _symmetric_product(left, zero_diagonal=not gram, keep=keep)
    if gram:
        diagonal = energy(squares)
        if diagonal_dominates(centered, diagonal, total):
            exact = centered.double()
            total = _symmetric_product(exact, zero_diagonal=False)[0]
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
    if diagonal_dominates(centered, energy(squares), energy(inner)):
        exact = centered.double()
        product = torch.bmm(torch.bmm(exact, exact.mT), exact)
        product.addcmul_(exact, squared_sums(exact), value=-1)
        return product.mul_(scale).to(centered.dtype), None
    return torch.bmm(inner * scale, centered), squares * -scale


def may_be_dominated(x: Tensor) -> bool:
    """Whether :func:`diagonal_dominates` looks."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def diagonal_dominates(centered: Tensor, diagonal: Tensor, total: Tensor) -> bool:
    """Whether float32 would lose the rest. A host decision: off the CPU it would wait, so no."""
    if not may_be_dominated(centered):
        return False
    return bool(total - diagonal < _DIAGONAL_DOMINATES * total)


def _symmetric_product(
    left: Tensor, zero_diagonal: bool, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Energy of ``left @ left^T``, by block rows of its lower triangle; and itself, if kept."""
    size = left.shape[1]
    blocks = min(8, size // 128)
    if blocks < 2:
        inner = torch.bmm(left, left.mT)
        if zero_diagonal:
            _zero_diagonal_(inner)
        return energy(inner), inner if keep else None
    product = left.new_empty(left.shape[0], size, size) if keep else None
    parts = []
    for i in range(blocks):
        begin, end = size * i // blocks, size * (i + 1) // blocks
        if product is not None:
            rows = torch.bmm(left[:, begin:end], left[:, :end].mT)
            if zero_diagonal:
                _zero_diagonal_(rows[:, :, begin:])
            product[:, begin:end, :end] = rows
            product[:, :begin, begin:end] = rows[:, :, :begin].mT
        else:
            square = torch.bmm(left[:, begin:end], left[:, begin:end].mT)
            if zero_diagonal:
                _zero_diagonal_(square)
            parts.append(energy(square))
            if i:
                parts.append(2 * energy(torch.bmm(left[:, begin:end], left[:, :begin].mT)))
    return torch.stack(parts).sum() if product is None else energy(product), product


def _zero_diagonal_(square: Tensor) -> None:
    if torch.compiler.is_compiling():  # as a mask, which a compiler fuses
        square.masked_fill_(torch.eye(square.shape[1], dtype=torch.bool, device=square.device), 0)
    else:
        square.diagonal(dim1=1, dim2=2).zero_()


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
    """Mean over samples of ``(sort(p) - targets)^2`` in each row; ``p`` becomes its residuals.

    Args:
        p: projections, (K, N), contiguous; overwritten by N / 2 times the gradient of the sum of
            the returned values (with ``keep_gradient``).
        targets: quantiles, (N,).
        keep_gradient: whether the gradient is needed.

    Returns:
        The statistic of each slice, (K,).
    """
    return sort_residual_(p, targets, keep_gradient) / p.shape[1]


def sketch(
    x: Tensor,
    directions: Tensor,
    statistic: Callable[[Tensor], Tensor],
    keep_gradient: bool,
    factor: float = 1.0,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mean over slices (and views) of a statistic of the projections, and its gradient.

    Some slices at a time: project, evaluate, project back. Nothing of size N x K exists.

    Args:
        x: samples, (V, N, D).
        directions: unit columns, (D, K), of the dtype of ``x``.
        statistic: maps projections (k, N) to values (k,); overwrites them by their gradient.
        keep_gradient: whether ``statistic`` does so, and the gradient is needed.
        factor: what the gradient of ``statistic`` is still to be multiplied by.
        overwrite: whether the gradient may take the place of ``x``.

    Returns:
        The mean, 0-dim of the wide dtype, and its gradient (V, N, D).
    """
    views, samples, _ = x.shape
    slices = directions.shape[1]
    elements = _CPU_CHUNK * torch.get_num_threads() if x.device.type == "cpu" else CHUNK
    chunk = max(16, elements // (views * samples))
    count = views * slices
    total = torch.zeros((), dtype=wide(x), device=x.device)
    gradient = None
    for begin in range(0, slices, chunk):
        w = directions[:, begin : begin + chunk].T.expand(views, -1, -1)  # (V, k, D)
        p = torch.bmm(w, x.mT)  # (V, k, N)
        total += statistic(p.flatten(0, 1)).sum(dtype=total.dtype)
        if keep_gradient:
            if gradient is None:
                gradient = x if overwrite and chunk >= slices else torch.empty_like(x)
            gradient.baddbmm_(p.mT, w, beta=int(begin > 0), alpha=factor / count)
    return total / count, gradient
