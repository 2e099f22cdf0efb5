"""Second pass: the terms of single columns, and the centred copy that the matrix products read.

``X = s (Z - mean)`` in 16 bits, s a power of two; float32-class products need two parts of it,
``X = hi + lo``, 22 bits together. Without products this pass reads no embeddings.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import inverse, is_last, power_of_two
from .moments import Columns
from .plan import STRIP, round_up

_FORMS = {"": 0, "hinge": 1, "squared": 2}


@triton.jit
def _over_strips(sums_ptr, which, strips, MAXIMUM: tl.constexpr):
    """Sum, or maximum of what is not negative, over strips: float64, in a fixed order."""
    total = tl.zeros([256], tl.float64)
    for start in range(0, strips, 256):
        strip = start + tl.arange(0, 256)
        place = sums_ptr + which * strips + strip
        some = tl.load(place, mask=strip < strips, other=0, cache_modifier=".cg")
        total = tl.maximum(total, some) if MAXIMUM else total + some
    return tl.max(total, 0) if MAXIMUM else tl.sum(total, 0)


@triton.jit
def _finish_terms(
    sums_ptr,
    scales_ptr,
    variance_ptr,
    center_ptr,
    views,
    strips,
    samples,
    dimensions,
    PARTS: tl.constexpr,
    GRAM: tl.constexpr,
):
    """The values of the variance and the centre terms; the scale of each view's inner product."""
    variance = tl.full([], 0, tl.float64)
    center = tl.full([], 0, tl.float64)
    for view in range(views):
        sums = sums_ptr + view * 5 * strips
        variance += _over_strips(sums, 0, strips, False)
        center += _over_strips(sums, 1, strips, False)
        if PARTS:
            trace = _over_strips(sums, 2, strips, False)
            length = dimensions if GRAM else samples
            surplus = trace * 0  # NaN where a sample is not finite
            if GRAM:
                surplus += _over_strips(sums, 3, strips, False)
                # |G_ij| <= max_i |x_i|^2, which is at most the trace, and at most D 2^28.
                bound = tl.minimum(trace, 268435456.0 * length)
            else:
                bound = _over_strips(sums, 4, strips, True)
            # X reaches 2^11 somewhere, so a small bound is one of squares that underflowed.
            bound = tl.where(bound >= 1048576.0, bound, 268435456.0 * length)
            inner_scale = power_of_two(bound.to(tl.float32), 15)
            tl.store(scales_ptr + 4 * view + 1, inner_scale.to(tl.float64))
            tl.store(scales_ptr + 4 * view + 2, inverse(inner_scale).to(tl.float64))
            tl.store(scales_ptr + 4 * view + 3, surplus)
    share = 1.0 / (views * tl.cast(dimensions, tl.float32))
    tl.store(variance_ptr, (variance * share).to(tl.float32))
    tl.store(center_ptr, (center * share).to(tl.float32))


@triton.jit
def _splits(first, d, splits, split_rows, samples, dimensions):
    """Places of the means of 16 splits, their numbers of rows, 0 past the last, and a mask."""
    split = first + tl.arange(0, 16)
    rows = tl.minimum(split_rows, tl.maximum(samples - split * split_rows, 0))
    there = (split < splits)[:, None] & (d < dimensions)[None, :]
    return split.to(tl.int64)[:, None] * (2 * dimensions) + d[None, :], rows[:, None], there


