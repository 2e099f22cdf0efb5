"""Residuals of sorted projections: one program a row, the row in registers.

A row is sorted by a bitonic network (Batcher, 1968) of 32-bit words that carry where they came
from, so the residual goes straight back there: no sorted copy, no index of 64 bits. A word is a
positive number of ordinary size in float32's format, whose order is that of its bits: comparing
and exchanging two is one minimum, and flipping the direction of a comparison is a sign.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import barrier
from .plan import Network
from .rows import Rows

_LEAST = tl.constexpr(0x00800000)  # bits of the smallest normal number
_SPAN = tl.constexpr(0x7F000000)  # words from there that are finite


@triton.jit
def _sign(place: tl.constexpr, BITS: tl.constexpr):
    """1 where a bit of the place is 0, and -1 where it is 1."""
    shape: tl.constexpr = [1] * (BITS - 1 - place) + [2] + [1] * place
    return 1.0 - 2.0 * tl.reshape(tl.arange(0, 2), shape).to(tl.float32)


@triton.jit
def _partner(x, place: tl.constexpr, BITS: tl.constexpr):
    """Each element's partner across a bit of the place."""
    word = x.to(tl.int32, bitcast=True)
    other = word ^ tl.xor_sum(word, BITS - 1 - place, True)
    return other.to(tl.float32, bitcast=True)


@triton.jit
def sort_network(words, PLACES: tl.constexpr, LOCAL: tl.constexpr, BITS: tl.constexpr):
    """Sort words, float32 without NaN; what belongs at rank r comes to the place of r.

    Bit b of a rank is bit PLACES[b] of its place; LOCAL says of each bit of the place whether a
    thread holds both of its sides. The low bits of the rank are compared most often, and so are
    local.

    Args:
        words: (2^BITS,).
        PLACES: a permutation of the bits.
        LOCAL: 1 or 0 for each bit of the place.
        BITS: number of bits.
    """
    x = tl.reshape(words, [2] * BITS)
    sign = tl.full([1] * BITS, 1.0, tl.float32)  # x is the words times this
    for stage in tl.static_range(1, BITS + 1):
        up = tl.full([1] * BITS, 1.0, tl.float32)
        if stage < BITS:
            up = _sign(PLACES[stage], BITS)
        for step in tl.static_range(stage):
            side = _sign(PLACES[stage - 1 - step], BITS)
            if LOCAL[PLACES[stage - 1 - step]]:
                if step == 0 or not LOCAL[PLACES[stage - step]]:
                    x = x * (sign * up)
                sign = up
                other = _partner(x, PLACES[stage - 1 - step], BITS)
                x = tl.where(side < 0, tl.maximum(x, other), tl.minimum(x, other))
            else:
                # The partner's sign is the other one, so both take a minimum.
                x = x * (sign * up * side)
                sign = up * side
                x = tl.minimum(x, -_partner(x, PLACES[stage - 1 - step], BITS))
    return tl.reshape(x * sign, words.shape)


@triton.jit
def _sorted_tags(words, PLACES: tl.constexpr, LOCAL: tl.constexpr, BITS: tl.constexpr):
    """Sort non-negative integers below the span."""
    x = (words + _LEAST).to(tl.float32, bitcast=True)
    return sort_network(x, PLACES, LOCAL, BITS).to(tl.int32, bitcast=True) - _LEAST


