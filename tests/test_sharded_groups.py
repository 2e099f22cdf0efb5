"""Groups of ranks that come, go and are apart; trainers; and the helpers over several ranks."""

from collections.abc import Callable
from typing import Any

import oracles
import pool
import pytest
import torch
import torch.distributed as dist
from oracles import error, truth, value_and_grad
from rank_cases import FLOAT64, VANISHING, Batch, cases, wrong
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vicreg_losses import SlicedSketchLoss, VICRegLoss, VISRegLoss, distributed, functional

# Sub-groups

PAIRS = Batch((5, 3)), Batch((2, 6), seed=100)


def answers_of_pairs(rank: int, world: int) -> tuple[dict[str, Any], Any, list[str]]:
    """Values and gradients in the group of this rank, and what the other one says."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, other = groups if rank < 2 else groups[::-1]
    batch, place = PAIRS[rank // 2], rank % 2
    losses = cases(batch, place, process_group=mine)
    z = batch.part(place)
    found = {name: (*value_and_grad(ours, z),) for name, (ours, _) in losses.items()}
    helpers = (
        distributed.world_size(mine),
        distributed.batch_statistics(z, process_group=mine),
        distributed.all_gather_ragged(z[0], process_group=mine),
    )
    names: list[Any] = [None] * 4
    dist.all_gather_object(names, mine.group_name)
    theirs = names[(rank + 2) % 4]
    said = [
        pool.refusal(call)
        for call in (
            lambda: VICRegLoss(process_group=other),
            lambda: functional.covariance_loss(z, process_group=other),
            lambda: functional.covariance_loss(z, process_group=theirs),
            lambda: VICRegLoss(process_group=theirs)(z),
            lambda: distributed.world_size(other),
            lambda: distributed.batch_statistics(z, process_group=other),
            lambda: distributed.all_gather(z[0], process_group=other),
            lambda: distributed.all_gather_ragged(z[0], process_group=other),
        )
    ]
    return found, helpers, said


def test_groups_that_are_apart() -> None:
    heard = pool.run(answers_of_pairs, 4)
    for batch, pair in zip(PAIRS, (heard[:2], heard[2:]), strict=True):
        assert wrong(batch, [found for found, *_ in pair], 2) == {}
        whole = batch.whole()
        for _, (size, statistics, gathered), said in pair:
            assert size == 2
            assert statistics.count == 8
            torch.testing.assert_close(statistics.variance, whole.var(1))
            assert torch.equal(gathered, whole[0])
            for text in said:
                assert text.startswith("RuntimeError: process_group: expected a group that"), text


# Groups made after the losses, destroyed, and made again with other numbers of ranks

FOUR = Batch((3, 4, 2, 5))
LATER = Batch((9, 4)), Batch((1, 20), seed=50)  # more samples on a rank than before
Life = dict[str, tuple[Tensor, Tensor]]


def built(**common: Any) -> dict[str, nn.Module]:
    """Losses whose slices stand still."""
    losses = {
        "vicreg": VICRegLoss(**common),
        "visreg": VISRegLoss(num_slices=5, seed=1, **common),
        "samples": SlicedSketchLoss(5, seed=2, exchange="samples", **common),
        "sums": SlicedSketchLoss(5, statistic="epps_pulley", **common),
    }
    return {name: loss.eval() for name, loss in losses.items()}


def lives(rank: int, world: int) -> tuple[dict[str, Life], list[str]]:
    """What the same losses give in each of their worlds; and what a lost group says."""
    losses, found, said = built(), {}, []
    pair, place = divmod(rank, 2)

    def live(name: str, z: Tensor) -> None:
        found[name] = {key: value_and_grad(loss, z) for key, loss in losses.items()}

    live("none yet", FOUR.part(rank))
    pool.join(rank, 4, "four")
    live("four", FOUR.part(rank))
    losses, kept = built(gather_distributed=False), losses
    live("local", FOUR.part(rank))
    losses = built(process_group=dist.new_group([rank], use_local_synchronization=True))
    live("group of one", FOUR.part(rank))
    losses = kept
    group = dist.new_group([0, 1, 2, 3])
    held = VICRegLoss(process_group=group)
    held(FOUR.part(rank))
    dist.barrier()
    dist.destroy_process_group()
    live("none", FOUR.part(rank))
    lost = (
        lambda: functional.center_loss(FOUR.part(rank), process_group=group),
        lambda: held(FOUR.part(rank)),
    )
    said += map(pool.refusal, lost)
    pool.join(place, 2, f"pair{pair}")
    live("pair", LATER[pair].part(place))
    said += map(pool.refusal, lost)
    dist.barrier()
    dist.destroy_process_group()
    pool.join(0, 1, f"alone{rank}")
    live("alone", FOUR.part(rank))
    return found, said


def test_groups_come_and_go() -> None:
    heard = pool.run(lives, 4, joined=False)
    local = built(gather_distributed=False)
    for rank, (found, said) in enumerate(heard):
        pair, place = divmod(rank, 2)
        for life, batch, own in (("four", FOUR, rank), ("pair", LATER[pair], place)):
            world = len(batch.sizes)
            for name, (value, gradient) in found[life].items():
                true_value, true_gradient = value_and_grad(local[name], batch.whole())
                true_gradient = world * batch.split(true_gradient)[own]
                assert error(value, true_value) <= FLOAT64, (life, name)
                assert error(gradient, true_gradient, VANISHING) <= FLOAT64, (life, name)
        for name, loss in local.items():
            expected = value_and_grad(loss, FOUR.part(rank))
            for life in ("none yet", "local", "group of one", "none", "alone"):
                assert all(map(torch.equal, found[life][name], expected)), (life, name)
        assert len(said) == 4
        assert all(text.startswith("RuntimeError: process_group:") for text in said), said


# Trainers

INPUTS = Batch((4, 2, 5), dimensions=5), Batch((3, 6, 0), dimensions=5, seed=7)


def model(dimensions: int) -> nn.Linear:
    linear = nn.Linear(5, dimensions).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in linear.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator).double()
    return linear


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def embedded(net: nn.Module, x: Tensor) -> Tensor:
    """Both views in one call, as DDP wants it."""
    return net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def trained(rank: int, world: int, dimensions: int) -> dict[str, list[Tensor]]:
    """Parameters' gradients: of one batch, of two that are accumulated, and added over ranks."""
    found = {}
    embeddings = Batch(INPUTS[0].sizes, dimensions)
    plain = model(dimensions)
    ddp = DistributedDataParallel(model(dimensions))
    adding = cases(embeddings, rank, reduction="sum")
    first, second = (batch.part(rank) for batch in INPUTS)
    for name, (loss, _) in cases(embeddings, rank).items():
        ddp.zero_grad(set_to_none=False)
        loss(embedded(ddp, first)).backward()
        once = gradients(ddp).clone()
        ddp.zero_grad(set_to_none=False)
        with ddp.no_sync():
            loss(embedded(ddp, first)).backward()
        loss(embedded(ddp, second)).backward()
        plain.zero_grad()
        adding[name][0](embedded(plain, first)).backward()
        total = gradients(plain)
        dist.all_reduce(total)
        found[name] = [once, gradients(ddp).clone(), total]
    return found


