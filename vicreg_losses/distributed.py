"""Embeddings and statistics of the global batch.

In this version the group may have one rank, or ``torch.distributed`` may be uninitialised; more
ranks are refused with an error rather than served with local statistics. State is read at every
call, so modules may be built before ``init_process_group``.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, _torch
from ._evaluate import batch

__all__ = ["BatchStatistics", "all_gather", "all_gather_ragged", "batch_statistics", "world_size"]


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
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(process_group)
    if size < 1:
        raise RuntimeError("process_group: expected a group that this rank is a member of.")
    return size


def require_one_rank(what: str, process_group: dist.ProcessGroup | None = None) -> None:
    """Refuse to serve several ranks with the statistics of one."""
    size = world_size(process_group)
    if size > 1:
        raise RuntimeError(
            f"{what} over {size} ranks is not available in this version. For the statistics of "
            "each rank alone, which is another objective, pass gather_distributed=False to the "
            "loss."
        )


def all_gather(z: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Embeddings of all ranks, concatenated over samples in rank order; here ``z`` itself.

    Args:
        z: embeddings, (N, D), with the same N on every rank.
        process_group: the group, or ``None`` for the default one.

    Returns:
        Tensor: (W N, D) for W ranks.

    Raises:
        RuntimeError: for more than one rank, see the module's note.
    """
    require_one_rank("distributed.all_gather", process_group)
    return _one_view(z)


def all_gather_ragged(z: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """As :func:`all_gather`, for any number of samples on each rank; here ``z`` itself.

    Args:
        z: embeddings, (N_r, D).
        process_group: the group, or ``None`` for the default one.

    Returns:
        Tensor: (sum of N_r, D).

    Raises:
        RuntimeError: for more than one rank, see the module's note.
    """
    require_one_rank("distributed.all_gather_ragged", process_group)
    return _one_view(z)


@torch.no_grad()
def batch_statistics(z: Tensor, process_group: dist.ProcessGroup | None = None) -> BatchStatistics:
    """Count, mean and unbiased variance of the global batch.

    ``mean_j = sum_i z_ij / N``, ``variance_j = sum_i (z_ij - mean_j)^2 / (N - 1)``. A second
    pass takes off what the rounding of the mean left, so a float32 variance keeps its digits at
    offsets to 1e6 of its root.

    Args:
        z: embeddings, (N, D) or (V, N, D); float16, bfloat16, float32 or float64.
        process_group: the group, or ``None`` for the default one.

    Returns:
        BatchStatistics: in float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError: for anything but embeddings of at least two samples.
        RuntimeError: for more than one rank, see the module's note.
    """
    _checks.embedding_tensor(z)
    views = _checks.embeddings(z)
    require_one_rank("distributed.batch_statistics", process_group)
    x, ours = batch(views)
    samples = x.shape[1]
    centered, mean = _torch.center(x, inplace=ours)
    variance = _torch.squared_sums(centered) / (samples - 1)
    shape = (*z.shape[:-2], z.shape[-1])
    count = torch.full((), samples, dtype=torch.int64, device=z.device)
    return BatchStatistics(count, mean.view(shape), variance.view(shape))


def _one_view(z: Tensor) -> Tensor:
    _checks.embedding_tensor(z)
    if z.dim() != 2:
        raise ValueError(f"z: expected shape (N, D), got {tuple(z.shape)}.")
    return _checks.embeddings(z, min_samples=0)[0]
