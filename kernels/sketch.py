"""The sliced sketch: project the embeddings, evaluate a statistic of each slice, project back.

Of size slices x samples there is the residual, in 16 bits; the projections are there for some
slices at a time.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .centering import Centered
from .directions import DIRECTION_SCALE, operand
from .epps_pulley import Knots, epps_pulley
from .plan import SketchPlan
from .rows import Rows
from .sort import Targets, sort_residual


@triton.jit
def _mean_kernel(sums_ptr, value_ptr, count, factor, BLOCK: tl.constexpr):
    """``factor`` times the sum of so many numbers, in float64 and in a fixed order: one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + i, mask=i < count, other=0).to(tl.float64)
    tl.store(value_ptr, (tl.sum(total, 0) * factor).to(tl.float32))


class Sketch(NamedTuple):
    """What is kept of a sketch for its gradient.

    Attributes:
        residual: derivative of the slices' statistics up to a factor, (parts, padded K, V,
            padded N).
        directions: (padded K, 1 or 3, padded D): hi, or hi, hi, lo.
    """

    residual: Tensor
    directions: Tensor


def _by_library(device: torch.device) -> bool:
    """Whether it has a product of 16-bit numbers with a float32 result."""
    return device.type == "cuda" and not torch.version.hip


def project(x: Tensor, directions: Tensor) -> Tensor:
    """Projections of all views on some slices, (k, V, padded N), float32, by the library.

    Args:
        x: (V, padded N, a padded D), 16 bits, or float32 where there is no such product of those.
        directions: (k, a, padded D), 16 bits.
    """
    views, samples = x.shape[:2]
    rows, w = x.view(views * samples, -1).T, directions.view(len(directions), -1)
    if not _by_library(x.device):
        p = torch.mm(w.float(), rows)
    else:
        settings = torch.backends.cuda.matmul
        narrow = settings.allow_fp16_accumulation  # would overflow
        settings.allow_fp16_accumulation = False
        try:
            p = torch.mm(w, rows, out_dtype=torch.float32)
        finally:
            settings.allow_fp16_accumulation = narrow
    return p.view(len(directions), views, samples)


def sketch(
    centered: Centered,
    directions: Tensor,
    shape: tuple[int, int, int],
    plan: SketchPlan,
    statistic: Targets | Knots,
    keep: bool,
) -> tuple[Tensor, Sketch | None]:
    """Mean over slices and views of a statistic of the projections.

    Args:
        centered: from :func:`.centering.center`, for this sketch.
        directions: (D, K), float32.
        shape: (V, N, D).
        plan: how to cut the work.
        statistic: targets for the Wasserstein distance, or knots for that of Epps and Pulley.
        keep: whether a gradient will be asked for.

    Returns:
        The value, 0-dim; and what the gradient needs.
    """
    assert centered.centered is not None
    assert centered.scales is not None
    views, samples, _ = shape
    slices = directions.shape[1]
    parts, x = plan.parts, centered.centered
    knots = statistic if isinstance(statistic, Knots) else None
    statistics = centered.statistics if knots else None
    w, shift = operand(directions, statistics, (plan.slices, plan.padded[1]), parts)
    float32 = functools.partial(x.new_empty, dtype=torch.float32)
    residual = None
    if keep:
        residual = x.new_empty((parts, plan.slices, views, plan.padded[0]))
        if slices < plan.slices:  # the product reads whole steps; what it reads of rows is masked
            residual[:, slices:].zero_()
    sums = float32((views, slices))
    scale, _ = residual_scale(knots.bound if knots else None, shape)
    x = x if _by_library(x.device) else x.float()
    factors = centered.scales, 1 / DIRECTION_SCALE
    for first in range(0, slices, plan.chunk):
        p = project(x, w[first : min(first + plan.chunk, slices)])
        rows = Rows(p, samples, *factors, residual, scale, sums, first, parts)
        if isinstance(statistic, Knots):
            assert shift is not None
            epps_pulley(rows, shift, statistic)
        else:
            sort_residual(rows, statistic)
    value = float32(())
    share = 1 / (views * slices * (1 if knots else samples))
    launch.call(_mean_kernel, (1,), sums, value, sums.numel(), share, BLOCK=4096, num_warps=8)
    return value, None if residual is None else Sketch(residual, w)


def residual_scale(bound: float | None, shape: tuple[int, int, int]) -> tuple[float, float]:
    """The power of two by which the residual is stored; and by what it is short of the gradient.

    No standardised projection is above ``sqrt(N D)``, the norm of all samples; no target is above
    the root of twice the logarithm of N, which is less than 8.

    Args:
        bound: of the absolute gradient; ``None`` for the Wasserstein distance.
        shape: (V, N, D).
    """
    _, samples, dimensions = shape
    if bound is not None:
        return _power_below(32768 / max(bound, 1e-30)), 1.0  # never beyond float32
    return _power_below(32768 / (math.sqrt(samples * dimensions) + 8)), 2 / samples


def _power_below(x: float) -> float:
    return 2.0 ** (math.frexp(x)[1] - 1)
