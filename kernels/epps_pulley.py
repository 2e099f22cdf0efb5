"""Epps-Pulley statistic of rows, and its gradient: sums of harmonics, which stay in registers.

The knots are equally spaced, so ``exp(i t p)`` at all of them are powers of ``z = exp(i dt p)``.
Four products of tensors make sixteen of them from z, z^2, z^4 and z^8: the powers of a tensor in
which bit b of the exponent is an axis of its own. A chain of products would let rounding grow with
the power; these have but four.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import barrier, doubled, unit_circle
from .rows import Rows


@triton.jit
def _doubled_often(cosine, sine, TIMES: tl.constexpr):
    """Of 2^TIMES times the angle, with as many axes of one element behind the first."""
    for axis in tl.static_range(TIMES):
        cosine, sine = doubled(cosine, sine)
        cosine, sine = tl.expand_dims(cosine, axis + 1), tl.expand_dims(sine, axis + 1)
    return cosine, sine


@triton.jit
def _powers(first_cosine, first_sine, cosine, sine, LEVELS: tl.constexpr):
    """``first * z^e`` for e = 0 .. 2^LEVELS - 1; axis 1 + b is bit b of e."""
    c, s = first_cosine, first_sine
    for level in tl.static_range(LEVELS):
        cz, sz = _doubled_often(cosine, sine, level)
        c, s = tl.join(c, c * cz - s * sz), tl.join(s, s * cz + c * sz)
    return c, s


@triton.jit
def _sum_of_powers(a, b, cosine, sine, LEVELS: tl.constexpr):
    """``sum_e (a_e + i b_e) z^e``, with the axes of :func:`_powers`; the last axis goes first."""
    for step in tl.static_range(LEVELS):
        c, s = _doubled_often(cosine, sine, LEVELS - 1 - step)
        a_low, a_high = tl.split(a)
        b_low, b_high = tl.split(b)
        a, b = a_low + c * a_high - s * b_high, b_low + s * a_high + c * b_high
    return a, b


@triton.jit
def _exponents(LEVELS: tl.constexpr):
    """E of the elements of :func:`_powers`, as one axis: the bits the other way round."""
    place = tl.arange(0, 1 << LEVELS)
    exponent = place * 0
    for bit in tl.static_range(LEVELS):
        exponent |= ((place >> bit) & 1) << (LEVELS - 1 - bit)
    return exponent


@triton.jit
def _epps_pulley_kernel(
    p_ptr,
    scales_ptr,
    shift_ptr,
    table_ptr,
    coefficient_ptr,
    residual_ptr,
    sums_ptr,
    samples,
    p_slice,
    p_view,
    residual_part,
    first,
    slices,
    knots,
    unscale,
    turn,
    residual_scale,
    PARTS: tl.constexpr,
    KEEP: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    AMD: tl.constexpr,
):
    """The statistic of a row, and its gradient in 16 bits.

    With c, s the means of ``cos(t p)`` and ``sin(t p)``: ``T = N sum_t w [(c - phi)^2 + s^2]``, so
    ``dT/dp_i = sum_t a cos(t p_i) + b sin(t p_i)``, ``a = 2 w t s``, ``b = -2 w t (c - phi)``.
    Knots beyond 2^LEVELS are taken in groups of so many.

    Args:
        p_ptr: projections of some slices, (k, V, padded N), centred.
        scales_ptr: (V, 4), float64; the first: 1/s of X.
        shift_ptr: (V, K): the projections of the mean.
        table_ptr: (3, knots): t, phi(t), w(t) without t = 0.
        coefficient_ptr: scratch, (k, V, GROUPS, 2, 2^LEVELS), if there are several groups.
        residual_ptr: out, (PARTS, padded K, V, padded N), if KEEP.
        sums_ptr: out, (V, K).
    """
    COUNT: tl.constexpr = 1 << LEVELS
    AXES: tl.constexpr = [2] * LEVELS
    WHOLE: tl.constexpr = [1] + AXES  # noqa: RUF005 (Triton knows no other way)
    HALF: tl.constexpr = [BLOCK] + AXES[1:]  # noqa: RUF005
    slice_ = tl.program_id(0)
    view = tl.program_id(1)
    p_ptr += slice_.to(tl.int64) * p_slice + view.to(tl.int64) * p_view
    scale = (tl.load(scales_ptr + 4 * view) * unscale).to(tl.float32)
    shift = tl.load(shift_ptr + view * slices + first + slice_)
    if GROUPS > 1:
        row = (slice_ * tl.num_programs(1) + view).to(tl.int64)
        coefficient_ptr += row * (GROUPS * 2 * COUNT)
    total = 0.0
    a = tl.zeros(AXES, tl.float32)
    b = tl.zeros(AXES, tl.float32)
    for group in range(GROUPS):
        # Of the exponents' lower half, and of the upper, which is added as it is multiplied.
        cosines = tl.zeros(HALF, tl.float32)
        sines = tl.zeros(HALF, tl.float32)
        upper_cosines = tl.zeros(HALF, tl.float32)
        upper_sines = tl.zeros(HALF, tl.float32)
        for start in range(0, samples, BLOCK):
            n = start + tl.arange(0, BLOCK)
            ok = n < samples
            turns = (tl.load(p_ptr + n, mask=ok, other=0) * scale + shift) * turn
            cosine, sine = unit_circle(turns)
            c, s = cosine, sine
            if GROUPS > 1:
                c, s = unit_circle(turns * (group * COUNT + 1))
            c, s = _powers(tl.where(ok, c, 0), tl.where(ok, s, 0), cosine, sine, LEVELS - 1)
            cosines += c
            sines += s
            cz, sz = _doubled_often(cosine, sine, LEVELS - 1)
            upper_cosines = upper_cosines + c * cz - s * sz
            upper_sines = upper_sines + s * cz + c * sz
        knot = group * COUNT + _exponents(LEVELS)
        there = knot < knots
        t = tl.load(table_ptr + knot, mask=there, other=0)
        phi = tl.load(table_ptr + knots + knot, mask=there, other=0)
        weight = tl.load(table_ptr + 2 * knots + knot, mask=there, other=0)
        weight = tl.reshape(weight, AXES)
        slope = tl.reshape(2 * t, AXES) * weight
        excess = tl.sum(tl.join(cosines, upper_cosines), 0) / samples - tl.reshape(phi, AXES)
        mean = tl.sum(tl.join(sines, upper_sines), 0) / samples
        total += tl.sum(weight * (excess * excess + mean * mean))
        a = slope * mean
        b = -slope * excess
        if GROUPS > 1:
            place = coefficient_ptr + group * 2 * COUNT + tl.arange(0, COUNT)
            tl.store(place, tl.reshape(a, [COUNT]))
            tl.store(place + COUNT, tl.reshape(b, [COUNT]))
    tl.store(sums_ptr + view * slices + first + slice_, total * samples)
    if KEEP:
        if GROUPS > 1:
            barrier(AMD)
        residual_ptr += (first + slice_).to(tl.int64) * p_slice + view.to(tl.int64) * p_view
        for start in range(0, samples, BLOCK):
            n = start + tl.arange(0, BLOCK)
            ok = n < samples
            turns = (tl.load(p_ptr + n, mask=ok, other=0) * scale + shift) * turn
            cosine, sine = unit_circle(turns)
            if GROUPS == 1:
                real, imaginary = _sum_of_powers(
                    tl.expand_dims(a, 0), tl.expand_dims(-b, 0), cosine, sine, LEVELS
                )
                slope = cosine * real - sine * imaginary
            else:
                slope = tl.zeros([BLOCK], tl.float32)
                for group in range(GROUPS):
                    place = coefficient_ptr + group * 2 * COUNT + tl.arange(0, COUNT)
                    c, s = unit_circle(turns * (group * COUNT + 1))
                    c, s = _powers(c, s, cosine, sine, LEVELS)
                    some = c * tl.reshape(tl.load(place), WHOLE)
                    some += s * tl.reshape(tl.load(place + COUNT), WHOLE)
                    slope += tl.sum(tl.reshape(some, [BLOCK, COUNT]), 1)
            slope *= residual_scale
            high = slope.to(tl.float16)
            tl.store(residual_ptr + n, high, mask=ok)
            if PARTS == 2:
                low = (slope - high.to(tl.float32)).to(tl.float16)
                tl.store(residual_ptr + residual_part + n, low, mask=ok)


class Knots(NamedTuple):
    """Where the characteristic function is compared.

    Attributes:
        table: t, exp(-t^2/2) and weights, (3, knots), float32, without t = 0.
        step: dt.
        bound: of the absolute gradient of the statistic.
    """

    table: Tensor
    step: float
    bound: float


def epps_pulley(rows: Rows, shift: Tensor, knots: Knots) -> None:
    """``rows.sums`` becomes the statistic, ``rows.residual`` its gradient.

    Args:
        rows: centred projections.
        shift: those of the means, (V, K).
        knots: where to compare.
    """
    count, views = rows.grid
    number = knots.table.shape[1]
    levels = max(1, min(4, (number - 1).bit_length()))
    groups = -(-number >> levels)
    scratch = None
    if groups > 1:
        scratch = rows.projections.new_empty(count * views * groups * 2 << levels)
    warps = 1
    # As many warps as fill the chip, but each with several steps.
    while warps < 16 and count * views * warps < 2048 and 256 * warps < rows.samples:
        warps *= 2
    launch.call(
        _epps_pulley_kernel,
        rows.grid,
        rows.projections,
        rows.scales,
        shift,
        knots.table,
        scratch,
        rows.residual,
        rows.sums,
        *rows.numbers,
        number,
        rows.unscale,
        knots.step / (2 * math.pi),
        rows.residual_scale,
        PARTS=rows.parts,
        KEEP=rows.residual is not None,
        LEVELS=levels,
        GROUPS=groups,
        BLOCK=64 * warps,
        AMD=launch.is_amd(rows.sums.device),
        num_warps=warps,
        num_stages=1,
    )
