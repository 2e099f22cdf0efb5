"""The differentiable operation behind every loss, with gradients in closed form.

``regularizers`` serves any choice of terms from one pass of statistics, so that composites share
it. It is an ``autograd.Function``: forward keeps what its gradient is finished from in one pass
(never D x D for D > N, nor N x K), and backward applies the upstream gradients as device scalars.

Eager code calls the implementation directly, compiled code its operations where a compiler can fuse
them; otherwise, and for fake and meta tensors, it is an opaque custom operator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _compat, _opaque
from ._dispatch import resolve
from ._request import Request, batch_shape, gradient_dtype


def regularizers(
    request: Request, views: Sequence[Tensor], directions: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The requested terms, each a mean over views, in the order of ``Request``.

    Args:
        request: what to evaluate.
        views: checked embeddings: one (N, D) or (V, N, D) tensor, or several (N, D).
        directions: unit columns, (D, K), for the sketch.

    Returns:
        0-dim tensors, float32, or float64 if a view is.
    """
    if torch.compiler.is_compiling() and not _compat.TRACES_TRANSFORMS and _compat.in_transform():
        raise RuntimeError(
            "vicreg_losses: expected PyTorch 2.15 or later for torch.func transforms inside of "
            f"torch.compile, got {torch.__version__}, which loses the gradient. Compile without "
            "the transform, or transform the compiled function."
        )
    request = resolve(request, views)
    if request.invariance and request.impl == "triton":  # which has no kernels for it
        alone = Request(
            invariance=request.invariance, factor=request.factor, gathers=request.gathers
        )
        distance = _evaluated(alone, views, None)
        rest = request.but(invariance=0)
        return distance + (_evaluated(rest, views, directions) if rest.terms() else ())
    return _evaluated(request, views, directions)


def _evaluated(
    request: Request, views: Sequence[Tensor], directions: Tensor | None
) -> tuple[Tensor, ...]:
    if directions is not None:
        request = request.but(slices=directions.shape[1])
    if _is_differentiated(views):
        function = _EagerRegularizers if _in_plain_eager() else _Regularizers
        outputs: tuple[Tensor, ...] = function.apply(request, directions, *views)
        return outputs[: request.terms()]
    with torch.no_grad():
        return tuple(_opaque.evaluate(request, views, directions, keep=False))


def _is_differentiated(views: Sequence[Tensor]) -> bool:
    """Whether a derivative may be asked for; a forward-mode one is then refused by autograd."""
    if not torch.compiler.is_compiling() and _compat.in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(view.requires_grad for view in views)


class _Regularizers(torch.autograd.Function):
    @staticmethod
    def forward(request: Request, directions: Tensor | None, *views: Tensor) -> tuple[Tensor, ...]:
        return tuple(_opaque.evaluate(request, views, directions, keep=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        request, _, *views = inputs
        _save(ctx, request, views, output)
        ctx.mark_non_differentiable(*output[request.terms() :])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        request, count = ctx.request, ctx.request.terms()
        saved = ctx.saved_tensors
        outputs, views = saved[: -ctx.view_count], saved[-ctx.view_count :]
        with torch.no_grad():
            gradient = _opaque.gradient(
                request,
                ctx.shape,
                outputs[:count],
                outputs[count:],
                upstream[:count],
                views,
                gradient_dtype(views),
            )
        single = len(views) == 1
        gradients = [gradient.view(views[0].shape)] if single else gradient.unbind(0)
        return None, None, *_finish(gradients, views)


def _save(ctx: Any, request: Request, views: Sequence[Tensor], output: Sequence[Tensor]) -> None:
    ctx.request, ctx.shape, ctx.view_count = request, batch_shape(views), len(views)
    ctx.save_for_backward(*output, *views)
    ctx.set_materialize_grads(False)


class _EagerRegularizers(torch.autograd.Function):
    """The same in the older style: ``apply`` costs half of it, and the residue is no output.

    Compilers and ``torch.func`` need the other style.
    """

    @staticmethod
    def forward(
        ctx: Any, request: Request, directions: Tensor | None, *views: Tensor
    ) -> tuple[Tensor, ...]:
        output = tuple(_opaque.evaluate(request, views, directions, keep=True))
        _save(ctx, request, views, output)
        return output[: request.terms()]

    backward = _Regularizers.backward


def _in_plain_eager() -> bool:
    return not (torch.compiler.is_compiling() or _compat.in_transform())


def _finish(gradients: Sequence[Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Cast the gradients to the dtypes of their views, and forbid to differentiate them again."""
    gradients = [g.to(view.dtype) for g, view in zip(gradients, views, strict=True)]
    if torch.is_grad_enabled():
        gradients = [_FirstOrderOnly.apply(g, *views) for g in gradients]
    return gradients


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on a gradient; differentiating it again is an error instead of a silent zero."""

    @staticmethod
    def forward(gradient: Tensor, *views: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "vicreg_losses: expected one derivative of a loss, got a second one (double backward). "
            "The gradients are closed forms without a graph of their own; leave these losses out "
            "of a gradient penalty or any other function that is differentiated twice."
        )
