"""Gradients: by one product with the inner product, or of single columns.

With C = X^T X, m = diag C and G = X X^T, the energy ``E = sum_{i != j} C_ij^2`` has

    dE/dX = 4 X (C - diag m) = 4 X X^T X - 4 X diag m = 4 (G X - X diag m),

so the inner product is all that is kept. The epilogue adds what is element-wise: the diagonal of
the Gram form, the variance's ``X diag slope``, the centre's row of means. The columns of X sum to
0, so those of X C and of G X - X diag m do, and no pass has to centre the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import columns, finite_or_nan, multiply, tile_of
from .plan import Plan, strips

Term = tuple[Tensor, Tensor, float]  # upstream gradient, value, constant factor


@triton.jit
def _gradient_kernel(
    a_ptr,
    b_ptr,
    x_ptr,
    scales_ptr,
    statistics_ptr,
    covariance_up_ptr,
    covariance_ptr,
    variance_up_ptr,
    variance_ptr,
    center_up_ptr,
    center_ptr,
    out_ptr,
    a_part,
    b_part,
    a_view,
    b_view,
    a_stride,
    b_stride,
    x_part,
    x_view,
    samples,
    dimensions,
    padded_samples,
    padded_dimensions,
    steps,
    covariance_factor,
    variance_factor,
    center_factor,
    GRAM: tl.constexpr,
    VARIANCE: tl.constexpr,
    CENTER: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """``f (G X - X diag m)`` or ``f X C``, plus ``X diag slope`` and the row of means.

    Args:
        a_ptr, b_ptr: the factors, (PARTS, V, ...) with rows of contiguous elements.
        x_ptr: X, (PARTS, V, padded N, padded D).
        scales_ptr: (V, 4), float64.
        statistics_ptr: (V, 4, D).
        covariance_up_ptr and so on: upstream gradients and values of the terms, 0-dim.
        out_ptr: out, (V, N, D).
    """
    view = tl.program_id(1).to(tl.int64)
    row, column = tile_of(
        tl.program_id(0), padded_samples // ROWS, padded_dimensions // COLUMNS, BAND
    )
    n = (row * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column *= COLUMNS
    depth = tl.arange(0, DEPTH)
    a = a_ptr + view * a_view + n[:, None] * a_stride + depth[None, :]
    across = column + tl.arange(0, COLUMNS)
    b = b_ptr + view * b_view + depth.to(tl.int64)[:, None] * b_stride + across[None, :]
    total = multiply(a, b, a_part, b_part, DEPTH, DEPTH * b_stride, steps, ROWS, COLUMNS, PARTS)

    unscale = tl.load(scales_ptr + 4 * view)
    inner_scale = tl.load(scales_ptr + 4 * view + 1)
    factor = finite_or_nan(covariance_up_ptr, covariance_ptr).to(tl.float64) * covariance_factor
    factor = (factor * (unscale * unscale * tl.load(scales_ptr + 4 * view + 2))).to(tl.float32)
    variance = 0.0
    center = 0.0
    if VARIANCE:
        variance = finite_or_nan(variance_up_ptr, variance_ptr) * variance_factor
    if CENTER:
        center = finite_or_nan(center_up_ptr, center_ptr) * center_factor
    PIECES: tl.constexpr = max(1, COLUMNS // 64)
    WIDTH: tl.constexpr = COLUMNS // PIECES
    for piece in tl.static_range(PIECES):
        some = columns(total, piece, PIECES)
        d = column + piece * WIDTH + tl.arange(0, WIDTH)
        inside = d < dimensions
        statistics = statistics_ptr + view * 4 * dimensions + d
        some = some * factor
        if GRAM or VARIANCE:
            slope = tl.zeros([WIDTH], tl.float32)
            if GRAM:
                diagonal = tl.load(statistics + 2 * dimensions, mask=inside, other=0)
                slope -= diagonal * inner_scale.to(tl.float32) * factor
            if VARIANCE:
                slope += tl.load(statistics + 3 * dimensions, mask=inside, other=0) * variance
            place = x_ptr + view * x_view + n[:, None] * padded_dimensions + d[None, :]
            some += tl.load(place).to(tl.float32) * slope[None, :]
            if PARTS == 2:
                some += tl.load(place + x_part).to(tl.float32) * slope[None, :]
        some = some * unscale.to(tl.float32)
        if CENTER:
            mean = tl.load(statistics, mask=inside, other=0)
            mean += tl.load(statistics + dimensions, mask=inside, other=0)
            some += (mean * center)[None, :]
        ok = (n < samples)[:, None] & inside[None, :]
        out = out_ptr + (view * samples + n)[:, None] * dimensions + d[None, :]
        tl.store(out, some.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _column_gradient_kernel(
    z_ptr,
    statistics_ptr,
    variance_up_ptr,
    variance_ptr,
    center_up_ptr,
    center_ptr,
    out_ptr,
    view_stride,
    sample_stride,
    dimension_stride,
    samples,
    dimensions,
    split_rows,
    variance_factor,
    center_factor,
    VARIANCE: tl.constexpr,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``(z - mean) slope a + mean b``: the gradient of the variance and the centre terms.

    Args:
        z_ptr: (V, N, D), any strides.
        statistics_ptr: (V, 4, D).
        variance_up_ptr, center_up_ptr: upstream gradients, 0-dim.
        variance_ptr, center_ptr: the values, 0-dim.
        out_ptr: out, (V, N, D).
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    view = tl.program_id(2)
    d = strip * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < dimensions
    statistics = statistics_ptr + view.to(tl.int64) * 4 * dimensions + d
    pivot = tl.load(statistics, mask=inside, other=0)
    offset = tl.load(statistics + dimensions, mask=inside, other=0)
    column = tl.zeros([COLUMNS], tl.float32)
    row = tl.zeros([COLUMNS], tl.float32)
    if VARIANCE:
        slope = tl.load(statistics + 3 * dimensions, mask=inside, other=0)
        column = slope * (finite_or_nan(variance_up_ptr, variance_ptr) * variance_factor)
    if CENTER:
        row = (pivot + offset) * (finite_or_nan(center_up_ptr, center_ptr) * center_factor)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, samples)
    z_ptr += view.to(tl.int64) * view_stride
    out_ptr += view.to(tl.int64) * samples * dimensions
    for start in range(begin, end, ROWS):
        n = (start + tl.arange(0, ROWS)).to(tl.int64)
        ok = (n < end)[:, None] & inside[None, :]
        place = n[:, None] * sample_stride + d.to(tl.int64)[None, :] * dimension_stride
        z = tl.load(z_ptr + place, mask=ok, other=0).to(tl.float32)
        g = ((z - pivot[None, :]) - offset[None, :]) * column[None, :] + row[None, :]
        tl.store(out_ptr + n[:, None] * dimensions + d[None, :], g.to(out_ptr.dtype.element_ty), ok)


def product_gradient(
    centered: Tensor,
    inner: Tensor,
    statistics: Tensor,
    scales: Tensor,
    shape: tuple[int, int, int],
    plan: Plan,
    covariance: Term,
    variance: Term | None,
    center: Term | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the covariance term, and of the variance and the centre terms with it.

    Args:
        centered: X.
        inner: from :func:`inner_product`.
        statistics, scales: from :func:`.moments.center`.
        shape: (V, N, D).
        plan: how to cut the work.
        covariance, variance, center: the terms.
        dtype: of the result.

    Returns:
        (V, N, D).
    """
    views, samples, dimensions = shape
    blocks = plan.gradient
    a, b = (inner, centered) if plan.gram else (centered, inner)
    out = centered.new_empty(shape, dtype=dtype)
    nothing = (None, None, 0.0)
    variance_up, variance_value, variance_factor = variance or nothing
    center_up, center_value, center_factor = center or nothing
    tiles = plan.padded[0] // blocks.rows * (plan.padded[1] // blocks.columns)
    launch.call(
        _gradient_kernel,
        (tiles, views),
        a,
        b,
        centered,
        scales,
        statistics,
        covariance[0],
        covariance[1],
        variance_up,
        variance_value,
        center_up,
        center_value,
        out,
        a.stride(0),
        b.stride(0),
        a.stride(1),
        b.stride(1),
        a.stride(2),
        b.stride(2),
        centered.stride(0),
        centered.stride(1),
        samples,
        dimensions,
        *plan.padded,
        plan.side // blocks.depth,
        covariance[2],
        variance_factor,
        center_factor,
        GRAM=plan.gram,
        VARIANCE=variance is not None,
        CENTER=center is not None,
        PARTS=plan.parts,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        DEPTH=blocks.depth,
        BAND=8,
        registers=255,  # all there are
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out


def column_gradient(
    z: Tensor,
    statistics: Tensor,
    variance: Term | None,
    center: Term | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the variance and the centre terms, (V, N, D).

    Args:
        z: (V, N, D).
        statistics: from :func:`center`.
        variance: upstream gradient, value, and what the slope leaves out; ``None`` for no term.
        center: likewise.
        dtype: of the result.
    """
    views, samples, dimensions = z.shape
    cut = strips(launch.target(z.device), views, samples, dimensions)
    out = z.new_empty(z.shape, dtype=dtype)
    nothing = (None, None, 0.0)
    variance_up, variance_value, variance_factor = variance or nothing
    center_up, center_value, center_factor = center or nothing
    launch.call(
        _column_gradient_kernel,
        (cut.strips, cut.splits, views),
        z,
        statistics,
        variance_up,
        variance_value,
        center_up,
        center_value,
        out,
        *z.stride(),
        samples,
        dimensions,
        cut.split_rows,
        variance_factor,
        center_factor,
        VARIANCE=variance is not None,
        CENTER=center is not None,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        num_warps=cut.warps,
    )
    return out
