"""The published implementations over ranks: they gather everything, or sum within autograd.

Written from the papers and what their codes do: VICReg's FullGatherLayer, VISReg's trainer,
LeJEPA's all-reduce of the empirical characteristic function. Embeddings are (V, N_l, D).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import published


class Gather(torch.autograd.Function):
    """(V, N, D) of each rank -> (V, W N, D).

    The backward pass adds the gradients of all samples up on every rank (VICReg's FullGatherLayer),
    or scatters the sums (torch.distributed.nn.all_gather, of VISReg's trainer).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, scatter: bool) -> Tensor:
        ctx.scatter = scatter
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size()
        parts = upstream.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        if not ctx.scatter:
            dist.all_reduce(parts)
            return parts[dist.get_rank()], None
        mine = torch.empty_like(parts)
        dist.all_to_all_single(mine, parts)
        return mine.sum(0), None


class MeanOverRanks(torch.autograd.Function):
    """Over equal batches, of LeJEPA; so is its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return MeanOverRanks.forward(ctx, upstream)


def epps_pulley(z: Tensor, w: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """:func:`published.epps_pulley` with the means of the global batch."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
    weights = torch.full_like(t, 2 * t_max / (knots - 1))
    weights[0] /= 2
    weights[-1] /= 2
    target = torch.exp(-t.square() / 2)
    phase = (z @ w).unsqueeze(-1) * t
    real, imaginary = MeanOverRanks.apply(phase.cos().mean(1)), phase.sin().mean(1)
    error = (real - target).square() + MeanOverRanks.apply(imaginary).square()
    return (error @ (weights * target) * z.shape[1] * dist.get_world_size()).mean()


def covariance(z: Tensor) -> Tensor:
    return published.covariance(Gather.apply(z, False))


def vicreg(z: Tensor) -> Tensor:
    """The invariance is of the rank's own samples, as in the authors' code."""
    everything = Gather.apply(z, False)
    regularizers = 25 * published.variance(everything) + len(z) * published.covariance(everything)
    return 25 * torch.nn.functional.mse_loss(z[0], z[1]) + regularizers


def sliced_wasserstein(z: Tensor, w: Tensor) -> Tensor:
    return published.sliced_wasserstein(Gather.apply(z, True), w)


def visreg(z: Tensor, w: Tensor, weight: float = 0.9) -> Tensor:
    invariance = (z - z.mean(0)).square().mean()
    return (1 - weight) * invariance + weight * published.visreg(Gather.apply(z, True), w)
