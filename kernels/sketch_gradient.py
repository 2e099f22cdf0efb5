"""Gradient of the sketch, and of the variance and the centre terms with it: one product.

With R the derivatives of the slices' statistics and W the directions, it is ``R^T W``, divided by
``sigma + 1e-6`` where the samples were standardised: sigma is not differentiated, and the part that
goes through the mean is the column sum, which is 0 for the sorted residuals of centred samples and
symmetric targets.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .device import columns, finite_or_nan, multiply, tile_of
from .directions import DIRECTION_SCALE
from .gradient import Term
from .plan import SketchPlan
from .sketch import Sketch


@triton.jit
def _sketch_gradient_kernel(
    residual_ptr,
    w_ptr,
    z_ptr,
    statistics_ptr,
    sketch_up_ptr,
    sketch_ptr,
    variance_up_ptr,
    variance_ptr,
    center_up_ptr,
    center_ptr,
    out_ptr,
    residual_part,
    residual_slice,
    w_part,
    w_slice,
    view_stride,
    sample_stride,
    dimension_stride,
    samples,
    dimensions,
    padded_samples,
    padded_dimensions,
    steps,
    sketch_factor,
    variance_factor,
    center_factor,
    STANDARD: tl.constexpr,
    VARIANCE: tl.constexpr,
    CENTER: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    """``f R^T W / (sigma + 1e-6)``, plus ``(z - mean) diag slope`` and the row of means.

    Args:
        residual_ptr: R, (PARTS, padded K, V, padded N).
        w_ptr: W, (padded K, 1 or 3, padded D); ``w_part`` from hi to lo.
        z_ptr: (V, N, D), any strides; read if VARIANCE.
        statistics_ptr: (V, 4, D).
        sketch_up_ptr and so on: upstream gradients and values of the terms, 0-dim.
        out_ptr: out, (V, N, D).
    """
    view = tl.program_id(1).to(tl.int64)
    row, column = tile_of(
        tl.program_id(0), padded_samples // ROWS, padded_dimensions // COLUMNS, BAND
    )
    n = row * ROWS + tl.arange(0, ROWS)
    column *= COLUMNS
    depth = tl.arange(0, DEPTH).to(tl.int64)
    a = residual_ptr + view * padded_samples + n[:, None] + depth[None, :] * residual_slice
    b = w_ptr + depth[:, None] * w_slice + (column + tl.arange(0, COLUMNS))[None, :]
    total = multiply(
        a,
        b,
        residual_part,
        w_part,
        DEPTH * tl.cast(residual_slice, tl.int64),
        DEPTH * tl.cast(w_slice, tl.int64),
        steps,
        ROWS,
        COLUMNS,
        PARTS,
    )
    factor = finite_or_nan(sketch_up_ptr, sketch_ptr) * sketch_factor
    variance = 0.0
    center = 0.0
    if VARIANCE:
        variance = finite_or_nan(variance_up_ptr, variance_ptr) * variance_factor
    if CENTER:
        center = finite_or_nan(center_up_ptr, center_ptr) * center_factor
    PIECES: tl.constexpr = max(1, COLUMNS // 64)
    WIDTH: tl.constexpr = COLUMNS // PIECES
    n = n.to(tl.int64)
    for piece in tl.static_range(PIECES):
        some = columns(total, piece, PIECES)
        d = column + piece * WIDTH + tl.arange(0, WIDTH)
        inside = d < dimensions
        ok = (n < samples)[:, None] & inside[None, :]
        statistics = statistics_ptr + view * 4 * dimensions + d
        if STANDARD:
            inverse_sigma = tl.load(statistics + 2 * dimensions, mask=inside, other=0)
            some = some * (inverse_sigma * factor)[None, :]
        else:
            some = some * factor
        if VARIANCE or CENTER:
            pivot = tl.load(statistics, mask=inside, other=0)
            offset = tl.load(statistics + dimensions, mask=inside, other=0)
            if VARIANCE:
                slope = tl.load(statistics + 3 * dimensions, mask=inside, other=0) * variance
                place = n[:, None] * sample_stride + d.to(tl.int64)[None, :] * dimension_stride
                z = tl.load(z_ptr + view * view_stride + place, mask=ok, other=0).to(tl.float32)
                some += ((z - pivot[None, :]) - offset[None, :]) * slope[None, :]
            if CENTER:
                some += ((pivot + offset) * center)[None, :]
        out = out_ptr + (view * samples + n)[:, None] * dimensions + d[None, :]
        tl.store(out, some.to(out_ptr.dtype.element_ty), mask=ok)


def sketch_gradient(
    kept: Sketch,
    z: Tensor | None,
    statistics: Tensor,
    shape: tuple[int, int, int],
    plan: SketchPlan,
    standardized: bool,
    sketch: Term,
    variance: Term | None,
    center: Term | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the sketch, and of the variance and the centre terms with it, (V, N, D).

    Args:
        kept: from :func:`.sketch.sketch`.
        z: (V, N, D); ``None`` without a variance term.
        statistics: from :func:`.centering.center`.
        shape: (V, N, D).
        plan: how to cut the work.
        standardized: whether the samples were.
        sketch: upstream gradient, value, and what the product leaves out.
        variance, center: likewise; ``None`` for no term.
        dtype: of the result.
    """
    views, samples, dimensions = shape
    blocks, parts = plan.gradient, plan.parts
    residual, w = kept
    out = residual.new_empty(shape, dtype=dtype)
    nothing = (None, None, 0.0)
    variance_up, variance_value, variance_factor = variance or nothing
    center_up, center_value, center_factor = center or nothing
    tiles = plan.padded[0] // blocks.rows * (plan.padded[1] // blocks.columns)
    launch.call(
        _sketch_gradient_kernel,
        (tiles, views),
        residual,
        w,
        z,
        statistics,
        *sketch[:2],
        variance_up,
        variance_value,
        center_up,
        center_value,
        out,
        residual.stride(0),
        residual.stride(1),
        2 * plan.padded[1],
        w.stride(0),
        *(z.stride() if z is not None else (0, 0, 0)),
        samples,
        dimensions,
        *plan.padded,
        plan.slices // blocks.depth,
        sketch[2] / DIRECTION_SCALE,
        variance_factor,
        center_factor,
        STANDARD=standardized,
        VARIANCE=variance is not None,
        CENTER=center is not None,
        PARTS=parts,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        DEPTH=blocks.depth,
        BAND=8,
        registers=255,  # all there are
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out
