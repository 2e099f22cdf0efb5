"""First pass over the embeddings: the mean and the sum of squares about it, of every column."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .plan import Strips, strips

_PIVOT_ROWS = 16


@triton.jit
def _moments_kernel(
    z_ptr,
    pivot_ptr,
    partial_ptr,
    reach_ptr,
    ticket_ptr,
    view_stride,
    sample_stride,
    dimension_stride,
    samples,
    dimensions,
    split_rows,
    tickets,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIVOT_ROWS: tl.constexpr,
):
    """Moments of one split of one strip, about a pivot that all splits of a column share.

    The pivot, the mean of the first rows about the first one, is near the data and equals a
    constant column exactly; so offsets cancel before anything is squared. Each slot of the tile
    keeps a running mean and sum of squares (Welford, 1962), which are merged at the end.

    Args:
        z_ptr: (V, N, D), any strides.
        pivot_ptr: out, (V, D).
        partial_ptr: out, (V, splits, 2, D): mean less pivot, sum of squares about it.
        reach_ptr: out, (V, splits, strips): largest distance from the pivot.
        ticket_ptr: out, (tickets,): zeroed for the kernels that follow.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    view = tl.program_id(2)
    program = (view * tl.num_programs(1) + split) * tl.num_programs(0) + strip
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for i in range(program * 128, tickets, programs * 128):
        ticket = i + tl.arange(0, 128)
        tl.store(ticket_ptr + ticket, tl.zeros([128], tl.int32), mask=ticket < tickets)

    d = strip * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < dimensions
    column_ptr = z_ptr + view.to(tl.int64) * view_stride + d.to(tl.int64) * dimension_stride
    first = tl.load(column_ptr, mask=inside, other=0).to(tl.float32)
    head = tl.arange(0, PIVOT_ROWS)
    there = (head < samples)[:, None] & inside[None, :]
    heads = column_ptr[None, :] + head.to(tl.int64)[:, None] * sample_stride
    near = tl.load(heads, mask=there, other=0).to(tl.float32) - first[None, :]
    share = 1.0 / tl.minimum(samples, PIVOT_ROWS)
    pivot = first + tl.sum(tl.where(there, near * share, 0), 0)

    begin = split * split_rows
    end = tl.minimum(begin + split_rows, samples)
    slot = tl.arange(0, ROWS)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    reach = tl.zeros([ROWS, COLUMNS], tl.float32)
    count = 0.0
    for start in range(begin, end, ROWS):
        n = start + slot
        ok = (n < end)[:, None] & inside[None, :]
        offset = n.to(tl.int64)[:, None] * sample_stride
        x = tl.load(column_ptr[None, :] + offset, mask=ok, other=0).to(tl.float32)
        count += 1.0
        y = tl.where(ok, x - pivot[None, :], mean)
        delta = y - mean
        mean += delta / count
        squares += delta * (y - mean)
        reach = tl.maximum(reach, tl.abs(tl.where(ok, y, 0)))

    rows = end - begin
    weight = ((rows - slot + ROWS - 1) // ROWS).to(tl.float32)[:, None]  # rows of each slot
    total = tl.sum(weight * mean, 0) / rows
    apart = mean - total[None, :]
    squares_total = tl.sum(squares + weight * apart * apart, 0)
    row = (view * tl.num_programs(1) + split).to(tl.int64) * 2
    tl.store(partial_ptr + row * dimensions + d, total, mask=inside)
    tl.store(partial_ptr + (row + 1) * dimensions + d, squares_total, mask=inside)
    tl.store(reach_ptr + program, tl.max(tl.max(reach, 1), 0))
    if split == 0:
        tl.store(pivot_ptr + view.to(tl.int64) * dimensions + d, pivot, mask=inside)


class Columns(NamedTuple):
    """What the first pass leaves of a batch (V, N, D), and how it was cut."""

    z: Tensor
    pivot: Tensor
    partial: Tensor
    reach: Tensor
    tickets: Tensor
    cut: Strips


def moments(z: Tensor, tickets: int) -> Columns:
    """The moments of every column and split; ``tickets`` zeros for later kernels."""
    views, samples, dimensions = z.shape
    cut = strips(launch.target(z.device), views, samples, dimensions)
    float32 = functools.partial(z.new_empty, dtype=torch.float32)
    columns = Columns(
        z,
        float32((views, dimensions)),
        float32((views, cut.splits, 2, dimensions)),
        float32((views, cut.splits, cut.strips)),
        z.new_empty(tickets, dtype=torch.int32),
        cut,
    )
    launch.call(
        _moments_kernel,
        (cut.strips, cut.splits, views),
        *columns[:5],
        *z.stride(),
        samples,
        dimensions,
        cut.split_rows,
        tickets,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        PIVOT_ROWS=_PIVOT_ROWS,
        num_warps=cut.warps,
    )
    return columns
