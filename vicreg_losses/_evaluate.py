"""Values and closed-form gradients of the regularizers: local statistics, then the terms.

In plain PyTorch; :mod:`._fused` has the same three functions over Triton kernels. No autograd here:
:mod:`._ops` makes two of them differentiable, :mod:`._opaque` serves compiled code.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _fusible as fusible
from . import _torch as primitives
from ._deviations import add_slopes, batch, deviations, scaled_deviations, squared_distances
from ._epps_pulley import epps_pulley_, knot_table
from ._request import Request, batch_shape, computing_dtype, uses_gram

SIGMA_EPS = 1e-6  # VISReg adds it to the standard deviation, in the scale and in the shape term


def evaluate(
    request: Request,
    views: Sequence[Tensor],
    directions: Tensor | None,
    keep: bool,
    fuses: bool = False,
) -> list[Tensor]:
    """Values of the terms, each a mean over views; with ``keep`` followed by the residue.

    Args:
        request: what to evaluate.
        views: one (N, D) or (V, N, D) tensor, or several (N, D).
        directions: unit columns, (D, K), of the computing dtype, for a sketch.
        keep: whether a gradient will be asked for.
        fuses: whether a compiler is to fuse the operations.

    Returns:
        Invariance, variance, centre, covariance, sketch, those that are asked for, 0-dim; then the
        residue.
    """
    with primitives.full_precision(views[0].device):
        return _evaluate(request, views, directions, keep, fuses)


def _evaluate(
    request: Request, views: Sequence[Tensor], directions: Tensor | None, keep: bool, fuses: bool
) -> list[Tensor]:
    count, samples, dimensions = batch_shape(views)
    dtype = computing_dtype(views)
    values: list[Tensor] = []
    residue: list[Any] = []  # tensors, if kept
    if request.invariance:
        total = squared_distances(views, request.invariance)
        values.append((total * (request.factor / (count * samples * dimensions))).to(dtype))
    standardized = request.sketch == "wasserstein"
    if request.variance or request.center or request.covariance or standardized:
        centered, high, low, squares = deviations(views, bool(request.covariance) or standardized)
    if request.variance:
        value, column = variance(request, squares, samples)
        values.append(value)
        residue.append(column)
    if request.variance or request.center:
        residue += high, low
    if request.center:
        values.append((high + low).square().mean())
    if request.covariance:
        assert centered is not None
        gram = uses_gram(request, samples, dimensions)
        energy, inner = primitives.covariance_energy(centered, squares, gram, keep)
        values.append(energy.mul_(1 / (count * dimensions * (samples - 1) ** 2)).to(dtype))
        residue += centered, squares, inner
    if request.sketch == "epps_pulley":
        assert directions is not None
        z, ours = batch(views)
        if fuses:
            harmonics = fusible.epps_pulley(request.knots, request.t_max, keep)
            value, slope = fusible.sketch(z, directions, harmonics)
        else:
            table = knot_table(request.knots, request.t_max, z)
            value, slope = primitives.sketch(
                z, directions, lambda p: epps_pulley_(p, table, keep), keep, overwrite=ours
            )
    elif standardized:
        assert directions is not None
        assert centered is not None
        sigma = (squares / samples).sqrt_().add_(SIGMA_EPS)
        x = centered / sigma if keep and request.covariance else centered.div_(sigma)
        if fuses:
            distance = fusible.wasserstein(request.quantiles, keep)
            value, slope = fusible.sketch(x, directions, distance, factor=2 / samples)
        else:
            targets = primitives.quantiles(samples, request.quantiles, x)
            value, slope = primitives.sketch(
                x,
                directions,
                lambda p: primitives.wasserstein_(p, targets, keep),
                keep,
                factor=2 / samples,
                overwrite=True,
            )
        value += sigma.sum() * 0  # NaN where sigma overflowed and so hid the samples
        slope = slope.div_(sigma) if slope is not None else None
    if request.sketch:
        values.append(value.to(dtype))
        residue.append(slope)
    return values + residue if keep else values


def residue(request: Request, views: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like those that ``evaluate`` keeps, without their values.

    column (V, 1, D), the variance's factor of the centred samples; high and low (V, 1, D), whose
    sum is the mean; centered (V, N, D), squares (V, 1, D) and inner (V, N, N) or (V, D, D), of the
    covariance; slope (V, N, D), the sketch's gradient.
    """
    count, samples, dimensions = shape = batch_shape(views)
    sides = {"auto": torch.sym_min(samples, dimensions), "gram": samples, "feature": dimensions}
    side = sides.get(request.covariance, 0)
    row = (count, 1, dimensions)
    kept = (
        (row, request.variance),
        (row, request.variance or request.center),
        (row, request.variance or request.center),
        (shape, request.covariance),
        (row, request.covariance),
        ((count, side, side), request.covariance),
        (shape, request.sketch),
    )
    like = views[0].new_empty((), dtype=computing_dtype(views))
    return [like.new_empty(size) for size, asked in kept if asked]


