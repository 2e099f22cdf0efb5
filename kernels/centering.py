"""Second pass: the terms of single columns, and the centred copy that the matrix products read.

``X = s (Z - mean)`` in 16 bits, s a power of two; float32-class products need two parts of it,
``X = hi + lo``, 22 bits together. For the sliced Wasserstein distance each column is also divided
by ``sigma + 1e-6``. Without products this pass reads no embeddings.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import inverse, is_last, power_of_two
from .moments import Columns
from .plan import STRIP, round_up
from .terms import finish_terms

_FORMS = {"": 0, "hinge": 1, "squared": 2}
_SKETCHES = {"": 0, "epps_pulley": 1, "wasserstein": 2}


@triton.jit
def _splits(first, d, splits, split_rows, samples, dimensions):
    """Places of the means of 16 splits, their numbers of rows, 0 past the last, and a mask."""
    split = first + tl.arange(0, 16)
    rows = tl.minimum(split_rows, tl.maximum(samples - split * split_rows, 0))
    there = (split < splits)[:, None] & (d < dimensions)[None, :]
    return split.to(tl.int64)[:, None] * (2 * dimensions) + d[None, :], rows[:, None], there


@triton.jit
def _squares(
    partial_ptr, offset, d, splits, split_rows, samples, dimensions, COLUMNS: tl.constexpr
):
    """Sums of squares of the columns about their means, from those of the splits."""
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, splits, 16):
        place, weight, there = _splits(first, d, splits, split_rows, samples, dimensions)
        apart = tl.load(partial_ptr + place, mask=there, other=0) - offset[None, :]
        about = tl.load(partial_ptr + dimensions + place, mask=there, other=0)
        squares += tl.sum(about + weight * apart * apart, 0)
    return squares


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
    row_stride,
    part_stride,
    sample_scale,
    gamma,
    eps,
    VARIANCE: tl.constexpr,
    PARTS: tl.constexpr,
    GRAM: tl.constexpr,
    SKETCH: tl.constexpr,
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
        centered_ptr: out, 16 bits, 0 in the padding: (PARTS, V, padded N, padded D), or for a
            sketch (V, padded N, 1 or 3, padded D): hi, or hi, lo, hi.
        variance_ptr, center_ptr: out, the values of the terms, 0-dim.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    view = tl.program_id(2)
    strips = tl.num_programs(0)
    views = tl.num_programs(2)

    scale = 1.0
    if SKETCH == 2:
        scale = sample_scale
    elif PARTS:
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
        factor = tl.full([COLUMNS], 1.0, tl.float32) * scale
        if SKETCH == 2:
            squares = _squares(
                partial_ptr, offset, d, splits, split_rows, samples, dimensions, COLUMNS
            )
            # NaN where sigma overflowed and would hide the samples.
            factor = factor / (tl.sqrt_rn(squares / samples) + 1e-6) + squares * 0
        rounded = tl.zeros([ROWS, COLUMNS], tl.float32)
        begin = split * cast_rows
        end = tl.minimum(begin + cast_rows, padded_samples)
        column_ptr = z_ptr + view.to(tl.int64) * view_stride + d.to(tl.int64) * dimension_stride
        for start in range(begin, end, ROWS):
            n = (start + tl.arange(0, ROWS)).to(tl.int64)
            ok = (n < samples)[:, None] & inside[None, :]
            z = tl.load(column_ptr[None, :] + n[:, None] * sample_stride, mask=ok, other=0)
            x = ((z.to(tl.float32) - pivot[None, :]) - offset[None, :]) * factor[None, :]
            x = tl.where(ok, x, 0)
            high = x.to(tl.float16)
            place = (view.to(tl.int64) * padded_samples + n)[:, None] * row_stride
            fits = (n < end)[:, None] & (d < padded_dimensions)[None, :]
            out = centered_ptr + place + d[None, :]
            tl.store(out, high, mask=fits)
            kept = high.to(tl.float32)
            if PARTS == 2:
                low = (x - kept).to(tl.float16)
                tl.store(out + part_stride, low, mask=fits)
                if SKETCH:
                    tl.store(out + 2 * part_stride, high, mask=fits)
                kept += low.to(tl.float32)
            rounded += kept * kept
        if GRAM:
            row = rounded_ptr + split.to(tl.int64) * dimensions
            tl.store(row + d, tl.sum(rounded, 0), mask=inside)

    if is_last(ticket_ptr + 1 + view * strips + strip, programs, AMD):
        squares = _squares(partial_ptr, offset, d, splits, split_rows, samples, dimensions, COLUMNS)
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
        if SKETCH == 2:
            diagonal = 1 / (tl.sqrt_rn(squares / samples) + 1e-6)
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
            finish_terms(
                sums_ptr,
                scales_ptr,
                variance_ptr,
                center_ptr,
                views,
                strips,
                samples,
                dimensions,
                0 if SKETCH else PARTS,
                GRAM,
            )


class Centered(NamedTuple):
    """What the second pass leaves.

    Attributes:
        variance, center: values of the terms, 0-dim.
        statistics: (V, 4, D): pivot, mean less pivot, s^2 times the sum of squares or for a
            standardised copy 1 / (sigma + 1e-6), slope of the variance term.
        scales: (V, 4), float64: 1/s of X; for an inner product g and 1/g of it as stored and what
            its energy has too much.
        centered: X, (PARTS, V, padded N, padded D), or for a sketch (V, padded N, 1 or 3, padded
            D), or ``None``.
    """

    variance: Tensor
    center: Tensor
    statistics: Tensor
    scales: Tensor | None
    centered: Tensor | None


def standard_scale(samples: int) -> float:
    """The power of two for standardised samples, none of which is above sqrt(N)."""
    return 2.0 ** (14 - math.ceil(math.log2(samples) / 2))


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
    sketch: str = "",
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
        sketch: "wasserstein", which standardises, "epps_pulley", or "".
    """
    z, pivot, partial, reach, tickets, cut = columns
    views, samples, dimensions = z.shape
    count = -(-max(dimensions, padded[1]) // STRIP)
    cast_rows = round_up(-(-padded[0] // cut.splits), cut.rows)
    programs = -(-padded[0] // cast_rows) if parts else 1
    float32 = functools.partial(z.new_empty, dtype=torch.float32)
    float64 = functools.partial(z.new_empty, dtype=torch.float64)
    planes = 2 * parts - 1  # hi, lo and once more hi
    layout = (views, padded[0], planes, padded[1]) if sketch else (parts, views, *padded)
    centered = z.new_empty(layout, dtype=torch.float16) if parts else None
    result = Centered(
        float32(()),
        float32(()),
        float32((views, 4, dimensions)),
        float64((views, 4)) if parts else None,
        centered,
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
        planes * padded[1] if sketch else padded[1],
        padded[1] if sketch else views * padded[0] * padded[1],
        standard_scale(samples),
        gamma,
        eps,
        VARIANCE=_FORMS[variance],
        PARTS=parts,
        GRAM=gram,
        SKETCH=_SKETCHES[sketch],
        AMD=launch.is_amd(z.device),
        registers=128,  # not to be limited to fewer by an occupancy that it does not need
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        num_warps=cut.warps,
    )
    return result