@triton.jit
def _sort_kernel(
    p_ptr,
    scales_ptr,
    ranks_ptr,
    targets_ptr,
    residual_ptr,
    sums_ptr,
    samples,
    p_slice,
    p_view,
    residual_part,
    first,
    slices,
    unscale,
    residual_scale,
    EXACT: tl.constexpr,
    KEEP: tl.constexpr,
    BITS: tl.constexpr,
    PLACES: tl.constexpr,
    LOCAL: tl.constexpr,
    AMD: tl.constexpr,
):
    """Sum of squares of ``sort(p) - targets``, and ``p - targets[rank of p]`` in 16 bits.

    EXACT sorts twice, by the low and then by the high half of the bits of a float32, which makes
    the order that of float32. Otherwise a word holds one of 2^(31 - BITS) equal steps from the
    least to the largest element, and equal steps are ordered as they came.

    Args:
        p_ptr: projections of some slices, (k, V, padded N).
        scales_ptr: (V, 4), float64; the first: 1/s of X.
        ranks_ptr: (2^BITS,), the rank of each place.
        targets_ptr: (2^BITS,), the target of the rank of each place, 0 past the last.
        residual_ptr: out, (1 or 2, padded K, V, padded N), if KEEP.
        sums_ptr: out, (V, K).
    """
    SIZE: tl.constexpr = 1 << BITS
    slice_ = tl.program_id(0)
    view = tl.program_id(1)
    row = slice_.to(tl.int64) * p_slice + view.to(tl.int64) * p_view
    p_ptr += row
    if KEEP:
        residual_ptr += row + first.to(tl.int64) * p_slice
    place = tl.arange(0, SIZE)
    scale = (tl.load(scales_ptr + 4 * view) * unscale).to(tl.float32)
    p = tl.load(p_ptr + place, mask=place < samples, other=0) * scale
    poison = tl.sum(p * 0, 0)  # NaN if one is not finite
    p = tl.where(p * 0 == 0, p, 0)
    index = place
    if EXACT:
        if KEEP:
            # The samples of each rank so far, where the residual will be.
            scratch = residual_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
            tag = place
            for half in tl.static_range(2):
                x = tl.load(p_ptr + index, mask=index < samples, other=0) * scale
                x = tl.where(x * 0 == 0, x, 0) + 0.0  # -0.0 becomes 0.0, its equal
                bits = x.to(tl.int32, bitcast=True)
                bits ^= (bits >> 31) & 0x7FFFFFFF  # the order of signed integers
                bits = bits & 0xFFFF if half == 0 else (bits >> 16) + 0x8000
                bits = tl.where(index < samples, bits, 0xFFFF)  # above infinity
                tag = _sorted_tags(bits * SIZE + tag, PLACES, LOCAL, BITS) & (SIZE - 1)
                if half == 0:
                    index = tag
                    tag = tl.load(ranks_ptr + place)
                    tl.store(scratch + tag, index.to(tl.int16), mask=tag < samples)
                    barrier(AMD)
                else:
                    index = tl.load(scratch + tag, mask=tag < samples, other=SIZE - 1)
                    index = tl.where(tag < samples, index.to(tl.int32), SIZE)
            barrier(AMD)  # before the residual takes the place
            x = tl.load(p_ptr + index, mask=index < samples, other=0) * scale
        else:
            x = tl.where(place < samples, p + 0.0, float("inf"))
            x = sort_network(x, PLACES, LOCAL, BITS)
            index = tl.where(x < float("inf"), 0, samples)
    else:
        STEPS: tl.constexpr = min(_SPAN // SIZE, 1 << 24) - 4
        low = tl.min(tl.where(place < samples, p, float("inf")), 0)
        high = tl.max(tl.where(place < samples, p, float("-inf")), 0)
        width = tl.maximum(high - low, 1e-20)
        above = tl.where(place < samples, p - low, 0)
        word = tl.minimum((above * (STEPS / width) + 0.5).to(tl.int32), STEPS)
        word = tl.where(place < samples, word, STEPS + 1) * SIZE + place
        word = _sorted_tags(word, PLACES, LOCAL, BITS)
        index = word & (SIZE - 1)
        x = (word >> BITS).to(tl.float32) * (width / STEPS) + low
    residual = tl.where(index < samples, x - tl.load(targets_ptr + place), 0)
    tl.store(sums_ptr + view * slices + first + slice_, tl.sum(residual * residual, 0) + poison)
    if KEEP:
        residual *= residual_scale
        high16 = residual.to(tl.float16)
        tl.store(residual_ptr + index, high16, mask=index < samples)
        if EXACT:
            low16 = (residual - high16.to(tl.float32)).to(tl.float16)
            tl.store(residual_ptr + residual_part + index, low16, mask=index < samples)


@triton.jit
def _ranked_kernel(
    sorted_ptr,
    index_ptr,
    scales_ptr,
    targets_ptr,
    residual_ptr,
    sums_ptr,
    samples,
    p_slice,
    p_view,
    residual_part,
    first,
    slices,
    unscale,
    residual_scale,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same of rows that are sorted already.

    Args:
        sorted_ptr, index_ptr: (k, V, N): the order and where each came from, int64.
        targets_ptr: (N,).
        scales_ptr, residual_ptr, sums_ptr: as in ``_sort_kernel``.
    """
    slice_ = tl.program_id(0)
    view = tl.program_id(1)
    row = (slice_.to(tl.int64) * tl.num_programs(1) + view) * samples
    if KEEP:
        residual_ptr += (first + slice_).to(tl.int64) * p_slice + view.to(tl.int64) * p_view
    scale = (tl.load(scales_ptr + 4 * view) * unscale).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, samples, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        ok = rank < samples
        x = tl.load(sorted_ptr + row + rank, mask=ok, other=0) * scale
        residual = x - tl.load(targets_ptr + rank, mask=ok, other=0)
        total += residual * residual
        if KEEP:
            index = tl.load(index_ptr + row + rank, mask=ok, other=0)
            residual *= residual_scale
            high = residual.to(tl.float16)
            tl.store(residual_ptr + index, high, mask=ok)
            if PARTS == 2:
                low = (residual - high.to(tl.float32)).to(tl.float16)
                tl.store(residual_ptr + residual_part + index, low, mask=ok)
    tl.store(sums_ptr + view * slices + first + slice_, tl.sum(total, 0))


class Targets(NamedTuple):
    """Targets of the sorted projections of a row, and how rows are sorted.

    Attributes:
        network: in registers, or ``None`` for the library's sort.
        ranks: of the places of the network, (2^bits,), int32; ``None`` without one.
        values: (2^bits,) in the order of the places, 0 past the last; or (N,) in order.
    """

    network: Network | None
    ranks: Tensor | None
    values: Tensor


def targets(quantiles: Tensor, network: Network | None) -> Targets:
    """Arrange increasing targets, (N,), float32, for a network."""
    samples = quantiles.shape[0]
    if network is None:
        return Targets(None, None, quantiles)
    place = torch.arange(1 << network.bits, dtype=torch.int32, device=quantiles.device)
    ranks = torch.zeros_like(place)
    for bit, where in enumerate(network.places):
        ranks |= (place >> where & 1) << bit
    padded = torch.nn.functional.pad(quantiles, (0, len(place) - samples))
    return Targets(network, ranks, padded[ranks.long()])


def sort_residual(rows: Rows, targets: Targets) -> None:
    """``rows.residual`` becomes ``p - targets[rank of p]``, ``rows.sums`` its sums of squares.

    With one part the order is that of equal steps, with two that of float32.
    """
    keep, network = rows.residual is not None, targets.network
    factors = rows.unscale, rows.residual_scale
    if network is None:
        p = rows.projections[:, :, : rows.samples]
        tensors = *p.sort(dim=-1, stable=True), rows.scales, targets.values, rows.residual
        options = {"PARTS": rows.parts, "KEEP": keep, "BLOCK": 1024, "num_warps": 8}
        numbers = *rows.numbers, *factors
        launch.call(_ranked_kernel, rows.grid, *tensors, rows.sums, *numbers, **options)
        return
    launch.call(
        _sort_kernel,
        rows.grid,
        rows.projections,
        rows.scales,
        targets.ranks,
        targets.values,
        rows.residual,
        rows.sums,
        *rows.numbers,
        *factors,
        EXACT=rows.parts == 2,
        KEEP=keep,
        BITS=network.bits,
        PLACES=network.places,
        LOCAL=network.local,
        AMD=launch.is_amd(rows.sums.device),
        num_warps=network.warps,
        num_stages=1,
    )
