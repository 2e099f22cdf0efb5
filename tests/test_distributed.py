"""The distributed helpers, and all losses, on one process: nothing is communicated."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from oracles import value_and_grad
from rank_cases import Batch, cases
from torch import Tensor, nn

from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    distributed,
)

N, D, K = 12, 6, 5
ALONE = Batch((N,))
MODULES: dict[str, Callable[..., nn.Module]] = {
    "VarianceLoss": VarianceLoss,
    "CovarianceLoss": CovarianceLoss,
    "InvarianceLoss": InvarianceLoss,
    "wasserstein": lambda **common: SlicedSketchLoss(K, **common),
    "epps_pulley": lambda **common: SlicedSketchLoss(K, statistic="epps_pulley", **common),
    "VICRegLoss": VICRegLoss,
    "VISRegLoss": lambda **common: VISRegLoss(num_slices=K, **common),
    "LeJEPALoss": lambda **common: LeJEPALoss(num_slices=K, **common),
}
GATHERS = {"equal": distributed.all_gather, "ragged": distributed.all_gather_ragged}
U = 2.0**-24


def embeddings(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return oracles.embeddings(2, N, D, seed=seed, dtype=dtype)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# batch_statistics


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(64, 5), (1000, 3), (2, 64, 5)], ids=str)
def test_statistics_at_an_offset(offset: float, shape: tuple[int, ...]) -> None:
    """float32 numbers, whose statistics in float64 are the truth."""
    z = (oracles.embeddings(*(1, *shape)[-3:]).view(shape) + offset).float()
    z.select(-1, 0).neg_()
    statistics = distributed.batch_statistics(z)
    assert statistics.count == shape[-2]
    assert statistics.count.dtype == torch.int64
    assert statistics.mean.dtype == statistics.variance.dtype == torch.float32
    true = z.double()
    assert statistics.mean.shape == statistics.variance.shape == true.mean(-2).shape
    assert ((statistics.variance - true.var(-2)) / true.var(-2)).abs().max() <= 1e-6
    # The mean is rounded when stored, once more when its parts are added, and to a unit of the
    # deviations' rounding.
    bound = 4 * U * (true.mean(-2).abs() + true.std(-2))
    assert ((statistics.mean - true.mean(-2)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_statistics_of_other_dtypes(dtype: torch.dtype) -> None:
    z = embeddings(dtype)
    statistics = distributed.batch_statistics(z)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert statistics.mean.dtype == statistics.variance.dtype == wide
    same = distributed.batch_statistics(z.to(wide))
    assert torch.equal(statistics.mean, same.mean)
    assert torch.equal(statistics.variance, same.variance)
    tolerance = 1e-14 if wide == torch.float64 else 1e-6
    torch.testing.assert_close(same.mean, z.double().mean(1).to(wide), rtol=0, atol=tolerance)
    torch.testing.assert_close(same.variance, z.double().var(1).to(wide), rtol=tolerance, atol=0)


def test_statistics_are_detached_and_leave_the_input() -> None:
    z = embeddings()
    before = z.clone()
    statistics = distributed.batch_statistics(z.requires_grad_())
    assert not statistics.mean.requires_grad
    assert torch.equal(z, before)
    assert (distributed.batch_statistics(torch.full((5, 3), 7.3)).variance == 0).all()
    assert statistics._fields == ("count", "mean", "variance")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_of_a_non_finite_column(bad: float) -> None:
    z = embeddings()
    z[0, 3, 2] = bad
    statistics = distributed.batch_statistics(z)
    finite = torch.ones(2, D, dtype=torch.bool)
    finite[0, 2] = False
    assert torch.equal(statistics.mean.isfinite(), finite)
    assert torch.equal(statistics.variance.isfinite(), finite)


# One rank


def everything() -> list[Tensor]:
    """All values and gradients that one process can ask for, in a fixed order."""
    results: list[Tensor] = []
    for make in MODULES.values():
        results += value_and_grad(make(), embeddings())
    for loss, _ in cases(ALONE).values():
        results += value_and_grad(loss, ALONE.part(0))
    results += distributed.batch_statistics(embeddings())
    for gather in GATHERS.values():
        results += value_and_grad(lambda z, g=gather: g(z).square().sum(), embeddings()[0])
    return results


@pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS.keys())
@pytest.mark.parametrize("n", [0, 1, N])
def test_gathering_alone_is_the_identity(gather: Callable[[Tensor], Tensor], n: int) -> None:
    z = embeddings()[0, :n].clone().requires_grad_()
    gathered = gather(z)
    assert torch.equal(gathered, z)
    gathered.square().sum().backward()
    assert torch.equal(z.grad, 2 * z.detach())


def collectives(events: Any) -> list[str]:
    words = ("c10d", "gloo", "all_reduce", "allreduce", "all_gather", "broadcast", "nccl")
    return [event.key for event in events if any(word in event.key for word in words)]


def test_one_rank_communicates_nothing(one_rank: None) -> None:
    """And the profiler that says so does see a collective."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        together = everything()
    assert collectives(profile.key_averages()) == []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dist.all_reduce(torch.ones(1))
    assert collectives(profile.key_averages())
    dist.destroy_process_group()
    alone = everything()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert len(together) == len(alone)
    assert all(map(torch.equal, together, alone))


def test_one_rank_of_a_named_group(one_rank: None) -> None:
    group = dist.new_group([0])
    for name, make in MODULES.items():
        same = make(process_group=group)
        assert torch.equal(same(embeddings()), make()(embeddings())), name
    statistics = distributed.batch_statistics(embeddings(), process_group=group)
    assert torch.equal(statistics.mean, distributed.batch_statistics(embeddings()).mean)
    for gather in GATHERS.values():
        assert torch.equal(gather(embeddings()[0], process_group=group), embeddings()[0])


def test_world_size(tmp_path: Path) -> None:
    assert distributed.world_size() == 1
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert distributed.world_size() == 1
        assert distributed.world_size(dist.new_group([0])) == 1
        with pytest.raises(RuntimeError, match="member"):
            distributed.world_size(dist.GroupMember.NON_GROUP_MEMBER)
    finally:
        dist.destroy_process_group()
