"""The regularizers as opaque operators, for compiled code and for tensors without data.

Eager code goes straight to :mod:`._evaluate`: the operator's dispatch would double the cost of a
small call. Under ``torch.compile`` an operator keeps numpy and host decisions out of the graph, and
for fake and meta tensors it knows the shapes.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _evaluate, _slices
from ._evaluate import Request

_calls = itertools.count()


def evaluate(
    request: Request, views: Sequence[Tensor], directions: Tensor | None, keep: bool
) -> list[Tensor]:
    """:func:`._evaluate.evaluate`, through the operator where that is needed."""
    if _has_data(views):
        return _evaluate.evaluate(request, views, directions, keep)
    return _evaluate_op(list(views), directions, keep, *request)


def gradient(
    request: Request,
    views: Sequence[Tensor],
    values: Sequence[Tensor],
    residues: Sequence[Tensor],
    upstream: Sequence[Tensor],
    asked: Sequence[bool],
) -> Tensor:
    """:func:`._evaluate.gradient`, through the operator where that is needed."""
    if _has_data(views):
        return _evaluate.gradient(request, views, values, residues, upstream, asked)
    lists = (list(x) for x in (views, values, residues, upstream))
    return _gradient_op(*lists, list(asked), *request)


def draw_directions(seed: Tensor, step: Tensor, dimensions: int, slices: int) -> Tensor:
    """:func:`._slices.draw_directions`, through the operator where that is needed."""
    if _has_data([seed, step]):
        return _slices.draw_directions(seed, step, dimensions, slices)
    return _draw_op(seed, step, dimensions, slices)


def next_call() -> Tensor:
    """The number of calls so far in this process: a step for draws that nobody counts."""
    return _next_call_op() if torch.compiler.is_compiling() else _next_call()


def _has_data(tensors: Sequence[Tensor]) -> bool:
    return not torch.compiler.is_compiling() and all(
        type(t) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and not t.is_meta for t in tensors
    )


def _next_call() -> Tensor:
    return torch.tensor(next(_calls))


@torch.library.custom_op("vicreg_losses::evaluate", mutates_args=())
def _evaluate_op(
    views: list[Tensor],
    directions: Tensor | None,
    keep: bool,
    variance: str,
    center: bool,
    covariance: str,
    sketch: str,
    gamma: float,
    eps: float,
    quantiles: str,
    knots: int,
    t_max: float,
    impl: str,
) -> list[Tensor]:
    request = Request(
        variance, center, covariance, sketch, gamma, eps, quantiles, knots, t_max, impl
    )
    return _evaluate.evaluate(request, views, directions, keep)


@_evaluate_op.register_fake
def _(
    views: list[Tensor], directions: Tensor | None, keep: bool, *options: str | bool | float | int
) -> list[Tensor]:
    request = Request(*options)  # type: ignore[arg-type]
    like = _shape_of_batch(views)
    count, samples, dimensions = like.shape
    outputs = [like.new_empty(()) for _ in range(sum(request.terms()))]
    if keep:
        sizes = {"auto": torch.sym_min(samples, dimensions), "gram": samples, "feature": dimensions}
        side = sizes.get(request.covariance, 0)
        row = (count, 1, dimensions)
        shapes = (row, row, row, row, like.shape, (count, side, side), like.shape)
        kept = zip(shapes, _evaluate.kept_fields(request), strict=True)
        outputs += [like.new_empty(shape) for shape, there in kept if there]
    return outputs


@torch.library.custom_op("vicreg_losses::gradient", mutates_args=())
def _gradient_op(
    views: list[Tensor],
    values: list[Tensor],
    residues: list[Tensor],
    upstream: list[Tensor],
    asked: list[bool],
    variance: str,
    center: bool,
    covariance: str,
    sketch: str,
    gamma: float,
    eps: float,
    quantiles: str,
    knots: int,
    t_max: float,
    impl: str,
) -> Tensor:
    request = Request(
        variance, center, covariance, sketch, gamma, eps, quantiles, knots, t_max, impl
    )
    return _evaluate.gradient(request, views, values, residues, upstream, asked)


@_gradient_op.register_fake
def _(views: list[Tensor], *rest: object) -> Tensor:
    return _shape_of_batch(views)


@torch.library.custom_op("vicreg_losses::draw_directions", mutates_args=())
def _draw_op(seed: Tensor, step: Tensor, dimensions: int, slices: int) -> Tensor:
    return _slices.draw_directions(seed, step, dimensions, slices)


@_draw_op.register_fake
def _(seed: Tensor, step: Tensor, dimensions: int, slices: int) -> Tensor:
    return seed.new_empty((slices, dimensions), dtype=torch.float32).T


# The tag keeps compilers from merging two draws.
@torch.library.custom_op(
    "vicreg_losses::next_call", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _next_call_op() -> Tensor:
    return _next_call()


@_next_call_op.register_fake
def _() -> Tensor:
    return torch.empty((), dtype=torch.int64)


def _shape_of_batch(views: Sequence[Tensor]) -> Tensor:
    shape = _evaluate.batch_shape(views)
    return views[0].new_empty(shape, dtype=_evaluate.computing_dtype(views))
