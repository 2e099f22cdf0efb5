"""What PyTorch has no public name for, or none that is cheap (torch 2.8 to 2.15)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
# Compiled code that traces the operations of an autograd.Function gives wrong gradients up to 2.11
# (where is_exporting is always true in it) and forgets in 2.12 that it is not twice differentiable.
TRACES_FUNCTIONS = _VERSION >= (2, 13)

# Up to 2.14 torch.func.grad inside of compiled code gives a gradient of 0.
TRACES_TRANSFORMS = _VERSION >= (2, 15)

_library = torch.library.Library("vicreg_losses", "FRAGMENT")


def operator(
    schema: str, fake: Callable[..., Any], *tags: torch.Tag
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator of ``torch.ops.vicreg_losses``.

    In the plainest way: a call costs a fraction of what it does by ``torch.library.custom_op``.

    Args:
        schema: its name, arguments and results.
        fake: the same for tensors without data.
        tags: of the operator.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        common = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        _library.define(schema, tags=(*common, *tags))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vicreg_losses::{name}", fake, lib=_library)
        return getattr(torch.ops.vicreg_losses, name).default

    return define


def constant_when_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """``torch.compiler.assume_constant_result``, without the import of a second that it costs."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_batched(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` is mapping over it."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def is_batched_gradient(tensor: Tensor) -> bool:
    """Whether it is of a backward pass with ``is_grads_batched``."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def in_transform() -> bool:
    """Whether a ``torch.func`` transform is running."""
    return bool(torch._C._are_functorch_transforms_active())


def outside_transforms() -> AbstractContextManager[object]:
    """Plain PyTorch inside, whatever ``torch.func`` transform is running."""
    return torch._C._DisableFuncTorch()


def plain(tensor: Tensor) -> Tensor:
    """The tensor that ``torch.func.grad`` has wrapped, for code that needs its memory."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if is_batched(tensor):
            raise NotImplementedError(
                "vicreg_losses: expected a plain upstream gradient for Triton kernels, got a "
                "batched one (torch.vmap over a backward pass). Use impl='torch'."
            )
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is running."""
    return torch.autograd.forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether the autograd engine is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def add_outside_transforms_(tensor: Tensor, number: int) -> None:
    """``tensor += number`` for a counter, which a transform may have captured."""
    if torch.compiler.is_compiling() or not in_transform():
        tensor.add_(number)
        return
    with outside_transforms():
        tensor.add_(number)


def keep_when_unused(name: str) -> None:
    """Keep a compiler from dropping calls of an operator: the other ranks would wait for them."""
    torch.fx.node.has_side_effect(getattr(torch.ops.vicreg_losses, name).default)


def resolve_group(name: str) -> torch.distributed.ProcessGroup:
    """The process group registered under a name."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore


def has_cpu_backend(group: torch.distributed.ProcessGroup) -> bool:
    """Whether tensors of the CPU can be sent in a group."""
    return torch.device("cpu") in group._device_types


@constant_when_compiled
def float32_products_are_exact() -> bool:
    """Whether float32 matrix products on an accelerator shall have the precision of float32.

    Compiled code asks once, and again after ``torch.set_float32_matmul_precision``.
    """
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch.backends.cuda.matmul.fp32_precision, or by that and this
        return torch.backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")
