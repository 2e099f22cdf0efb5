"""Questions about PyTorch's state that have no public name (torch 2.8 to 2.15)."""

import torch
from torch import Tensor


def is_batched(tensor: Tensor) -> bool:
    """Whether ``torch.vmap`` is mapping over it."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def in_transform() -> bool:
    """Whether a ``torch.func`` transform is running."""
    return bool(torch._C._are_functorch_transforms_active())


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
    with torch._C._DisableFuncTorch():
        tensor.add_(number)
