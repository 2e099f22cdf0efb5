"""The same as :mod:`._evaluate` over Triton kernels.

Two passes for the statistics, then the products: with a covariance term two kernels more, forward
and backward; with a sketch a library product, a kernel for the slices and one for the gradient;
with neither, one pass over the embeddings again for the gradient.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._epps_pulley import knot_table
from ._request import Request, batch_shape, uses_gram
from ._torch import full_precision, quantiles
from .kernels.centering import center, own_tickets
from .kernels.epps_pulley import Knots
from .kernels.gradient import Term, column_gradient, product_gradient
from .kernels.inner import inner_product
from .kernels.launch import target
from .kernels.moments import moments
from .kernels.plan import (
    Network,
    Plan,
    SketchPlan,
    blocks,
    network,
    padding,
    plan,
    sketch_plan,
)
from .kernels.sketch import Sketch, residual_scale, sketch
from .kernels.sketch_gradient import sketch_gradient
from .kernels.sort import Targets, targets

T = TypeVar("T")


def evaluate(
    request: Request, views: Sequence[Tensor], directions: Tensor | None, keep: bool
) -> list[Tensor]:
    """As :func:`._evaluate.evaluate`."""
    z = _batch(views)
    shape = count, samples, dimensions = batch_shape(views)
    product: Plan | SketchPlan | None = None
    gram, tickets_asked = False, 0
    if request.covariance:
        product = covariance = _plan(request, shape, z.device)
        gram, tickets_asked = covariance.gram, covariance.tickets
    elif request.sketch:
        product = projection = _sketch_plan(request, shape, z.device)
    padded = product.padded if product else (0, 0)
    own = own_tickets(count, dimensions, padded)
    columns = moments(z, own + tickets_asked)
    eps = max(request.eps, torch.finfo(torch.float32).tiny)
    hinge = request.variance, request.gamma, eps
    parts = product.parts if product else 0
    centered = center(columns, *hinge, parts, gram, padded, request.sketch)
    values = [centered.variance] if request.variance else []
    if request.center:
        values.append(centered.center)
    residue: list[Any] = [centered.statistics]  # tensors, if kept
    if request.covariance:
        tickets = columns.tickets[own:]
        value, inner = inner_product(centered, shape, covariance, tickets, keep)
        values.append(value)
        residue += [centered.scales, centered.centered, inner]
    elif request.sketch:
        assert directions is not None
        w = directions.resolve_neg()
        statistic = _statistic(request, samples, z.device)
        with full_precision(z.device):  # for the library's product
            value, kept = sketch(centered, w, shape, projection, statistic, keep)
        values.append(value)
        residue += kept or ()
    return values + residue if keep else values


def residue(request: Request, views: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`._evaluate.residue`.

    statistics (V, 4, D); with a covariance also scales (V, 4), the centred samples (parts, V,
    padded N, padded D) and their inner product (parts, V, side, side); with a sketch the residual
    (parts, padded K, V, padded N) and the directions (padded K, planes, padded D).
    """
    count, samples, dimensions = shape = batch_shape(views)
    empty, device, parts = views[0].new_empty, views[0].device, request.parts
    kept = [empty((count, 4, dimensions), dtype=torch.float32)]
    if request.covariance:
        gram = uses_gram(request, samples, dimensions)
        padded = padding(gram, shape, *blocks(target(device), shape, gram, parts))
        side = padded[0] if gram else padded[1]
        kept.append(empty((count, 4), dtype=torch.float64))
        kept.append(empty((parts, count, *padded), dtype=torch.float16))
        kept.append(empty((parts, count, side, side), dtype=torch.float16))
    elif request.sketch:
        cut = sketch_plan(target(device), shape, request.slices, parts)
        kept.append(empty((parts, cut.slices, count, cut.padded[0]), dtype=torch.float16))
        kept.append(empty((cut.slices, 2 * parts - 1, cut.padded[1]), dtype=torch.float16))
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
        "sketch": 1 / (count * max(1, request.slices)),
    }
    asked = [name for name in factors if getattr(request, name)]
    terms: dict[str, Term] = {
        name: (up.resolve_neg(), value, factors[name])
        for name, up, value in zip(asked, upstream, values, strict=True)
        if up is not None
    }
    variance, middle = terms.get("variance"), terms.get("center")
    statistics = residue[0]
    if "covariance" in terms:
        _, scales, centered, inner = residue
        cut = _plan(request, shape, centered.device)
        covariance = terms["covariance"]
        return product_gradient(
            centered, inner, statistics, scales, shape, cut, covariance, variance, middle, dtype
        )
    if "sketch" in terms:
        z, kept = _batch(views) if "variance" in terms else None, Sketch(*residue[1:])
        device = statistics.device
        bound = _bound(request.knots, request.t_max) if request.sketch == "epps_pulley" else None
        scale, factor = residual_scale(bound, shape)
        up, value, share = terms["sketch"]
        return sketch_gradient(
            kept,
            z,
            statistics,
            shape,
            _sketch_plan(request, shape, device),
            request.sketch == "wasserstein",
            (up, value, share * factor / scale),
            variance,
            middle,
            dtype,
        )
    if not terms:
        return values[0].new_zeros(shape, dtype=dtype)
    return column_gradient(_batch(views), statistics, variance, middle, dtype)


