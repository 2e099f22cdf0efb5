"""Ranks or groups that are missing, and what no rank may pass: an error on all ranks, no hang."""

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from pool import refusal, run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

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
from vicreg_losses.functional import center_loss

WORLD, ODD = 3, 1
N, D, K = 5, 6, 4
# How long the others wait for a rank that is missing.
SHORT = timedelta(seconds=2)
MODULES: dict[str, Callable[..., nn.Module]] = {
    "VarianceLoss": VarianceLoss,
    "squared": lambda **common: VarianceLoss(form="squared", **common),
    "gram": lambda **common: CovarianceLoss("gram", **common),
    "feature": lambda **common: CovarianceLoss("feature", **common),
    "InvarianceLoss": InvarianceLoss,
    "slices": lambda **common: SlicedSketchLoss(K, exchange="slices", **common),
    "samples": lambda **common: SlicedSketchLoss(K, exchange="samples", **common),
    "per_rank": lambda **common: SlicedSketchLoss(K, slices="per_rank", **common),
    "epps_pulley": lambda **common: SlicedSketchLoss(K, statistic="epps_pulley", **common),
    "VICRegLoss": VICRegLoss,
    "VISRegLoss": lambda **common: VISRegLoss(num_slices=K, **common),
    "LeJEPALoss": lambda **common: LeJEPALoss(num_slices=K, **common),
}


def embeddings(n: int = N) -> Tensor:
    return oracles.embeddings(2, n, D)


# Ranks that are missing


def skip(rank: int, world: int, name: str) -> tuple[str, float]:
    group = dist.new_group(timeout=SHORT)
    begin = time.monotonic()
    loss = MODULES[name](process_group=group)
    said = "" if rank == ODD else refusal(lambda: loss(embeddings()))
    return said, time.monotonic() - begin


@pytest.mark.parametrize("name", ["VarianceLoss", "VISRegLoss"])
def test_a_rank_that_skips_the_loss_is_an_error_at_the_timeout(name: str) -> None:
    for rank, (said, seconds) in enumerate(run(skip, WORLD, name)):
        if rank != ODD:
            assert said.startswith(("RuntimeError", "DistBackendError"))
            assert seconds < 10 * SHORT.total_seconds()


# A rank that dies in the middle of a loss


