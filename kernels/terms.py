"""What follows from the sums of the strips, once all are there: one program computes it."""

import triton
import triton.language as tl

from .device import inverse, power_of_two


@triton.jit
def over_strips(sums_ptr, which, strips, MAXIMUM: tl.constexpr):
    """Sum, or maximum of what is not negative, over strips: float64, in a fixed order."""
    total = tl.zeros([256], tl.float64)
    for start in range(0, strips, 256):
        strip = start + tl.arange(0, 256)
        place = sums_ptr + which * strips + strip
        some = tl.load(place, mask=strip < strips, other=0, cache_modifier=".cg")
        total = tl.maximum(total, some) if MAXIMUM else total + some
    return tl.max(total, 0) if MAXIMUM else tl.sum(total, 0)


@triton.jit
def finish_terms(
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
        variance += over_strips(sums, 0, strips, False)
        center += over_strips(sums, 1, strips, False)
        if PARTS:
            trace = over_strips(sums, 2, strips, False)
            length = dimensions if GRAM else samples
            surplus = trace * 0  # NaN where a sample is not finite
            if GRAM:
                surplus += over_strips(sums, 3, strips, False)
                # |G_ij| <= max_i |x_i|^2, which is at most the trace, and at most D 2^28.
                bound = tl.minimum(trace, 268435456.0 * length)
            else:
                bound = over_strips(sums, 4, strips, True)
            # X reaches 2^11 somewhere, so a small bound is one of squares that underflowed.
            bound = tl.where(bound >= 1048576.0, bound, 268435456.0 * length)
            inner_scale = power_of_two(bound.to(tl.float32), 15)
            tl.store(scales_ptr + 4 * view + 1, inner_scale.to(tl.float64))
            tl.store(scales_ptr + 4 * view + 2, inverse(inner_scale).to(tl.float64))
            tl.store(scales_ptr + 4 * view + 3, surplus)
    share = 1.0 / (views * tl.cast(dimensions, tl.float32))
    tl.store(variance_ptr, (variance * share).to(tl.float32))
    tl.store(center_ptr, (center * share).to(tl.float32))
