"""The ranks that ``torchrun`` starts: their group, their parts of a batch, batch norm over them.

Without ``torchrun`` there is one rank, and nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchError(Exception):
    """The batch cannot be divided among the ranks; the message is one line."""


def size() -> int:
    """Number of ranks, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this one."""
    return int(os.environ.get("RANK", "0"))


def neighbours() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check(batch: int) -> None:
    """Refuse a global batch that cannot be divided among the ranks."""
    if size() > 1 and (batch % size() or batch < 2 * size()):
        raise BatchError(
            f"a batch of {batch} images: expected a multiple of the {size()} ranks, and two images "
            "or more for each; see --batch-size, which counts those of all ranks"
        )


def part(batch: int) -> slice:
    """This rank's rows of a global batch."""
    own = batch // size()
    return slice(rank() * own, (rank() + 1) * own)


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Let the ranks communicate inside the ``with``."""
    if size() == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    # Not after an error: it may be one rank's, and NCCL would wait for the others, when the end of
    # this process is what lets torchrun end them.
    yield
    dist.destroy_process_group()


def largest(*numbers: int) -> list[int]:
    """The largest of each number over ranks; all wait for the last rank.

    They travel between the CPUs: no device waits.
    """
    return merge(torch.tensor(numbers)).tolist()


def merge(numbers: Tensor) -> Tensor:
    """Replace each number, on the CPU, by the largest over ranks."""
    if size() > 1:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers


def wait() -> None:
    """Wait for all ranks."""
    largest(0)


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Let batch norm take the statistics of all ranks; parameters keep their names."""
    if size() == 1:
        return
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = CPUSyncBatchNorm
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)


class CPUSyncBatchNorm(_BatchNorm):
    """What ``nn.SyncBatchNorm`` is on GPUs alone, for ranks of equal batches on CPUs."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Take any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, count = [0, *range(2, x.dim())], size() * x.numel() // x.shape[1]

        def average(values: Tensor) -> Tensor:  # sums in double, as PyTorch's own on CPUs
            sums = values.sum(axes, keepdim=True, dtype=torch.float64)
            return (_SumOverRanks.apply(sums) / count).to(centered.dtype)

        centered = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = average(centered)
        centered = centered - mean
        variance = average(centered.square())
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum)
        scale = (variance + self.eps).rsqrt()
        if not self.affine:
            return (centered * scale).to(x.dtype)
        scale = self.weight.view_as(mean) * scale
        return torch.addcmul(self.bias.view_as(mean), centered, scale).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, with gradient: that of each rank's part is the sum over ranks too."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        total = upstream.clone()
        dist.all_reduce(total)
        return total
