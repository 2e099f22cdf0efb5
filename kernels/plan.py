"""How work is cut: tiles of the products, strips of the passes, pieces for the programs.

No autotuner: all are pure functions of the problem and the chip, so that two processes never
differ, nothing is timed at a first call, and all of it can be tested without a device.
"""

import math
from typing import NamedTuple

from .launch import Target

Shape = tuple[int, int, int]  # (V, N, D)


class Blocks(NamedTuple):
    """Shape of the work of one program of a matrix product.

    Attributes:
        rows, columns: of the tile of the result; columns are a multiple of rows.
        depth: of the contraction, a step.
        warps: of the program.
        stages: steps in flight.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Rows, columns and warps of a tile, by the parts of an operand: two have twice the operands and the
# accumulators. And by columns the speed that is expected of it: a wide one reads less for each
# operation. Not yet measured on a GPU.
_TILES = {1: ((128, 256, 8), (128, 128, 8), (64, 64, 4)), 2: ((64, 128, 8), (64, 64, 4))}
_RATES = {256: 1.0, 128: 0.85, 64: 0.5}
# Tiles for each processor from which on the last, partly filled round is cheap.
_WHOLE = 4


def inner_blocks(target: Target, parts: int, views: int, side: int, depth: int) -> Blocks:
    """Block shape of half of a product (side, depth) (depth, side).

    Programs may share a tile, so only what is too small for a processor counts: the largest tile
    that leaves each of them 32 steps. The widest is not shared, its pieces would cost too much.
    """
    work = views * side * side // 2
    for rows, columns, warps in _TILES[parts]:
        shape = shaped(target, parts, rows, columns, warps)
        tiles = work // (rows * columns)
        if columns == 256 and tiles < _WHOLE * target.processors:
            continue
        if tiles * (depth // shape.depth) >= 32 * target.processors:
            return shape
    return shape


def gradient_blocks(
    target: Target, parts: int, views: int, samples: int, dimensions: int
) -> Blocks:
    """Block shape of a product with a result (samples, dimensions): the one that ends first."""

    def cost(tile: tuple[int, int, int]) -> float:
        rows, columns, _ = tile
        tiles = views * -(-samples // rows) * -(-dimensions // columns)
        return -(-tiles // target.processors) * rows * columns / _RATES[columns]

    return shaped(target, parts, *min(_TILES[parts], key=cost))


def shaped(target: Target, parts: int, rows: int, columns: int, warps: int) -> Blocks:
    """A tile with the deepest step and the most stages that fit the shared memory."""
    amd = target.arch.startswith("gfx")
    depth = 32 if amd and parts == 2 else 64
    step = 2 * parts * (rows + columns) * depth  # bytes
    stages = 2 if amd else max(2, min(4, target.shared // step))
    return Blocks(rows, columns, depth, warps, stages)


def even_span(target: Target, tiles: int, steps: int) -> int:
    """Steps for each program, of a line of ``tiles * steps``.

    Whole tiles where they fill the processors evenly enough; else equal pieces of the line, one
    for each processor. Pieces are not shorter than ``sqrt(steps)``: a program that finishes a tile
    reads the pieces of it one after the other.
    """
    if tiles >= _WHOLE * target.processors:
        return steps
    return max(-(-tiles * steps // target.processors), math.isqrt(steps))


STRIP = 64  # columns


class Strips(NamedTuple):
    """How the elementwise passes cut (N, D): columns by strips, rows by splits.

    Attributes:
        columns: of a strip.
        rows: of a step of a program.
        strips: number of strips.
        splits: number of programs on a strip, at most 128.
        split_rows: rows of each of them, a multiple of ``rows``.
        warps: of the program.
    """

    columns: int
    rows: int
    strips: int
    splits: int
    split_rows: int
    warps: int


def strips(target: Target, views: int, samples: int, dimensions: int) -> Strips:
    """Enough programs for eight on each processor, where the batch has as many."""
    rows = 32
    count = -(-dimensions // STRIP)
    wanted = -(-8 * target.processors // (views * count))
    splits = max(1, min(128, wanted, -(-samples // (2 * rows))))
    split_rows = rows * -(-samples // (rows * splits))
    return Strips(STRIP, rows, count, -(-samples // split_rows), split_rows, 4)


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-size // multiple) * multiple


class Plan(NamedTuple):
    """How the two products are cut.

    Attributes:
        gram: the form.
        parts: 16-bit numbers for each element.
        inner, gradient: block shapes.
        padded: N and D of the operands.
        tiles: of the inner product, each view.
        steps: of each tile.
        span: steps of a program.
        programs: of the inner product.
        tickets: zeros that it needs: one for all tiles, one for each if they are shared.
    """

    gram: bool
    parts: int
    inner: Blocks
    gradient: Blocks
    padded: tuple[int, int]
    tiles: int
    steps: int
    span: int
    programs: int
    tickets: int

    @property
    def side(self) -> int:
        """Of the inner product."""
        return self.padded[0] if self.gram else self.padded[1]

    @property
    def is_shared(self) -> bool:
        """Whether programs share tiles."""
        return self.span % self.steps != 0


def plan(target: Target, shape: Shape, gram: bool, parts: int) -> Plan:
    """Choose the blocks and the split of the inner product for a batch (V, N, D)."""
    return cut(target, shape, gram, parts, *blocks(target, shape, gram, parts))


def blocks(target: Target, shape: Shape, gram: bool, parts: int) -> tuple[Blocks, Blocks]:
    """Block shapes of the inner product and of the gradient."""
    views, samples, dimensions = shape
    side, depth = (samples, dimensions) if gram else (dimensions, samples)
    inner = inner_blocks(target, parts, views, side, depth)
    return inner, gradient_blocks(target, parts, views, samples, dimensions)


def padding(gram: bool, shape: Shape, inner: Blocks, gradient: Blocks) -> tuple[int, int]:
    """N and D of the operands: whole tiles and steps, so that the products need no masks."""
    across = max(inner.columns, gradient.depth)  # of the side of the inner product
    along = inner.depth  # of the other one
    rows = max(gradient.rows, across if gram else along)
    columns = max(gradient.columns, round_up(64, along if gram else across))
    return round_up(shape[1], rows), round_up(shape[2], columns)


def cut(
    target: Target,
    shape: Shape,
    gram: bool,
    parts: int,
    inner: Blocks,
    gradient: Blocks,
    span: int | None = None,
) -> Plan:
    """A plan with given blocks, and a given number of steps for each program."""
    padded = padding(gram, shape, inner, gradient)
    side, depth = padded if gram else padded[::-1]
    count = side // inner.columns
    tiles = inner.columns // inner.rows * (count * (count + 1) // 2)
    steps = depth // inner.depth
    total = shape[0] * tiles
    if span is None:
        span = even_span(target, total, steps)
    programs = -(-total * steps // span)
    tickets = 1 + (total if span % steps else 0)
    return Plan(gram, parts, inner, gradient, padded, tiles, steps, span, programs, tickets)


class Network(NamedTuple):
    """How a row is sorted in registers.

    Attributes:
        bits: of the padded length.
        warps: of the program.
        places: bit of the place for each bit of the rank.
        local: 1 for each bit of the place that one thread holds both sides of.
    """

    bits: int
    warps: int
    places: tuple[int, ...]
    local: tuple[int, ...]


# Warps of a network by the bits of its length, for words of equal steps and for the exact order of
# float32, which needs more registers: the fewest that do not spill (2^14: by a few bytes).
_NETWORK_WARPS = {
    False: {11: 2, 12: 4, 13: 8, 14: 16},
    True: {10: 2, 11: 4, 12: 8, 13: 8},
}


def network(target: Target, samples: int, exact: bool) -> Network | None:
    """The network for rows of ``samples``; ``None`` for rows that no program can hold.

    A thread holds four neighbours, as it loads them, and those furthest apart: the low and the high
    bits of the place. They are the low bits of the rank.
    """
    warps = _NETWORK_WARPS[exact]
    bits = max(6, (samples - 1).bit_length())
    if bits > max(warps):
        return None
    count = warps.get(bits, 1)
    lanes = (6 if target.arch.startswith("gfx") else 5) + count.bit_length() - 1
    near = min(2, bits - lanes)
    local = (*range(near), *range(near + lanes, bits))
    across = tuple(range(near, near + lanes))
    return Network(bits, count, local + across, tuple(int(b in local) for b in range(bits)))


class SketchPlan(NamedTuple):
    """How the sketch is cut.

    Attributes:
        parts: 16-bit numbers for each element.
        gradient: block shape of the second product.
        padded: N and D of the operands.
        slices: K of the operands.
        chunk: slices that are projected at a time.
    """

    parts: int
    gradient: Blocks
    padded: tuple[int, int]
    slices: int
    chunk: int


# Projections at a time: 16 MiB of float32, which an L2 cache holds beside the operands. Rows that
# programs sort take so long that reading them from memory costs less than more launches: 256 MiB.
_PROJECTIONS = {False: 1 << 22, True: 1 << 26}


def sketch_plan(
    target: Target, shape: Shape, slices: int, parts: int, sorts: bool = False
) -> SketchPlan:
    """Choose the blocks for a batch (V, N, D) and K slices.

    Args:
        target: the chip.
        shape: of the batch.
        slices: K.
        parts: 16-bit numbers for each element of an operand.
        sorts: whether programs sort the rows.
    """
    views, samples, dimensions = shape
    gradient = gradient_blocks(target, parts, views, samples, dimensions)
    padded = round_up(samples, gradient.rows), round_up(dimensions, gradient.columns)
    depth = gradient.depth
    chunk = max(depth, _PROJECTIONS[sorts] // (views * padded[0]) // depth * depth)
    return SketchPlan(parts, gradient, padded, round_up(slices, depth), chunk)
