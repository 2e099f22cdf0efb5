"""The inner product of the covariance term, half of it computed, and its energy.

X (V, N, D) is centred and scaled. Gram form: ``G = X X^T``, N x N; feature form: ``C = X^T X``,
D x D, kept without its diagonal. Since ``|G| = |C|``, the energy of the off-diagonal covariances is
``|G|^2 - |diag C|^2``, or that of C with its diagonal left out.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .centering import Centered
from .device import banded_triangle, columns, is_last, multiply
from .plan import Plan


@triton.jit
def _piece(workspace_ptr, slot, piece: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to a piece of a tile in the workspace, where pieces follow one another."""
    row = (slot.to(tl.int64) + piece) * ROWS + tl.arange(0, ROWS)
    return workspace_ptr + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _finish_value(energy_ptr, scales_ptr, value_ptr, views, tiles, factor):
    """The covariance term from the energies of all tiles, added in their order, in float64."""
    value = tl.full([], 0, tl.float64)
    for view in range(views):
        energies = tl.zeros([256], tl.float64)
        for start in range(0, tiles, 256):
            tile = start + tl.arange(0, 256)
            place = energy_ptr + view * tiles + tile
            energies += tl.load(place, mask=tile < tiles, other=0, cache_modifier=".cg")
        rest = tl.sum(energies, 0) - tl.load(scales_ptr + 4 * view + 3)
        unscale = tl.load(scales_ptr + 4 * view)
        square = unscale * unscale
        value += tl.where(rest < 0, 0.0, rest) * square * square
    tl.store(value_ptr, (value * factor).to(tl.float32))