def variance(request: Request, squares: Tensor, samples: int | Tensor) -> tuple[Tensor, Tensor]:
    """The variance term, and up to a number the factor of the centred samples in its gradient."""
    if request.variance == "hinge":
        # Never a root of 0, whose slope is infinite.
        std = (
            (squares / (samples - 1))
            .add_(max(request.eps, torch.finfo(squares.dtype).tiny))
            .sqrt_()
        )
        excess = std - request.gamma
        slope = (excess < 0) / std
        return excess.clamp_(max=0).mean().neg_(), slope
    sigma = (squares / samples).sqrt_()
    excess = sigma + (SIGMA_EPS - 1)
    value = excess.square().mean()
    return value, (excess / sigma).masked_fill_(sigma == 0, 0)


def variance_factor(request: Request, samples: Any, elements: int) -> Any:
    """What the slope of :func:`variance` leaves out, for ``elements`` = V D."""
    if request.variance == "hinge":
        return -1 / (elements * (samples - 1))
    return 2 / (elements * samples)


def gradient(
    request: Request,
    shape: tuple[int, int, int],
    values: Sequence[Tensor],
    residue: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    views: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the terms with an upstream gradient, (V, N, D).

    The sum of a product with the Gram matrix or the covariance, of ``centered * column`` (both the
    diagonal of the Gram form and the variance), of a row (the centre), of the sketch's slope and of
    differences of views (the invariance).

    Args:
        request: what was evaluated.
        shape: (V, N, D).
        values: from :func:`evaluate`.
        residue: likewise.
        upstream: the upstream gradient of each value, 0-dim, or ``None``.
        views: as given to :func:`evaluate`.
        dtype: of the result.
    """
    with primitives.full_precision(values[0].device):
        return _gradient(request, shape, values, residue, upstream, views).to(dtype)


def _gradient(
    request: Request,
    shape: tuple[int, int, int],
    values: Sequence[Tensor],
    residue: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    views: Sequence[Tensor],
) -> Tensor:
    count, samples, dimensions = shape
    elements = count * samples * dimensions
    terms = zip(upstream, values, strict=True)
    rest = iter(residue)
    total = None
    apart = _scale(terms, request.factor / elements) if request.invariance else None
    column = next(rest) if request.variance else None
    if column is not None:
        scale = _scale(terms, variance_factor(request, samples, count * dimensions))
        column = column * scale if scale is not None else None
    if request.variance or request.center:
        high, low = next(rest), next(rest)
    middle = _scale(terms, 2 / elements) if request.center else None
    if request.covariance:
        centered, squares, inner = next(rest), next(rest), next(rest)
        scale = _scale(terms, 4 / (count * dimensions * (samples - 1) ** 2))
        if scale is not None:
            gram = uses_gram(request, samples, dimensions)
            total, diagonal = primitives.covariance_product(centered, squares, inner, gram, scale)
            if diagonal is not None:
                column = diagonal if column is None else column + diagonal
        if column is not None:
            total = centered * column if total is None else total.addcmul_(centered, column)
    elif column is not None:
        total = scaled_deviations(views, high, low, column)
    if request.sketch:
        slope, scale = next(rest), _scale(terms)
        if scale is not None:
            total = slope * scale if total is None else total.addcmul_(slope, scale)
    if middle is not None:
        row = (high + low) * middle
        total = row.expand(shape).contiguous() if total is None else total.add_(row)
    if apart is not None:
        total = add_slopes(total, views, request.invariance, apart)
    return values[0].new_zeros(shape) if total is None else total


def _scale(terms: Iterator[tuple[Tensor | None, Tensor]], factor: float = 1.0) -> Tensor | None:
    upstream, value = next(terms)
    return None if upstream is None else finite_scale(upstream, value, factor)


def finite_scale(upstream: Tensor, value: Tensor, factor: float = 1.0) -> Tensor:
    """``factor`` times the upstream gradient, or NaN where the value is not finite.

    A gradient scaler looks at gradients only: finite ones beside a value of inf would be a step.
    """
    scale = torch.add(upstream, value, alpha=0)
    return scale if factor == 1 else scale.mul_(factor)
