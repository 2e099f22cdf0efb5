"""Embeddings and statistics of the global batch, and what the losses cost over several ranks.

State is read at every call: modules may be built before ``init_process_group``, and the group may
be made again with another number of ranks. Where ``torch.distributed`` is not initialised, or the
group has one rank, nothing is communicated.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, _collectives, _compat, _opaque
from ._deviations import batch, deviations
from ._moments import global_moments
from ._plan import Plan, plan

__all__ = [
    "BatchStatistics",
    "Plan",
    "all_gather",
    "all_gather_ragged",
    "batch_statistics",
    "limit_samples",
    "plan",
    "world_size",
]


class BatchStatistics(NamedTuple):
    """Statistics over the samples of the global batch, detached.

    Attributes:
        count: number of samples, 0-dim int64.
        mean: (D,), or (V, D) for several views.
        variance: unbiased (N - 1), of the shape of ``mean``.
    """

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    variance: Tensor


def world_size(process_group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in the group; 1 when ``torch.distributed`` is not initialised.

    Args:
        process_group: the group, or ``None`` for the default one.

    Raises:
        RuntimeError: if this process is not a member of the group.
    """
    return _collectives.members(process_group)[0]


def limit_samples(samples: int, process_group: dist.ProcessGroup | None = None) -> None:
    """Say how many samples of a view a rank will have at most, on all ranks alike.

    Messages are padded to the largest batch of any rank. The ranks tell each other at every call,
    through the CPU's backend of their group (which ``init_process_group`` makes beside NCCL unless
    it is told a backend). With a limit GPUs need not, and a larger batch is an error. In a group
    of NCCL alone they do at the first call of each kind, and a larger batch later is an error.

    Args:
        samples: the most there will be in one view on one rank.
        process_group: the group, or ``None`` for the default one; of no effect for one rank.
    """
    _checks.integer("samples", samples, 1)
    size, name = _collectives.members(process_group)
    if size > 1:
        _collectives.limit_samples(_collectives.resolve(name), samples)