def _batch(views: Sequence[Tensor]) -> Tensor:
    """The views as one (V, N, D) tensor, of their own dtype where they share one."""
    if len(views) > 1:
        return torch.stack(views)  # type: ignore[arg-type]
    z = views[0].resolve_neg()  # a kernel reads memory
    return z if z.dim() == 3 else z.unsqueeze(0)


def _plan(request: Request, shape: tuple[int, int, int], device: torch.device) -> Plan:
    gram = uses_gram(request, shape[1], shape[2])
    return plan(target(device), shape, gram, request.parts)


def _sketch_plan(request: Request, shape: tuple[int, int, int], device: torch.device) -> SketchPlan:
    sorts = _network(request, shape[1], device) is not None
    return sketch_plan(target(device), shape, request.slices, request.parts, sorts)


def _network(request: Request, samples: int, device: torch.device) -> Network | None:
    """How programs sort the rows, if they do."""
    if request.sketch != "wasserstein":
        return None
    return network(target(device), samples, request.parts == 2)


def _statistic(request: Request, samples: int, device: torch.device) -> Targets | Knots:
    """The constants of the statistic, on the device."""
    if request.sketch == "epps_pulley":
        number, t_max = request.knots, request.t_max

        def knots() -> Knots:
            table = knot_table(number, t_max, torch.empty((), device=device).float())
            return Knots(table, t_max / (number - 1), _bound(number, t_max))

        return _constant(("knots", number, t_max, device), knots)
    cut, rule = _network(request, samples, device), request.quantiles

    def arranged() -> Targets:
        return targets(quantiles(samples, rule, torch.empty((), device=device).float()), cut)

    return _constant(("targets", samples, rule, cut, device), arranged)


@functools.lru_cache(maxsize=64)
def _bound(knots: int, t_max: float) -> float:
    """At most ``|dT/dp|``: sum_t 2 w t times the distance of two points of the unit disc."""
    t, _, weight = knot_table(knots, t_max, torch.empty((), device="cpu").double())
    return 4 * float((weight * t).sum())


_CONSTANTS: dict[tuple[Any, ...], Any] = {}
_MOST_CONSTANTS = 64


def _constant(key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What ``make`` returns for a key, whose last part is the device; made once, never freed.

    CUDA graphs that were captured read it at every replay, and other streams at once: so it is
    waited for, and what comes after the cache is full is made at each call. A thread makes it,
    whose memory is not of a pool for graphs that this one may be preparing. During a capture it is
    made in the graph.
    """
    found: T | None = _CONSTANTS.get(key)
    if found is not None:
        return found
    device: torch.device = key[-1]
    if device.type != "cuda":
        with torch.inference_mode(False):
            made = make()
    elif len(_CONSTANTS) >= _MOST_CONSTANTS or torch.cuda.is_current_stream_capturing():
        return make()
    else:
        with ThreadPoolExecutor(1) as thread:
            made = thread.submit(_made_on, device, make).result()
    if len(_CONSTANTS) < _MOST_CONSTANTS:
        _CONSTANTS[key] = made
    return made


def _made_on(device: torch.device, make: Callable[[], T]) -> T:
    with torch.cuda.device(device):
        made = make()
        torch.cuda.current_stream().synchronize()
    return made
