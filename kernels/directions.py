"""Random directions: their draw, and the operand of the products that is made of them."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import barrier, unit_circle

# Of the operand: for D up to 2^16 no part of a typical element is below 16-bit numbers.
DIRECTION_SCALE = 2.0**12

# The multipliers of the splitmix64 generator, as signed 64-bit integers.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_SECOND = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def _scramble(x):
    """splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words."""
    x += _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _draw_kernel(
    seed_ptr,
    step_ptr,
    out_ptr,
    offset,
    dimensions,
    slices,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AMD: tl.constexpr,
):
    """Unit rows of Gaussian numbers, each a function of (seed, step, slice, dimension) alone.

    The numbers of :func:`vicreg_losses._slices.counter_normal`: pairs by Box and Muller (1958), the
    cosines in the first half of a row and the sines in the second.

    Args:
        seed_ptr, step_ptr: int64, 0-dim.
        out_ptr: out, (K, D).
    """
    key = _scramble(_scramble(tl.load(seed_ptr)) + (tl.load(step_ptr) + offset))
    slice_ = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    half = (dimensions + 1) // 2
    row = out_ptr + slice_[:, None] * dimensions
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, half, COLUMNS):
        pair = start + tl.arange(0, COLUMNS)
        counter = (slice_[:, None] << 32) + pair.to(tl.int64)[None, :]
        bits = _scramble(_scramble(counter + key) + key)
        first = (((bits >> 32) & 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
        first = tl.minimum(first, 0.99999994)  # never a radius of 0
        radius = tl.sqrt_rn(-2 * tl.log(first))
        cosine, sine = unit_circle((bits & 0xFFFFFFFF).to(tl.float32) * 2.3283064365386963e-10)
        ok = (slice_ < slices)[:, None] & (pair < half)[None, :]
        second = ok & (half + pair < dimensions)[None, :]
        cosine = tl.where(ok, radius * cosine, 0)
        sine = tl.where(second, radius * sine, 0)
        squares += cosine * cosine + sine * sine
        tl.store(row + pair[None, :], cosine, mask=ok)
        tl.store(row + half + pair[None, :], sine, mask=second)
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    lost = norm == 0  # one number in 2^24 is 0, and a slice of one dimension has but one
    factor = 1 / tl.where(lost, 1, norm)
    barrier(AMD)
    for start in range(0, dimensions, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        ok = (slice_ < slices)[:, None] & (d < dimensions)[None, :]
        x = tl.load(row + d[None, :], mask=ok, other=0) * factor[:, None]
        x = tl.where(lost[:, None], tl.where((d == 0)[None, :], 1.0, 0.0), x)
        tl.store(row + d[None, :], x, mask=ok)


@triton.jit
def _operand_kernel(
    w_ptr,
    statistics_ptr,
    out_ptr,
    shift_ptr,
    dimension_stride,
    slice_stride,
    views,
    dimensions,
    slices,
    padded_dimensions,
    scale,
    PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VIEWS: tl.constexpr,
):
    """The directions in 16 bits, slice by slice; and what they make of the means.

    Args:
        w_ptr: (D, K), any strides, float32.
        statistics_ptr: (V, 4, D), if SHIFT.
        out_ptr: out, (padded K, 1 or 3, padded D), 0 in the padding: hi, or hi, hi, lo.
        shift_ptr: out, (V, K), if SHIFT.
    """
    k = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    view = tl.program_id(1) * VIEWS + tl.arange(0, VIEWS)
    shift = tl.zeros([ROWS, VIEWS], tl.float32)
    for start in range(0, padded_dimensions, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        place = k[:, None] * slice_stride + d.to(tl.int64)[None, :] * dimension_stride
        inside = (k < slices)[:, None] & (d < dimensions)[None, :]
        w = tl.load(w_ptr + place, mask=inside, other=0)
        if SHIFT:
            for i in range(VIEWS):
                which = tl.program_id(1) * VIEWS + i
                column = statistics_ptr + which.to(tl.int64) * 4 * dimensions + d
                there = d < tl.where(which < views, dimensions, 0)
                mean = tl.load(column, mask=there, other=0)
                mean += tl.load(column + dimensions, mask=there, other=0)
                some = tl.sum(w * mean[None, :], 1)
                shift += tl.where((tl.arange(0, VIEWS) == i)[None, :], some[:, None], 0)
        if tl.program_id(1) == 0:
            w *= scale
            high = w.to(tl.float16)
            row = k[:, None] * ((2 * PARTS - 1) * padded_dimensions)
            out = out_ptr + row + d[None, :]
            fits = tl.broadcast_to((d < padded_dimensions)[None, :], [ROWS, COLUMNS])
            tl.store(out, high, mask=fits)
            if PARTS == 2:
                low = (w - high.to(tl.float32)).to(tl.float16)
                tl.store(out + padded_dimensions, high, mask=fits)
                tl.store(out + 2 * padded_dimensions, low, mask=fits)
    if SHIFT:
        ok = (k < slices)[:, None] & (view < views)[None, :]
        tl.store(shift_ptr + view.to(tl.int64)[None, :] * slices + k[:, None], shift, mask=ok)


def draw(seed: Tensor, step: Tensor, offset: int, dimensions: int, slices: int) -> Tensor:
    """Unit columns, (D, K), float32, in one kernel; no value comes back to the host.

    Args:
        seed: which sequence; 0-dim, int64.
        step: the position in it; 0-dim, int64.
        offset: added to the position.
        dimensions: D.
        slices: K.
    """
    out = seed.new_empty((slices, dimensions), dtype=torch.float32)
    launch.call(
        _draw_kernel,
        (-(-slices // 4),),
        seed,
        step,
        out,
        offset,
        dimensions,
        slices,
        ROWS=4,
        COLUMNS=128,
        AMD=launch.is_amd(seed.device),
        num_warps=4,
    )
    return out.T


def operand(
    directions: Tensor, statistics: Tensor | None, padded: tuple[int, int], parts: int
) -> tuple[Tensor, Tensor | None]:
    """The directions in 16 bits, times a power of two; and the projections of the means.

    Args:
        directions: (D, K), float32, any strides.
        statistics: (V, 4, D), from :func:`.centering.center`, for the second result.
        padded: K and D of the operand.
        parts: 1, or 2 for hi and lo.

    Returns:
        (padded K, 1 or 3, padded D), hi, or hi, hi, lo, 0 in the padding; and (V, K), or ``None``.
    """
    dimensions, slices = directions.shape
    views = 1 if statistics is None else len(statistics)
    empty = functools.partial(directions.new_empty, dtype=torch.float32)
    shift = None if statistics is None else empty((views, slices))
    w = directions.new_empty((padded[0], 2 * parts - 1, padded[1]), dtype=torch.float16)
    launch.call(
        _operand_kernel,
        (padded[0] // 16, -(-views // 4)),
        directions,
        statistics,
        w,
        shift,
        *directions.stride(),
        views,
        dimensions,
        slices,
        padded[1],
        DIRECTION_SCALE,
        PARTS=parts,
        SHIFT=statistics is not None,
        ROWS=16,
        COLUMNS=128,
        VIEWS=4,
        registers=128,  # not to be limited to fewer by an occupancy that it does not need
        num_warps=4,
    )
    return w, shift