def all_gather(z: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Embeddings of all ranks, concatenated over samples in rank order.

    The gradient is the sum over ranks of the gradients for this rank's samples, which takes one
    message in the backward pass, on all ranks. So under a trainer that averages gradients (DDP,
    FSDP) the parameters get the gradient of the mean over ranks of what each computes, be that the
    same global loss everywhere or a loss of each rank's own rows.

    Args:
        z: embeddings, (N, D), with the same N on every rank.
        process_group: the group, or ``None`` for the default one.

    Returns:
        Tensor: (W N, D) for W ranks; ``z`` itself for one.

    Raises:
        TypeError, ValueError: for anything but one view of embeddings.
        RuntimeError: on all ranks, if their shapes or dtypes differ (looked at as by the losses:
            on a CPU always, elsewhere at the first call or with ``VICREG_LOSSES_DEBUG=1``).
    """
    z = _one_view(z)
    size, name = _collectives.members(process_group)
    if size == 1:
        return z
    gathered: Tensor = _Gather.apply(z, name, size)
    return gathered.flatten(0, 1)


def all_gather_ragged(z: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """As :func:`all_gather`, for any number of samples on each rank, 0 too.

    The host waits for the numbers, as the shape of the result depends on them.

    Args:
        z: embeddings, (N_r, D).
        process_group: the group, or ``None`` for the default one.

    Returns:
        Tensor: (sum of N_r, D).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`all_gather`.
    """
    z = _one_view(z)
    size, name = _collectives.members(process_group)
    if size == 1:
        return z
    mine = torch.tensor([z.shape[0]], device=z.device)
    counts = _collectives.all_gather(mine, _collectives.resolve(name)).flatten().tolist()
    padded = torch.nn.functional.pad(z, (0, 0, 0, max(counts) - z.shape[0]))
    gathered = _Gather.apply(padded, name, size)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


@torch.no_grad()
def batch_statistics(z: Tensor, process_group: dist.ProcessGroup | None = None) -> BatchStatistics:
    """Count, mean and unbiased variance of the global batch.

    ``mean_j = sum_i z_ij / N``, ``variance_j = sum_i (z_ij - mean_j)^2 / (N - 1)``. A second
    pass takes off what the rounding of the mean left, and ranks send their means as pairs of
    numbers, so a float32 variance keeps its digits at offsets to 1e6 of its root.

    Args:
        z: embeddings, (N, D) or (V, N, D); float16, bfloat16, float32 or float64. Over several
            ranks N may differ, and be 0.
        process_group: the group, or ``None`` for the default one.

    Returns:
        BatchStatistics: in float32, or float64 for float64 input; the same on all ranks.

    Raises:
        TypeError, ValueError: for anything but embeddings of at least two samples in all.
        RuntimeError: on all ranks, if their shapes or dtypes differ.
    """
    _checks.embedding_tensor(z)
    size, name = _collectives.members(process_group)
    views = _checks.embeddings(z, min_samples=2 if size == 1 else 0)
    shape = (*z.shape[:-2], z.shape[-1])
    if size > 1:
        x = batch(views)[0]
        call = {"function": "batch_statistics", "shape": shape, "dtype": x.dtype}
        ranks = _collectives.meet(name, x, x.shape[1], call, x.new_empty(0, 0))
        moments = global_moments(x, ranks)
        variance = (moments.squares / (moments.total - 1)).view(shape)
        count = moments.total.round().to(torch.int64)
        return BatchStatistics(count, moments.mean().view(shape), variance)
    _, high, low, squares = deviations(views, keep=False)
    samples = z.shape[-2]
    count = torch.full((), samples, dtype=torch.int64, device=z.device)
    return BatchStatistics(count, (high + low).view(shape), (squares / (samples - 1)).view(shape))


def _one_view(z: Tensor) -> Tensor:
    _checks.embedding_tensor(z)
    if z.dim() != 2:
        raise ValueError(f"z: expected shape (N, D), got {tuple(z.shape)}.")
    return _checks.embeddings(z, min_samples=0)[0]


class _Gather(torch.autograd.Function):
    """(N, D) of each rank -> (W, N, D); its transpose is :class:`_Scatter`."""

    @staticmethod
    def forward(z: Tensor, name: str, size: int) -> Tensor:
        return (_gather if _is_plain(z) else _gather_op)(z, name, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _Scatter.apply(upstream, *ctx.group), None, None


class _Scatter(torch.autograd.Function):
    """(W, N, D) of each rank -> the sum over ranks of their row for this one, (N, D)."""

    @staticmethod
    def forward(upstream: Tensor, name: str, size: int) -> Tensor:
        return (_scatter if _is_plain(upstream) else _scatter_op)(upstream, name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(upstream, *ctx.group), None, None


def _is_plain(x: Tensor) -> bool:
    """Whether no compiler and no transform is at work, which need an operator."""
    return not (torch.compiler.is_compiling() or _compat.in_transform()) and _opaque.has_data([x])


def _gather(z: Tensor, group: str, size: int) -> Tensor:
    call = {"function": "all_gather", "dimensions": tuple(z.shape[1:]), "dtype": z.dtype}
    _collectives.meet(group, z, z.shape[0], call, z.new_empty(0, 0), least=0, equal=True)
    return _collectives.all_gather(z, _collectives.resolve(group))


def _scatter(upstream: Tensor, group: str) -> Tensor:
    return _collectives.all_to_all(upstream, _collectives.resolve(group)).sum(0)


_gather_op = _compat.operator(
    "all_gather(Tensor z, str group, SymInt size) -> Tensor",
    lambda z, group, size: z.new_empty((size, *z.shape)),
)(_gather)
_scatter_op = _compat.operator(
    "reduce_scatter(Tensor upstream, str group) -> Tensor",
    lambda upstream, group: upstream.new_empty(upstream.shape[1:]),
)(_scatter)


for _name in ("all_gather", "reduce_scatter"):
    _compat.keep_when_unused(_name)
