"""The same as :mod:`._evaluate` over Triton kernels: variance, centre and covariance.

Four kernels in all, forward and backward: moments, centring, inner product, gradient; without a
covariance term three, and then the embeddings themselves are what the gradient is finished from.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._request import Request, batch_shape, uses_gram
from .kernels.centering import center, own_tickets
from .kernels.gradient import Term, column_gradient, product_gradient
from .kernels.inner import inner_product
from .kernels.launch import target
from .kernels.moments import moments
from .kernels.plan import Plan, blocks, padding, plan


def evaluate(
    request: Request, views: Sequence[Tensor], directions: Tensor | None, keep: bool
) -> list[Tensor]:
    """As :func:`._evaluate.evaluate`."""
    z = _batch(views)
    cut = _plan(request, batch_shape(views), z.device) if request.covariance else None
    count, _, dimensions = z.shape
    own = own_tickets(count, dimensions, cut.padded if cut else (0, 0))
    columns = moments(z, own + (cut.tickets if cut else 0))
    hinge = request.variance, request.gamma, max(request.eps, torch.finfo(torch.float32).tiny)
    if cut is None:
        centered = center(columns, *hinge)
    else:
        centered = center(columns, *hinge, cut.parts, cut.gram, cut.padded)
    values = [centered.variance] if request.variance else []
    if request.center:
        values.append(centered.center)
    residue: list[Any] = [centered.statistics]  # tensors, if kept
    if cut is not None:
        tickets = columns.tickets[own:]
        value, inner = inner_product(centered, batch_shape(views), cut, tickets, keep)
        values.append(value)
        residue += [centered.scales, centered.centered, inner]
    return values + residue if keep else values


def residue(request: Request, views: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`._evaluate.residue`.

    statistics (V, 4, D); with a covariance also scales (V, 4), the centred samples (parts, V,
    padded N, padded D) and their inner product (parts, V, side, side).
    """
    count, samples, dimensions = batch_shape(views)
    empty = views[0].new_empty
    kept = [empty((count, 4, dimensions), dtype=torch.float32)]
    if request.covariance:
        gram, parts = uses_gram(request, samples, dimensions), request.parts
        shape = (count, samples, dimensions)
        padded = padding(gram, shape, *blocks(target(views[0].device), shape, gram, parts))
        side = padded[0] if gram else padded[1]
        kept.append(empty((count, 4), dtype=torch.float64))
        kept.append(empty((parts, count, *padded), dtype=torch.float16))
        kept.append(empty((parts, count, side, side), dtype=torch.float16))
    return kept


def gradient(
    request: Request,
    shape: tuple[int, int, int],
    values: Sequence[Tensor],
    residue: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    views: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """As :func:`._evaluate.gradient`."""
    count, samples, dimensions = shape
    elements = count * dimensions
    hinge = request.variance == "hinge"
    factors = {
        "variance": -1 / (elements * (samples - 1)) if hinge else 2 / (elements * samples),
        "center": 2 / (elements * samples),
        "covariance": 4 / (elements * (samples - 1) ** 2),
    }
    asked = [name for name in factors if getattr(request, name)]
    terms: dict[str, Term] = {
        name: (up.resolve_neg(), value, factors[name])
        for name, up, value in zip(asked, upstream, values, strict=True)
        if up is not None
    }
    variance, middle = terms.get("variance"), terms.get("center")
    if "covariance" in terms:
        statistics, scales, centered, inner = residue
        cut = _plan(request, shape, centered.device)
        covariance = terms["covariance"]
        return product_gradient(
            centered, inner, statistics, scales, shape, cut, covariance, variance, middle, dtype
        )
    if not terms:
        return values[0].new_zeros(shape, dtype=dtype)
    return column_gradient(_batch(views), residue[0], variance, middle, dtype)


def _batch(views: Sequence[Tensor]) -> Tensor:
    """The views as one (V, N, D) tensor, of their own dtype where they share one."""
    if len(views) > 1:
        return torch.stack(views)  # type: ignore[arg-type]
    z = views[0].resolve_neg()  # a kernel reads memory
    return z if z.dim() == 3 else z.unsqueeze(0)


def _plan(request: Request, shape: tuple[int, int, int], device: torch.device) -> Plan:
    gram = uses_gram(request, shape[1], shape[2])
    return plan(target(device), shape, gram, request.parts)
