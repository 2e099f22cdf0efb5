"""Which implementation serves a call: plain PyTorch, or Triton kernels."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import _compat, _evaluate, _slices
from ._checks import one_of
from ._request import Request, batch_shape, is_narrow

IMPLEMENTATIONS = ("auto", "torch", "triton")
# Chips on which "auto" takes the kernels: those with a run under benchmarks/results/ in which every
# test marked gpu passed.
MEASURED: frozenset[str] = frozenset()


def check(impl: str, *, kernels: bool = True) -> None:
    """Check the option, before there is a tensor.

    A named implementation is honoured or refused with the reason; only "auto" chooses.

    Args:
        impl: the option.
        kernels: whether the term has Triton kernels.
    """
    one_of("impl", impl, IMPLEMENTATIONS)
    if impl != "triton":
        return
    if not kernels:
        _refuse("this term has no Triton kernels in this version")
    obstacle = _obstacle("cpu")  # also the interpreter's kernels have been imported
    if obstacle and (obstacle == _NOT_INSTALLED or not torch.cuda.is_available()):
        _refuse(obstacle)


def resolve(request: Request, views: Sequence[Tensor]) -> Request:
    """The request with its implementation chosen: ``impl`` is "triton" after this, or it is not.

    Args:
        request: what to evaluate.
        views: the embeddings.
    """
    device = views[0].device
    if request.world > 1:
        if request.impl == "triton":
            _refuse("the kernels serve one rank; several take PyTorch's products in this version")
        return request
    if request.impl == "torch" or (request.impl == "auto" and device.type != "cuda"):
        return request
    obstacle = _obstacle_of_request(request, views)
    if request.impl == "auto":
        if obstacle or not _is_measured(device.index or 0):
            return request
    else:
        index = device.index or 0
        obstacle = obstacle or _obstacle(device.type) or _obstacle_of_chip(device.type, index)
        if obstacle:
            _refuse(obstacle)
    exact = not is_narrow(views) and _compat.float32_products_are_exact()
    return request.but(impl="triton", parts=request.parts or 1 + exact)


def backend(request: Request) -> ModuleType:
    """The module with ``evaluate``, ``gradient`` and ``residue`` for a resolved request."""
    if request.world > 1:
        from . import _sharded  # not loaded before it is needed

        return _sharded
    if request.impl == "triton":
        from . import _fused  # Triton is not loaded before

        return _fused
    return _evaluate


def draw_directions(
    seed: Tensor, step: Tensor, offset: int, dimensions: int, slices: int, impl: str
) -> Tensor:
    """:func:`._slices.draw_directions` at ``step + offset``; on CUDA by a kernel where one serves.

    The CPU's numbers are those of its generator, whatever serves the rest.
    """
    device = seed.device
    if impl != "torch" and device.type == "cuda" and _kernel_draws(impl, device.index or 0):
        from .kernels import directions

        with _compat.outside_transforms():
            plain = _compat.plain(seed), _compat.plain(step)
            return directions.draw(*plain, offset, dimensions, slices)
    return _slices.draw_directions(seed, step + offset, dimensions, slices)


_NOT_INSTALLED = "Triton is not installed"


def _refuse(obstacle: str) -> None:
    raise RuntimeError(f"impl='triton' cannot run: {obstacle}. Use impl='auto' or impl='torch'.")


def _obstacle_of_request(request: Request, views: Sequence[Tensor]) -> str:
    """Why there are no kernels for this; empty if there are."""
    if any(view.dtype == torch.float64 for view in views):
        return "there are no kernels for float64"
    if batch_shape(views)[0] > 65535:
        return f"expected at most 65535 views, got {batch_shape(views)[0]}"
    if request.sketch and request.covariance:
        return "expected a covariance or a sketch, got both"
    return ""


@_compat.constant_when_compiled
def _obstacle(device_type: str) -> str:
    """Why the kernels cannot run on a kind of device; empty if they can."""
    try:
        from .kernels import inner, launch
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return _NOT_INSTALLED
    if device_type == "cuda":
        return ""
    if device_type != "cpu":
        return f"there is no Triton for a device of type {device_type!r}"
    if launch.is_interpreted(inner._inner_kernel):
        return ""
    return (
        "Triton needs a GPU; on a CPU its interpreter serves for tests, with TRITON_INTERPRET=1 in "
        "the environment before the first use"
    )


@_compat.constant_when_compiled
def _obstacle_of_chip(device_type: str, index: int) -> str:
    """Why the kernels cannot run on a chip; empty if they can."""
    from .kernels import launch

    arch = launch.target(torch.device(device_type, index)).arch
    if arch in launch.REFUSED or (arch.startswith("sm_") and int(arch[3:]) < 80):
        return f"the kernels need an sm_80 (Ampere), a gfx942 (MI300) or a later chip, got {arch}"
    return ""


@_compat.constant_when_compiled
def _is_measured(index: int) -> bool:
    """Whether "auto" takes the kernels on a CUDA device."""
    if not MEASURED or _obstacle("cuda"):
        return False
    from .kernels import launch

    return launch.target(torch.device("cuda", index)).arch in MEASURED


@_compat.constant_when_compiled
def _kernel_draws(impl: str, index: int) -> bool:
    if impl == "auto":
        return _is_measured(index)
    return not (_obstacle("cuda") or _obstacle_of_chip("cuda", index))