@pytest.mark.parametrize("dimensions", [6, 100])
def test_parameters_get_the_gradient_of_the_whole_batch(dimensions: int) -> None:
    heard = pool.run(trained, 3, dimensions)
    for name, (_, formula) in cases(Batch(INPUTS[0].sizes, dimensions)).items():
        true = []
        for batch in INPUTS:
            net = model(dimensions)
            formula(embedded(net, batch.whole())).backward()
            true.append(gradients(net))
        for answer in heard:
            once, accumulated, added = answer[name]
            assert error(once, true[0], VANISHING) <= FLOAT64, name
            assert error(accumulated, true[0] + true[1], VANISHING) <= FLOAT64, name
            assert error(added, true[0], VANISHING) <= FLOAT64, name


# Helpers


def own_rows(z: Tensor, gathered: Tensor, rank: int) -> Tensor:
    """A loss of one rank: its rows against all, each rank with a weight of its own."""
    return (1 + rank) * (z @ gathered.T).logsumexp(1).sum() + gathered[:1].sum() * rank


def everybodys(z: Tensor, gathered: Tensor, rank: int) -> Tensor:
    """The same loss of all samples on every rank."""
    return oracles.covariance(gathered[None])


LOSSES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "own rows": own_rows,
    "everybody's": everybodys,
}


