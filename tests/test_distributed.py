"""The distributed helpers on one process, and that several ranks are refused, not mis-served."""

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracles import value_and_grad
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


# Two ranks, each with embeddings of its own

REFUSED = ["over 2 ranks is not available in this version", "gather_distributed=False"]


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


def two_ranks(rank: int, store: str, answers: Any) -> None:
    """What rank says: refusals by name, values and gradients without gathering, and sub-groups."""
    torch.set_num_threads(1)
    built_before = {name: make() for name, make in MODULES.items()}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    z = embeddings(seed=rank)
    refusals = {name: refusal(lambda m=module: m(z)) for name, module in built_before.items()}
    for name, make in MODULES.items():
        refusals[f"{name} built after"] = refusal(lambda make=make: make()(z))
        refusals[f"{name} no_grad"] = refusal(torch.no_grad()(lambda make=make: make()(z)))
    for name, gather in GATHERS.items():
        refusals[name] = refusal(lambda gather=gather: gather(z[0]))
    refusals["batch_statistics"] = refusal(lambda: distributed.batch_statistics(z))
    steps = [int(m.step) for m in built_before.values() if "step" in dict(m.named_buffers())]

    alone = dist.new_group([rank], use_local_synchronization=True)
    local = {}
    for name, make in MODULES.items():
        local[name] = value_and_grad(make(gather_distributed=False), z)
        local[f"{name} in a group of one"] = value_and_grad(make(process_group=alone), z)
    dist.barrier()
    dist.destroy_process_group()
    for name, module in built_before.items():
        local[f"{name} after the group"] = value_and_grad(module, z)
    numbers = {name: [x.numpy() for x in pair] for name, pair in local.items()}
    answers.put((rank, refusals, steps, numbers))


def test_two_ranks_are_refused_or_local(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=two_ranks, args=(rank, f"{tmp_path}/store", answers), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        received = [answers.get(timeout=120) for _ in processes]
    except queue.Empty:
        pytest.fail("a rank died or hung")
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert {rank for rank, *_ in received} == {0, 1}
    for rank, refusals, steps, numbers in received:
        for name, message in refusals.items():
            assert all(words in message for words in REFUSED), (rank, name, message)
        assert not any(steps), "a refused call advanced the slices"
        for name, (value, gradient) in numbers.items():
            make = MODULES[name.split()[0]]
            expected = value_and_grad(make(), embeddings(seed=rank))
            # Sums of another number of threads may round otherwise.
            for actual, right in zip((value, gradient), expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(actual), right, rtol=1e-5, atol=1e-7)
    assert all(process.exitcode == 0 for process in processes)
