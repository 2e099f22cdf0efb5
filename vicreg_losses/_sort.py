"""Residual of sorted projections against their targets: the one step of the sketch that sorts.

On a CPU, numpy's vectorised sort of 64-bit words (value in the high half, index in the low half)
is several times faster than ``torch.sort``; both orders are exact and stable, so the choice between
them, made by a measurement at the first call, never changes a result.
"""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._parallel import for_each_block

# Elements a thread sorts at a time: 512 KiB of 64-bit words, which an L2 cache holds.
_BLOCK = 65536


def sort_residual_(p: Tensor, targets: Tensor, keep_residual: bool) -> Tensor:
    """Sum of squares of ``sort(p) - targets`` in each row; ``p`` becomes the residual.

    Args:
        p: projections, (K, N), contiguous. Overwritten: with ``keep_residual`` by
            ``p - targets[rank of p]`` in the original order, otherwise by anything.
        targets: quantiles in increasing order, (N,), of the dtype of ``p``.
        keep_residual: whether the residual is needed (it is for the gradient).

    Returns:
        Tensor: the sums of squares, (K,), of the dtype of ``p``.
    """
    if p.device.type == "cpu" and p.dtype == torch.float32 and _numpy_is_faster():
        return _numpy_sort_residual_(p, targets, keep_residual)
    return _torch_sort_residual_(p, targets, keep_residual)


def _torch_sort_residual_(p: Tensor, targets: Tensor, keep_residual: bool) -> Tensor:
    ordered, index = p.sort(dim=1, stable=True)
    ordered -= targets
    if keep_residual:
        p.scatter_(1, index, ordered)
    if p.device.type == "cpu":  # numpy's sum, as in the other path: the same bits
        return torch.from_numpy(ordered.square_().numpy().sum(axis=1))
    return ordered.square_().sum(1)


def _numpy_sort_residual_(p: Tensor, targets: Tensor, keep_residual: bool) -> Tensor:
    slices, samples = p.shape
    values, q = p.numpy(), targets.numpy()
    sums = np.empty(slices, values.dtype)
    rows_per_block = min(slices, max(1, _BLOCK // samples))
    index = _flat_index(rows_per_block * samples)

    def values_only() -> Callable[[int, int], None]:
        def work(begin: int, end: int) -> None:
            block = values[begin:end]
            block.sort(axis=1)
            block -= q
            np.square(block, out=block).sum(axis=1, out=sums[begin:end])

        return work

    def with_residual() -> Callable[[int, int], None]:
        words = np.empty((rows_per_block, samples), np.int64)
        residual = np.empty((rows_per_block, samples), np.float32)

        def work(begin: int, end: int) -> None:
            block, order, ordered = values[begin:end], words[: end - begin], residual[: end - begin]
            _flat_argsort(block, index[: block.size], order, ordered)
            ordered -= q
            # torch's one-dimensional scatter is serial, and faster than numpy's assignment.
            flat = torch.from_numpy(ordered).view(-1)
            torch.from_numpy(block).view(-1).scatter_(0, torch.from_numpy(order).view(-1), flat)
            np.square(ordered, out=ordered).sum(axis=1, out=sums[begin:end])

        return work

    for_each_block(with_residual if keep_residual else values_only, slices, rows_per_block)
    return torch.from_numpy(sums)


@functools.lru_cache(maxsize=4)
def _flat_index(count: int) -> NDArray[np.int64]:
    return np.arange(count)


def _flat_argsort(
    block: NDArray[np.float32],
    index: NDArray[np.int64],
    words: NDArray[np.int64],
    ordered: NDArray[np.float32],
) -> None:
    """Sort each row of ``block`` into ``ordered``, and where each element came from into ``words``.

    IEEE floats order like sign-magnitude integers, so flipping the magnitude of the negative ones
    gives an integer of the same order. The flat index in the low half keeps ties stable.
    """
    block += 0.0  # -0.0 becomes 0.0, its equal
    bits, key = block.view(np.int32), ordered.view(np.int32)
    np.right_shift(bits, 31, out=key)
    key &= 0x7FFFFFFF
    key ^= bits
    np.copyto(words, key)
    words <<= 32
    words |= index.reshape(words.shape)
    words.sort(axis=1)
    np.right_shift(words, 32, out=key, casting="same_kind")
    np.copyto(bits, key)
    key >>= 31
    key &= 0x7FFFFFFF
    key ^= bits
    words &= 0xFFFFFFFF


@functools.lru_cache(maxsize=1)
def _numpy_is_faster() -> bool:
    """Time both ways once on 16 rows of 1024 numbers (a few milliseconds)."""
    golden_ratio = 0.6180339887
    sample = (
        torch.arange(16384, dtype=torch.float64, device="cpu").mul_(golden_ratio).frac_().float()
    )
    targets = torch.zeros(1024, device="cpu")

    def best(sort: object) -> float:
        times = []
        for _ in range(3):
            p = sample.clone().view(16, 1024)
            begin = time.perf_counter()
            sort(p, targets, True)  # type: ignore[operator]
            times.append(time.perf_counter() - begin)
        return min(times)

    return best(_numpy_sort_residual_) < best(_torch_sort_residual_)