@triton.jit
def _center_kernel(
    z_ptr,
    pivot_ptr,
    partial_ptr,
    reach_ptr,
    ticket_ptr,
    rounded_ptr,
    sums_ptr,
    statistics_ptr,
    scales_ptr,
    centered_ptr,
    variance_ptr,
    center_ptr,
    view_stride,
    sample_stride,
    dimension_stride,
    samples,
    dimensions,
    padded_samples,
    padded_dimensions,
    split_rows,
    splits,
    reaches,
    cast_rows,
    part_stride,
    gamma,
    eps,
    VARIANCE: tl.constexpr,
    PARTS: tl.constexpr,
    GRAM: tl.constexpr,
    AMD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge the splits of a strip, write its columns of X, and finish the terms.

    Each program writes some rows; the last of a strip finishes its statistics, and the last of all
    the terms. The Gram form takes the diagonal off a sum over the rounded X, so it is the diagonal
    of the rounded X: what is taken off is what was put in.

    Args:
        z_ptr: (V, N, D), any strides; read if PARTS.
        pivot_ptr, partial_ptr, reach_ptr: from ``_moments_kernel``; ``splits`` of them, and
            ``reaches`` distances a view.
        ticket_ptr: (1 + V strips,), zeros.
        rounded_ptr: scratch of the Gram form, (V, programs of a strip, D): sums of squares of X.
        sums_ptr: scratch, (V, 5, strips), float64.
        statistics_ptr: out, (V, 4, D).
        scales_ptr: out, (V, 4), float64.
        centered_ptr: out, (PARTS, V, padded N, padded D), 16 bits, 0 in the padding.
        variance_ptr, center_ptr: out, the values of the terms, 0-dim.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    view = tl.program_id(2)
    strips = tl.num_programs(0)
    views = tl.num_programs(2)

    scale = 1.0
    if PARTS:
        reach = tl.zeros([1024], tl.float32)
        for i in range(0, reaches, 1024):
            place = i + tl.arange(0, 1024)
            some = tl.load(reach_ptr + view * reaches + place, mask=place < reaches, other=0)
            reach = tl.maximum(reach, some)
        # The mean is within the reach of the pivot, so no sample is further from it than this.
        scale = power_of_two(2 * tl.max(reach, 0), 14)

    d = strip * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < dimensions
    partial_ptr += view.to(tl.int64) * splits * 2 * dimensions
    offset = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, splits, 16):
        place, weight, there = _splits(first, d, splits, split_rows, samples, dimensions)
        offset += tl.sum(weight * tl.load(partial_ptr + place, mask=there, other=0), 0)
    offset /= samples
    pivot = tl.load(pivot_ptr + view.to(tl.int64) * dimensions + d, mask=inside, other=0)

    programs = tl.num_programs(1)
    if GRAM:
        rounded_ptr += view.to(tl.int64) * programs * dimensions
    if PARTS:
        rounded = tl.zeros([ROWS, COLUMNS], tl.float32)
        begin = split * cast_rows
        end = tl.minimum(begin + cast_rows, padded_samples)
        column_ptr = z_ptr + view.to(tl.int64) * view_stride + d.to(tl.int64) * dimension_stride
        for start in range(begin, end, ROWS):
            n = (start + tl.arange(0, ROWS)).to(tl.int64)
            ok = (n < samples)[:, None] & inside[None, :]
            z = tl.load(column_ptr[None, :] + n[:, None] * sample_stride, mask=ok, other=0)
            x = ((z.to(tl.float32) - pivot[None, :]) - offset[None, :]) * scale
            x = tl.where(ok, x, 0)
            high = x.to(tl.float16)
            place = (view.to(tl.int64) * padded_samples + n)[:, None] * padded_dimensions
            fits = (n < end)[:, None] & (d < padded_dimensions)[None, :]
            out = centered_ptr + place + d[None, :]
            tl.store(out, high, mask=fits)
            kept = high.to(tl.float32)
            if PARTS == 2:
                low = (x - kept).to(tl.float16)
                tl.store(out + part_stride, low, mask=fits)
                kept += low.to(tl.float32)
            rounded += kept * kept
        if GRAM:
            row = rounded_ptr + split.to(tl.int64) * dimensions
            tl.store(row + d, tl.sum(rounded, 0), mask=inside)

    if is_last(ticket_ptr + 1 + view * strips + strip, programs, AMD):
        squares = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, splits, 16):
            place, weight, there = _splits(first, d, splits, split_rows, samples, dimensions)
            apart = tl.load(partial_ptr + place, mask=there, other=0) - offset[None, :]
            about = tl.load(partial_ptr + dimensions + place, mask=there, other=0)
            squares += tl.sum(about + weight * apart * apart, 0)
        slope = tl.zeros([COLUMNS], tl.float32)
        excess = tl.zeros([COLUMNS], tl.float32)
        if VARIANCE == 1:  # hinge: excess = max(gamma - std, 0), NaN if std is
            std = tl.sqrt_rn(squares / (samples - 1) + eps)
            slope = tl.where(std >= gamma, 0.0, 1 / std)
            excess = tl.where(std >= gamma, 0.0, gamma - std)
        if VARIANCE == 2:  # squared, with VISReg's 1e-6
            std = tl.sqrt_rn(squares / samples)
            distance = std + (1e-6 - 1)
            slope = tl.where(std == 0, 0.0, distance / tl.where(std == 0, 1.0, std))
            excess = distance * distance
        diagonal = squares * scale * scale
        if GRAM:
            diagonal = diagonal * 0  # NaN where a sample is not finite
            for first in range(0, programs, 16):
                other = first + tl.arange(0, 16)
                rows = rounded_ptr + other.to(tl.int64)[:, None] * dimensions + d[None, :]
                known = (other < programs)[:, None] & inside[None, :]
                diagonal += tl.sum(tl.load(rows, mask=known, other=0, cache_modifier=".cg"), 0)
        statistics = statistics_ptr + view.to(tl.int64) * 4 * dimensions + d
        tl.store(statistics, pivot, mask=inside)
        tl.store(statistics + dimensions, offset, mask=inside)
        tl.store(statistics + 2 * dimensions, diagonal, mask=inside)
        tl.store(statistics + 3 * dimensions, slope, mask=inside)

        mean = pivot + offset
        diagonal = tl.where(inside, diagonal, 0)
        wide = diagonal.to(tl.float64)
        sums = sums_ptr + view * 5 * strips + strip
        tl.store(sums, tl.sum(tl.where(inside, excess, 0).to(tl.float64), 0))
        tl.store(sums + strips, tl.sum(tl.where(inside, mean * mean, 0).to(tl.float64), 0))
        tl.store(sums + 2 * strips, tl.sum(wide, 0))
        tl.store(sums + 3 * strips, tl.sum(wide * wide, 0))
        tl.store(sums + 4 * strips, tl.max(diagonal, 0).to(tl.float64))

        if PARTS and strip == 0:
            tl.store(scales_ptr + 4 * view, inverse(scale).to(tl.float64))
        if is_last(ticket_ptr, strips * views, AMD):
            _finish_terms(
                sums_ptr,
                scales_ptr,
                variance_ptr,
                center_ptr,
                views,
                strips,
                samples,
                dimensions,
                PARTS,
                GRAM,
            )


