"""The regularizers in compiled code, and for tensors without data.

Eager code goes straight to :mod:`._evaluate`: the operator's dispatch would double the cost of a
small call. Under ``torch.compile`` what consists of plain operations is left to the compiler, which
fuses them; an opaque operator keeps numpy, kernels, collectives and host decisions out of the
graph, and for fake and meta tensors it knows the shapes.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _collectives, _compat, _dispatch, _evaluate
from ._dispatch import backend
from ._request import Request, batch_shape, computing_dtype, uses_gram
from ._torch import CHUNK

_calls, _sites = itertools.count(), itertools.count()
# Most knots whose harmonics a compiler is given: 32 waves are half of what inductor fuses.
_FUSED_KNOTS = 17


def evaluate(
    request: Request, views: Sequence[Tensor], directions: Tensor | None, keep: bool
) -> list[Tensor]:
    """``evaluate`` of the implementation, through the operator where that is needed."""
    if has_data(views):
        if _needs_memory(request) and _compat.in_transform():
            views, (directions,) = _plain(views), _plain([directions])
            with _compat.outside_transforms():
                return backend(request).evaluate(request, views, directions, keep)
        return backend(request).evaluate(request, views, directions, keep)
    if torch.compiler.is_compiling() and _fuses(request, batch_shape(views)):
        found = _evaluate.evaluate(request, views, directions, keep, fuses=True)
        if request.gathers:
            for value in found[: request.terms()]:  # whichever of them is used
                _same_world_op(value, request.group, request.world)
        return found
    return _evaluate_op(list(views), directions, keep, *request)


def gradient(
    request: Request,
    shape: tuple[int, int, int],
    values: Sequence[Tensor],
    residue: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    views: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """``gradient`` of the implementation, through the operator where that is needed."""
    if has_data(values):
        if request.impl == "triton" and _compat.in_transform():
            values, residue, upstream, views = map(_plain, (values, residue, upstream, views))
            with _compat.outside_transforms():
                finish = backend(request).gradient
                return finish(request, shape, values, residue, upstream, views, dtype)
        return backend(request).gradient(request, shape, values, residue, upstream, views, dtype)
    if torch.compiler.is_compiling() and _fuses(request, shape):
        return backend(request).gradient(request, shape, values, residue, upstream, views, dtype)
    asked = [g is not None for g in upstream]
    present = [g for g in upstream if g is not None]
    kept = list(views) if _reads_views(request) else []  # those that are not read need not be kept
    return _gradient_op(
        list(shape), list(values), list(residue), present, asked, kept, dtype, *request
    )


def draw_directions(
    seed: Tensor, step: Tensor, dimensions: int, slices: int, advance: int = 0, impl: str = "auto"
) -> Tensor:
    """:func:`._slices.draw_directions`, through the operator where that is needed.

    In a backward pass, where activation checkpointing repeats the forward one, the step is already
    ``advance`` further, and the slices are those of before.
    """
    draw = _draw if has_data([seed, step]) else _draw_op
    return draw(seed, step, dimensions, slices, advance, impl)


def advance_step(step: Tensor, advance: int) -> None:
    """Add to the step, but not in a backward pass."""
    (_advance if has_data([step]) else _advance_op)(step, advance)


def next_call() -> Tensor:
    """The number of calls so far in this process: a step for draws that nobody counts."""
    return _next_call_op(_new_site()) if torch.compiler.is_compiling() else _next_call()


def _needs_memory(request: Request) -> bool:
    """Kernels and collectives take plain tensors."""
    return request.impl == "triton" or request.world > 1


def _reads_views(request: Request) -> bool:
    """Whether the gradient does."""
    spreads = bool(request.variance) and not request.covariance
    return _needs_memory(request) or bool(request.invariance) or spreads


def _fuses(request: Request, shape: tuple[int, int, int]) -> bool:
    """Whether a compiler gets the plain operations of a request.

    Not the Gram form, where float32 asks a CPU whether the diagonal dominates, and whose side is
    the number of samples, of which compiled code may see many; nor a sketch whose projections are
    to be taken some at a time, or that has more knots than one loop can serve. And not an export:
    these are decisions by the shape, which there may be unknown.
    """
    if not _compat.TRACES_FUNCTIONS or _needs_memory(request) or torch.compiler.is_exporting():
        return False
    count, samples, dimensions = shape
    if request.covariance and uses_gram(request, samples, dimensions):
        return False
    if request.sketch == "epps_pulley" and request.knots > _FUSED_KNOTS:
        return False
    return not request.sketch or count * samples * request.slices <= CHUNK


def _plain(tensors: Sequence[Any]) -> list[Any]:
    return [t if t is None else _compat.plain(t) for t in tensors]


def has_data(tensors: Sequence[Tensor]) -> bool:
    """Whether the implementation may be called as it is: plain tensors, and no compiler."""
    return not torch.compiler.is_compiling() and all(
        type(t) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and not t.is_meta for t in tensors
    )


@_compat.constant_when_compiled
def _new_site() -> int:
    """A number for each place in compiled code: equal calls, compilers merge."""
    return next(_sites)


def _next_call(site: int = 0) -> Tensor:
    return torch.tensor(next(_calls), device="cpu")


_TYPES = {str: "str", bool: "bool", float: "float", int: "SymInt"}
_OPTIONS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in Request.__annotations__.items())


def _fake_evaluate(
    views: list[Tensor], directions: Tensor | None, keep: bool, *options: str | bool | float | int
) -> list[Tensor]:
    request = Request(*options)  # type: ignore[arg-type]
    like = views[0].new_empty((), dtype=computing_dtype(views))
    outputs = [like.new_empty(()) for _ in range(request.terms())]
    return outputs + backend(request).residue(request, views) if keep else outputs


@_compat.operator(
    f"evaluate(Tensor[] views, Tensor? directions, bool keep, {_OPTIONS}) -> Tensor[]",
    _fake_evaluate,
)
def _evaluate_op(
    views: list[Tensor], directions: Tensor | None, keep: bool, *options: str | bool | float | int
) -> list[Tensor]:
    request = Request(*options)  # type: ignore[arg-type]
    if request.gathers:
        _collectives.require_world(request.group, request.world)
    # What a compiler was told: the strides of the input may have come through.
    return [t.contiguous() for t in backend(request).evaluate(request, views, directions, keep)]


@_compat.operator(
    "gradient(SymInt[] shape, Tensor[] values, Tensor[] residue, Tensor[] upstream, bool[] asked, "
    f"Tensor[] views, ScalarType dtype, {_OPTIONS}) -> Tensor",
    lambda shape, values, *others: values[0].new_empty(shape, dtype=others[4]),
)
def _gradient_op(
    shape: list[int],
    values: list[Tensor],
    residue: list[Tensor],
    upstream: list[Tensor],
    asked: list[bool],
    views: list[Tensor],
    dtype: torch.dtype,
    *options: str | bool | float | int,
) -> Tensor:
    request = Request(*options)  # type: ignore[arg-type]
    present = iter(upstream)
    spread = [next(present) if there else None for there in asked]
    batch = (shape[0], shape[1], shape[2])
    result = backend(request).gradient(request, batch, values, residue, spread, views, dtype)
    return result.contiguous()


def _fake_draw(seed: Tensor, step: Tensor, dimensions: int, slices: int, *_: Any) -> Tensor:
    return seed.new_empty((slices, dimensions), dtype=torch.float32).T


def _draw(
    seed: Tensor, step: Tensor, dimensions: int, slices: int, advance: int, impl: str
) -> Tensor:
    offset = -advance if _compat.in_backward() else 0
    return _dispatch.draw_directions(seed, step, offset, dimensions, slices, impl)


_draw_op = _compat.operator(
    "draw_directions(Tensor seed, Tensor step, SymInt dimensions, SymInt slices, SymInt advance, "
    "str impl) -> Tensor",
    _fake_draw,
)(_draw)


def _advance(step: Tensor, advance: int) -> None:
    if not _compat.in_backward():
        _compat.add_outside_transforms_(step, advance)


_advance_op = _compat.operator(
    "advance_step(Tensor(a!) step, SymInt advance) -> ()", lambda *_: None
)(_advance)


# The tag keeps compilers from computing it again in a backward pass.
_next_call_op = _compat.operator(
    "next_call(SymInt site) -> Tensor",
    lambda _: torch.empty((), dtype=torch.int64, device="cpu"),
    torch.Tag.nondeterministic_seeded,
)(_next_call)


# It does not write into the value; that it says so spares a tensor and an addition.
@_compat.operator("same_world_(Tensor(a!) value, str group, SymInt world) -> ()", lambda *_: None)
def _same_world_op(value: Tensor, group: str, world: int) -> None:
    _collectives.require_world(group, world)


for _name in ("evaluate", "same_world_"):
    _compat.keep_when_unused(_name)
