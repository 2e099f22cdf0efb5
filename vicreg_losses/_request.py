"""What is asked of the regularizers, and of which batch: shared by both implementations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Request(NamedTuple):
    """Which regularizers to evaluate; an empty string or ``False`` leaves a term out."""

    variance: str = ""  # "hinge" | "squared"
    center: bool = False
    covariance: str = ""  # "auto" | "gram" | "feature"
    sketch: str = ""  # "wasserstein" | "epps_pulley"
    gamma: float = 1.0
    eps: float = 1e-4
    quantiles: str = "paper"  # "paper" | "exact"
    knots: int = 17
    t_max: float = 3.0
    invariance: int = 0  # how many views form the centre; the first term
    factor: float = 1.0  # of the invariance
    impl: str = "auto"  # "triton" only where that was decided
    parts: int = 0  # of Triton's operands: 16-bit numbers for each element; 0: by the dtypes
    slices: int = 0  # K, where the directions are known
    exchange: str = "auto"  # "auto" | "slices" | "samples": what ranks send for a sketch
    gathers: bool = False  # whether the batch is that of all ranks
    world: int = 1  # ranks; what follows is for more than one
    group: str = ""  # the name of theirs
    averages: bool = True  # whether the trainer averages gradients, or adds them
    own_slices: bool = False  # whether each rank has directions of its own
    wire: str = ""  # a narrower dtype that holds the views exactly

    def but(self, **changes: Any) -> "Request":
        """``_replace``, which torch 2.8 does not compile."""
        if not torch.compiler.is_compiling():
            return self._replace(**changes)
        return Request(**{**dict(zip(Request._fields, self, strict=True)), **changes})

    def terms(self) -> int:
        """Number of terms asked for."""
        local = bool(self.variance) + self.center + bool(self.covariance) + bool(self.sketch)
        return local + bool(self.invariance)


def uses_gram(request: Request, samples: int, dimensions: int) -> bool:
    """Whether the covariance is served by the N x N product."""
    return samples < dimensions if request.covariance == "auto" else request.covariance == "gram"


def computing_dtype(views: Sequence[Tensor]) -> torch.dtype:
    """float64 if any view is; else float32, whatever is stored."""
    for view in views:
        if view.dtype == torch.float64:
            return torch.float64
    return torch.float32


def is_narrow(views: Sequence[Tensor]) -> bool:
    """Whether all views have 16 bits."""
    return all(view.dtype in (torch.float16, torch.bfloat16) for view in views)


def narrow_dtype(views: Sequence[Tensor]) -> str:
    """The 16-bit dtype that all views have, or an empty string."""
    same = all(view.dtype == views[0].dtype for view in views)
    return str(views[0].dtype).removeprefix("torch.") if same and is_narrow(views) else ""


def gradient_dtype(views: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the views where they share one, else the computing dtype."""
    same = all(view.dtype == views[0].dtype for view in views)
    return views[0].dtype if same else computing_dtype(views)


def batch_shape(views: Sequence[Tensor]) -> tuple[int, int, int]:
    """(V, N, D)."""
    shape = views[0].shape
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return len(views), shape[0], shape[1]