class Centered(NamedTuple):
    """What the second pass leaves.

    Attributes:
        variance, center: values of the terms, 0-dim.
        statistics: (V, 4, D): pivot, mean less pivot, s^2 times the sum of squares, slope of the
            variance term.
        scales: (V, 4), float64: 1/s of X, g and 1/g of the stored inner product, what its energy
            has too much.
        centered: X, (PARTS, V, padded N, padded D), or ``None``.
    """

    variance: Tensor
    center: Tensor
    statistics: Tensor
    scales: Tensor | None
    centered: Tensor | None


def own_tickets(views: int, dimensions: int, padded: tuple[int, int] = (0, 0)) -> int:
    """Zeros that :func:`center` uses up, rounded so that what follows them is aligned."""
    return round_up(1 + views * -(-max(dimensions, padded[1]) // STRIP), 4)


def center(
    columns: Columns,
    variance: str,
    gamma: float,
    eps: float,
    parts: int = 0,
    gram: bool = False,
    padded: tuple[int, int] = (0, 0),
) -> Centered:
    """Finish the statistics; write the centred copy in ``parts`` (0: none) of 16 bits.

    Args:
        columns: from :func:`moments`, with the tickets of :func:`own_tickets`, which come first.
        variance: "hinge", "squared" or "".
        gamma: of the hinge.
        eps: of the hinge; positive.
        parts: 0, 1 or 2.
        gram: whether the N x N product follows, else the D x D one.
        padded: N and D of the copy.
    """
    z, pivot, partial, reach, tickets, cut = columns
    views, samples, dimensions = z.shape
    count = -(-max(dimensions, padded[1]) // STRIP)
    cast_rows = round_up(-(-padded[0] // cut.splits), cut.rows)
    programs = -(-padded[0] // cast_rows) if parts else 1
    float32 = functools.partial(z.new_empty, dtype=torch.float32)
    float64 = functools.partial(z.new_empty, dtype=torch.float64)
    result = Centered(
        float32(()),
        float32(()),
        float32((views, 4, dimensions)),
        float64((views, 4)) if parts else None,
        z.new_empty((parts, views, *padded), dtype=torch.float16) if parts else None,
    )
    launch.call(
        _center_kernel,
        (count, programs, views),
        z,
        pivot,
        partial,
        reach,
        tickets,
        float32((views, programs, dimensions)) if gram else None,
        float64((views, 5, count)),
        result.statistics,
        result.scales,
        result.centered,
        result.variance,
        result.center,
        *z.stride(),
        samples,
        dimensions,
        *padded,
        cut.split_rows,
        cut.splits,
        cut.splits * cut.strips,
        cast_rows,
        views * padded[0] * padded[1],
        gamma,
        eps,
        VARIANCE=_FORMS[variance],
        PARTS=parts,
        GRAM=gram,
        AMD=launch.is_amd(z.device),
        registers=128,  # not to be limited to fewer by an occupancy that it does not need
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        num_warps=cut.warps,
    )
    return result
