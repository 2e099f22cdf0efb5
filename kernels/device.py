"""Device functions that the kernels share: scales, tickets, tiles and their product."""

import triton
import triton.language as tl


@triton.jit
def power_of_two(bound, exponent: tl.constexpr):
    """The power of two that brings a bound >= 0 into [2^(exponent - 1), 2^exponent); 1 for 0.

    Read from the bits of the exponent, so exact; kept to normal float32 numbers at both ends.
    """
    field = (bound.to(tl.int32, bitcast=True) >> 23) & 255
    wanted = tl.minimum(tl.maximum(253 + exponent - field, 1), 253)
    return tl.where(bound > 0, (wanted << 23).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def inverse(power):
    """1 / a power of two from :func:`power_of_two`, exactly."""
    bits = (254 << 23) - power.to(tl.int32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def barrier(AMD: tl.constexpr):
    """What every thread of the program has written, all of them see after this.

    AMD's barrier does not wait for writes, so that is asked of every thread.
    """
    if AMD:
        wait: tl.constexpr = "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1"
        constraints: tl.constexpr = "=v,v,~{memory}"
        tl.inline_asm_elementwise(wait, constraints, [tl.arange(0, 64)], tl.int32, False, 1)
    tl.debug_barrier()


@triton.jit
def is_last(ticket_ptr, programs, AMD: tl.constexpr):
    """Whether this program is the last of so many that asks; what the others wrote is then visible.

    The first barrier puts the writes of all threads before the one thread's release, the second
    its acquire before the reads of all threads. Sums of integers have no order to depend on.
    """
    barrier(AMD)
    before = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before == programs - 1


@triton.jit
def doubled(cosine, sine):
    """Of twice the angle."""
    return (cosine - sine) * (cosine + sine), 2 * sine * cosine


@triton.jit
def unit_circle(turns):
    """Cosine and sine of ``2 pi turns``.

    Of the half angle by polynomials, least squares of ``sin(pi x) / x`` and ``cos(pi x)`` in x^2
    over |x| <= 1/2, good to 1e-8; then doubled.
    """
    x = turns - tl.floor(turns + 0.5)
    y = x * x
    sine = 0.08205041 + y * -0.00702838646
    sine = 3.14159274 + y * (-5.16771269 + y * (2.55016327 + y * (-0.599252224 + y * sine)))
    cosine = 0.235325441 + y * (-0.0257763285 + y * 0.00184000551)
    cosine = 1.0 + y * (-4.93480206 + y * (4.05871201 + y * (-1.3352623 + y * cosine)))
    return doubled(cosine, x * sine)


@triton.jit
def finite_or_nan(upstream_ptr, value_ptr):
    """The upstream gradient, or NaN where the value is not finite."""
    return tl.load(upstream_ptr).to(tl.float32) + tl.load(value_ptr).to(tl.float32) * 0


@triton.jit
def triangle(index):
    """Row and column of an element of a lower triangle that is numbered row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)  # the root may round across an integer
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def banded_triangle(index, rows, BAND: tl.constexpr):
    """The same elements in bands of rows, each band column by column.

    Programs that run at the same time then share rows and columns of the operand in the cache. A
    band is a rectangle and, at its right end, a small triangle.
    """
    row, _ = triangle(index)
    first = row // BAND * BAND
    local = index - first * (first + 1) // 2
    height = tl.minimum(BAND, rows - first)
    rectangle = first * height
    row, column = triangle(tl.maximum(local - rectangle, 0))
    return (
        first + tl.where(local < rectangle, local % height, row),
        tl.where(local < rectangle, local // height, first + column),
    )


@triton.jit
def tile_of(index, rows, columns, BAND: tl.constexpr):
    """Row and column of a tile; tiles are numbered in bands of rows, each column by column."""
    band = index // (BAND * columns)
    height = tl.minimum(BAND, rows - band * BAND)
    local = index % (BAND * columns)
    return band * BAND + local % height, local // height


@triton.jit
def multiply(
    a_ptr,
    b_ptr,
    a_part,
    b_part,
    a_step,
    b_step,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """``a @ b`` over ``steps`` steps of the pointers, no masks: operands are padded.

    Of two parts three products are taken, small ones first, and every step is added in float32
    with rounding to nearest: a tensor core truncates as it accumulates.
    """
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(steps):
        a = tl.load(a_ptr)
        b = tl.load(b_ptr)
        if PARTS == 2:
            some = tl.dot(a, tl.load(b_ptr + b_part), out_dtype=tl.float32)
            some = tl.dot(tl.load(a_ptr + a_part), b, some)
            total += tl.dot(a, b, some)
        else:
            total = tl.dot(a, b, total)
        a_ptr += a_step
        b_ptr += b_step
    return total


@triton.jit
def half(tile, right: tl.constexpr):
    """The left or the right half of the columns."""
    HALF: tl.constexpr = tile.shape[1] // 2
    halves = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, HALF)), (0, 2, 1)))
    return halves[1 if right else 0]


@triton.jit
def columns(tile, piece: tl.constexpr, PIECES: tl.constexpr):
    """One of 1, 2 or 4 pieces of a tile: with all of it at once, a large epilogue would spill."""
    if PIECES == 4:
        result = half(half(tile, piece >= 2), piece % 2 == 1)
    elif PIECES == 2:
        result = half(tile, piece == 1)
    else:
        result = tile
    return result