def die(rank: int, store: str, box: Any) -> None:
    """Rank 1 ends in the second of two exchanges of slices, when rank 0 waits for it."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=10)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=limit)
    loss = MODULES["slices"]()
    loss(embeddings())
    if rank == ODD:
        exchange, left = dist.all_to_all_single, [1]
        dist.all_to_all_single = lambda *args, **keywords: (
            exchange(*args, **keywords) if left and left.pop() else os._exit(7)
        )
    begin = time.monotonic()
    try:
        loss(embeddings().requires_grad_()).backward()
    except RuntimeError:
        box.put(time.monotonic() - begin)
        raise


def test_a_rank_killed_in_the_loss_ends_the_others(tmp_path: Path) -> None:
    """At once, or at the timeout of 10 s; with an exit code that a launcher sees."""
    context = multiprocessing.get_context("spawn")
    box = context.Queue()
    processes = [
        context.Process(target=die, args=(rank, f"{tmp_path}/store", box), daemon=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        seconds = box.get(timeout=120)
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert seconds < 20
    assert codes == [1, 7]


# Groups that are not there


def without_group(rank: int, world: int) -> dict[str, str]:
    """What rank 2 gets that is no member, and all after the group has been destroyed."""
    said = {}
    pair = dist.new_group([0, 1])
    if rank == 2:
        for name, make in MODULES.items():
            said[f"{name} of others"] = refusal(lambda make=make: make(process_group=pair))
        said["function of others"] = refusal(lambda: center_loss(embeddings(), process_group=pair))
        said["world_size of others"] = refusal(lambda: distributed.world_size(pair))
        said["gather of others"] = refusal(lambda: distributed.all_gather(embeddings()[0], pair))
        said["limit of others"] = refusal(lambda: distributed.limit_samples(4, pair))
    names = [pair.group_name if rank < 2 else ""]
    dist.broadcast_object_list(names, src=0)
    if rank == 2:
        loss = VICRegLoss(process_group=names[0])
        said["name of others"] = refusal(lambda: loss(embeddings()))
    group = dist.new_group()
    losses = {name: make(process_group=group) for name, make in MODULES.items()}
    for loss in losses.values():
        loss(embeddings())
    dist.destroy_process_group(group)
    for name, loss in losses.items():
        said[f"{name} destroyed"] = refusal(lambda loss=loss: loss(embeddings()))
    said["function destroyed"] = refusal(lambda: center_loss(embeddings(), process_group=group))
    said["world_size destroyed"] = refusal(lambda: distributed.world_size(group))
    dist.barrier()
    dist.destroy_process_group()
    for name, loss in losses.items():
        said[f"{name} not initialised"] = refusal(lambda loss=loss: loss(embeddings()))
    return said


def test_a_group_that_is_not_there() -> None:
    heard = run(without_group, WORLD)
    assert [len(said) for said in heard] == [2 * len(MODULES) + 2] * 2 + [3 * len(MODULES) + 7]
    words = {"others": "member|other ranks", "destroyed": "destroyed", "initialised": "initialised"}
    for said in heard:
        for name, message in said.items():
            assert message.startswith("RuntimeError: process_group: expected"), (name, message)
            assert any(word in message for word in words[name.split()[-1]].split("|")), name


# Tensors and batches that no rank may have


def sharded_tensors(rank: int, world: int) -> list[str]:
    mesh = init_device_mesh("cpu", (world,))
    calls: list[Callable[[Tensor], Any]] = [make() for make in MODULES.values()]
    calls += [center_loss, distributed.batch_statistics]
    said = []
    for views in (embeddings().unbind(), [embeddings()]):
        tensors = [DTensor.from_local(view, mesh, [Shard(view.dim() - 2)]) for view in views]
        for i, call in enumerate(calls):
            some = tensors if i < len(MODULES) else tensors[:1]
            said.append(refusal(lambda call=call, some=some: call(*some)))
    for gather in (distributed.all_gather, distributed.all_gather_ragged):
        said.append(refusal(lambda gather=gather: gather(tensors[0])))
    return said


def test_a_dtensor_is_refused_with_what_to_do() -> None:
    for said in run(sharded_tensors, 2):
        for message in said:
            assert message.startswith("TypeError: embeddings: expected a plain torch.Tensor")
            assert "tensor.to_local()" in message


def over_the_limit(rank: int, world: int, as_list: bool) -> dict[str, Any]:
    """A limit of N samples, and one more on one rank."""
    distributed.limit_samples(N)
    z = embeddings(N + (rank == ODD))
    heard: dict[str, Any] = {}
    for name, make in MODULES.items():
        for grad in (False, True):
            leaf = z.clone().requires_grad_(grad)
            loss, views = make(), leaf.unbind() if as_list else [leaf]

            def call(loss: Any = loss, views: Any = views, leaf: Tensor = leaf) -> None:
                value = loss(*views)
                numbers = [value]
                if value.requires_grad:
                    numbers += torch.autograd.grad(value, leaf)
                assert all(x.isnan().all() for x in numbers), numbers

            heard[f"{name} {grad}"] = refusal(call)
    # The ranks still are at the same message.
    heard["then"] = make()(embeddings()).item()
    return heard


@pytest.mark.parametrize("as_list", [False, True])
def test_a_batch_over_the_limit(as_list: bool) -> None:
    """An error on its rank; on the others, which cannot know, NaN instead of a wrong number."""
    heard = run(over_the_limit, WORLD, as_list)
    assert len({said.pop("then") for said in heard}) == 1
    for rank, said in enumerate(heard):
        for name, message in said.items():
            if rank != ODD:
                assert message == "", name
            else:
                assert "RuntimeError: embeddings: expected at most 5 samples" in message, name
                assert "got 6. Call distributed.limit_samples" in message


def within_the_limit(rank: int, world: int) -> list[float]:
    """Values and norms of gradients without a limit, with one, and with a larger one."""
    values = []
    z = embeddings(N - rank).requires_grad_()
    for limit in (0, N, N + 3):
        if limit:
            distributed.limit_samples(limit)
        for make in MODULES.values():
            value = make()(z)
            (gradient,) = torch.autograd.grad(value, z)
            values += value.item(), gradient.norm().item()
    return values


def test_a_limit_changes_no_number() -> None:
    """But for the order of sums: of fewer than 1e3 numbers, in float64."""
    for values in run(within_the_limit, WORLD):
        free, same, larger = torch.tensor(values).view(3, -1)
        torch.testing.assert_close(same, free, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(larger, free, rtol=1e-12, atol=1e-12)


def test_limits_that_are_none() -> None:
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        distributed.limit_samples(0)
    distributed.limit_samples(4)  # of one process: of no effect