@triton.jit
def _inner_kernel(
    x_ptr,
    scales_ptr,
    inner_ptr,
    energy_ptr,
    workspace_ptr,
    ticket_ptr,
    value_ptr,
    part_stride,
    view_stride,
    row_stride,
    depth_stride,
    views,
    side,
    tiles,
    steps,
    span,
    factor,
    GRAM: tl.constexpr,
    KEEP: tl.constexpr,
    SHARED: tl.constexpr,
    AMD: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """Half of a symmetric product, its energy, and the value of the covariance term.

    The work of all views is one line of ``views * tiles * steps`` steps, and program p takes those
    from ``p span`` on. If tiles are shared, each leaves its piece of a tile in the workspace, and
    the last to come adds the pieces in the order of the line, so the result does not depend on who
    came last. The last tile ends the value.

    Args:
        x_ptr: (PARTS, V, ...), rows along the side of the result, depth along the contraction.
        scales_ptr: (V, 4), float64.
        inner_ptr: out if KEEP, (PARTS, V, side, side), 16 bits, both triangles.
        energy_ptr: out, (V, tiles): weighted sums of squares.
        workspace_ptr: scratch, (programs, 2, ROWS, COLUMNS): pieces at the head and at the tail.
        ticket_ptr: (1 + V tiles,), zeros.
        value_ptr: out, the covariance term, 0-dim.
    """
    RATIO: tl.constexpr = COLUMNS // ROWS
    PIECES: tl.constexpr = max(1, COLUMNS // 64)
    WIDTH: tl.constexpr = COLUMNS // PIECES
    program = tl.program_id(0)
    begin = program.to(tl.int64) * span
    end = tl.minimum(begin + span, tl.cast(views, tl.int64) * tiles * steps)
    for tile in range((begin // steps).to(tl.int32), ((end + steps - 1) // steps).to(tl.int32)):
        view = tile // tiles
        local = tile % tiles
        block_row, block_column = banded_triangle(local // RATIO, side // COLUMNS, BAND)
        row = (block_row * RATIO + local % RATIO) * ROWS
        column = block_column * COLUMNS
        line = tl.cast(tile, tl.int64) * steps
        first = tl.maximum(begin - line, 0)
        some = (tl.minimum(end - line, steps) - first).to(tl.int32)
        depth = first * DEPTH + tl.arange(0, DEPTH)
        x = x_ptr + tl.cast(view, tl.int64) * view_stride
        a_row = (row + tl.arange(0, ROWS)).to(tl.int64)
        b_row = (column + tl.arange(0, COLUMNS)).to(tl.int64)
        a = x + a_row[:, None] * row_stride + depth[None, :] * depth_stride
        b = x + b_row[None, :] * row_stride + depth[:, None] * depth_stride
        advance = DEPTH * depth_stride
        total = multiply(
            a, b, part_stride, part_stride, advance, advance, some, ROWS, COLUMNS, PARTS
        )

        whole = True
        if SHARED:
            slot = (2 * program + (first == 0).to(tl.int32)) * PIECES
            for p in tl.static_range(PIECES):
                tl.store(_piece(workspace_ptr, slot, p, ROWS, WIDTH), columns(total, p, PIECES))
            head = (line // span).to(tl.int32)  # the first and the last program of the tile
            tail = ((line + steps - 1) // span).to(tl.int32)
            whole = is_last(ticket_ptr + 1 + tile, tail - head + 1, AMD)
        if whole:
            energy = 0.0
            for p in tl.static_range(PIECES):
                if SHARED:
                    piece = tl.zeros([ROWS, WIDTH], tl.float32)
                    for other in range(head, tail + 1):
                        starts_here = tl.cast(other, tl.int64) * span <= line
                        slot = (2 * other + starts_here.to(tl.int32)) * PIECES
                        place = _piece(workspace_ptr, slot, p, ROWS, WIDTH)
                        piece += tl.load(place, cache_modifier=".cg")
                else:
                    piece = columns(total, p, PIECES)
                i = row + tl.arange(0, ROWS)
                j = column + p * WIDTH + tl.arange(0, WIDTH)
                if not GRAM:
                    piece = tl.where(i[:, None] == j[None, :], 0.0, piece)
                energy += tl.sum(piece * piece)
                if KEEP:
                    kept = piece * tl.load(scales_ptr + 4 * view + 1).to(tl.float32)
                    high = kept.to(tl.float16)
                    low = (kept - high.to(tl.float32)).to(tl.float16)
                    out = inner_ptr + tl.cast(view, tl.int64) * side * side
                    part = tl.cast(views, tl.int64) * side * side
                    upright = out + i.to(tl.int64)[:, None] * side + j[None, :]
                    tl.store(upright, high)
                    if PARTS == 2:
                        tl.store(upright + part, low)
                    if block_row != block_column:
                        mirrored = out + j.to(tl.int64)[None, :] * side + i[:, None]
                        tl.store(mirrored, high)
                        if PARTS == 2:
                            tl.store(mirrored + part, low)
            # The tiles of the blocks on the diagonal hold both triangles.
            tl.store(energy_ptr + tile, tl.where(block_row == block_column, energy, 2 * energy))
            if is_last(ticket_ptr, views * tiles, AMD):
                _finish_value(energy_ptr, scales_ptr, value_ptr, views, tiles, factor)


def inner_product(
    centered: Centered, shape: tuple[int, int, int], plan: Plan, tickets: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The covariance term, and the scaled inner product for :func:`gradient`.

    Args:
        centered: from :func:`.moments.center`.
        shape: (V, N, D).
        plan: how to cut the work.
        tickets: zeros, ``plan.tickets`` of them.
        keep: whether the inner product is wanted.

    Returns:
        The value, 0-dim, and (PARTS, V, side, side) in 16 bits, or ``None``.
    """
    views, samples, dimensions = shape
    x, scales, blocks = centered.centered, centered.scales, plan.inner
    assert x is not None
    side = plan.side
    float32 = functools.partial(x.new_empty, dtype=torch.float32)
    value = float32(())
    inner = x.new_empty((plan.parts, views, side, side)) if keep else None
    pieces = plan.programs if plan.is_shared else 0
    row_stride, depth_stride = (x.stride(2), 1) if plan.gram else (1, x.stride(2))
    launch.call(
        _inner_kernel,
        (plan.programs,),
        x,
        scales,
        inner,
        float32((views, plan.tiles)),
        float32((pieces, 2, blocks.rows, blocks.columns)),
        tickets,
        value,
        x.stride(0),
        x.stride(1),
        row_stride,
        depth_stride,
        views,
        side,
        plan.tiles,
        plan.steps,
        plan.span,
        1 / (views * dimensions * (samples - 1) ** 2),
        GRAM=plan.gram,
        KEEP=keep,
        SHARED=plan.is_shared,
        AMD=launch.is_amd(x.device),
        PARTS=plan.parts,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        DEPTH=blocks.depth,
        BAND=8,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return value, inner