def gathered(rank: int, world: int, batch: Batch, ragged: bool) -> tuple[Any, ...]:
    """All rows; gradients of losses, and of a penalty on those gradients; statistics; refusals."""
    gather = distributed.all_gather_ragged if ragged else distributed.all_gather
    found = {}
    for name, loss in LOSSES.items():
        z = batch.part(rank)[0].requires_grad_()
        (slope,) = torch.autograd.grad(loss(z, gather(z), rank), z, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), z)
        found[name] = slope.detach(), second
    z = batch.part(rank)
    statistics = [distributed.batch_statistics(x) for x in (z, z[0], z.bfloat16())]
    wrong_calls = (
        lambda: distributed.all_gather(z[0, : 1 + rank % 2]),
        lambda: distributed.all_gather_ragged(z[0, :, : 5 + rank % 2]),
        lambda: distributed.all_gather(z[0, :1].to([torch.float32, torch.float64][rank % 2])),
        lambda: distributed.batch_statistics(z[:, :, : 5 + rank % 2]),
    )
    said = [pool.refusal(call) for call in wrong_calls] if min(batch.sizes) > 1 else []
    return gather(z[0]), found, statistics, said


@pytest.mark.parametrize(
    ("sizes", "ragged"),
    [
        ((4, 4), False),
        ((3, 3, 3), False),
        ((1, 1, 1, 1), False),
        ((3, 3), True),
        ((6, 1, 9, 3), True),
        ((7, 0, 5), True),
        ((0, 0, 2), True),
    ],
    ids=str,
)
def test_helpers(sizes: tuple[int, ...], ragged: bool) -> None:
    """Gradients add up over ranks, so those that are averaged are of the mean of their losses."""
    batch, world = Batch(sizes), len(sizes)
    heard = pool.run(gathered, world, batch, ragged)
    whole = batch.whole()

    def total(name: str) -> Callable[[Tensor], Tensor]:
        def loss(z: Tensor) -> Tensor:
            parts = enumerate(z.split(sizes))
            return sum(LOSSES[name](own, z, rank) for rank, own in parts)

        return loss

    def penalty(name: str) -> Callable[[Tensor], Tensor]:
        def loss(z: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad(total(name)(z), z, create_graph=True)
            return slope.square().sum()

        return loss

    for name in LOSSES:
        for place, loss in enumerate((total(name), penalty(name))):
            together = torch.cat([found[name][place] for _, found, *_ in heard])
            assert error(together, truth(loss, whole[0])[1], VANISHING) <= FLOAT64, name
    for rows, _, statistics, said in heard:
        assert torch.equal(rows, whole[0])
        for s, t in zip(statistics, heard[0][2], strict=True):
            assert all(map(torch.equal, s, t))
        narrow = whole.bfloat16().double()
        for s, z, exact in zip(
            statistics, (whole, whole[0], narrow), (1e-12, 1e-12, 1e-6), strict=True
        ):
            assert s.count == sum(sizes)
            assert s.count.dtype == torch.int64
            assert s.mean.shape == s.variance.shape == z.mean(-2).shape
            assert error(s.mean, z.mean(-2)) <= exact
            assert error(s.variance, z.var(-2)) <= exact
        assert all(text.startswith("RuntimeError: vicreg_losses: expected") for text in said), said
