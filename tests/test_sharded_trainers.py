"""Losses over several ranks inside what trainers wrap around them: compilers, FSDP, copies.

The truth is one process with the concatenated batch; ranks have samples of different distributions.
"""

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from oracles import Loss, value_and_grad
from pool import join, refusal
from pool import run as run_in_time
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    functional,
)

N, D, K = 5, 6, 4
# Compilers and FSDP are imported by each rank in its first test.
run = partial(run_in_time, timeout=240)
# float64, and sums of fewer than 1e3 products.
CLOSE = 1e-10
MODULES: dict[str, Callable[..., nn.Module]] = {
    "VarianceLoss": VarianceLoss,
    "CovarianceLoss": CovarianceLoss,
    "InvarianceLoss": InvarianceLoss,
    "wasserstein": partial(SlicedSketchLoss, K),
    "samples": partial(SlicedSketchLoss, K, exchange="samples"),
    "epps_pulley": partial(SlicedSketchLoss, K, statistic="epps_pulley"),
    "VICRegLoss": VICRegLoss,
    "VISRegLoss": partial(VISRegLoss, num_slices=K),
    "LeJEPALoss": partial(LeJEPALoss, num_slices=K),
}
FUNCTIONS: dict[str, Callable[..., Loss]] = {
    f"{name}()": lambda function=name, more=more, **common: partial(
        getattr(functional, function), **more, **common
    )
    for name, more in {
        "variance_loss": {},
        "center_loss": {},
        "covariance_loss": {},
        "invariance_loss": {},
        "sliced_sketch_loss": {"num_slices": K, "generator_seed": 3},
    }.items()
}
LOSSES = {**MODULES, **FUNCTIONS}


def whole_batch(world: int, samples: int = N) -> list[Tensor]:
    """(2, N, D) of each rank, of different scale and centre."""
    parts = [oracles.embeddings(2, samples, D, seed=rank) for rank in range(world)]
    return [part * (1 + 0.5 * rank) + rank for rank, part in enumerate(parts)]


def shared_errors(
    rank: int, world: int, loss: Loss, alone: Loss, factor: float, samples: int = N
) -> tuple[float, float]:
    """Relative errors of value and local gradient against one process with all samples."""
    parts = whole_batch(world, samples)
    value, gradient = value_and_grad(loss, parts[rank].clone())
    true_value, true_gradient = value_and_grad(alone, torch.cat(parts, 1))
    true_gradient = true_gradient[:, rank * samples : (rank + 1) * samples]
    return oracles.error(value, true_value), oracles.error(gradient, factor * true_gradient)


def within(errors: Any, bound: float = CLOSE) -> bool:
    """Whether all numbers of a nest of them are; NaN is not."""
    if isinstance(errors, dict):
        errors = list(errors.values())
    if isinstance(errors, float):
        return errors <= bound
    return all(within(error, bound) for error in errors)


# Compilers


def compiled(
    rank: int, world: int, backend: str, names: list[str], sizes: list[int], whose: str
) -> dict[str, Any]:
    """Errors of compiled code, the numbers of graphs, and whether buffers are those of eager."""
    common = {"process_group": dist.new_group() if whose == "sub-group" else None}
    heard = {}
    with torch._inductor.config.patch(compile_threads=1):
        for name in names:
            torch._dynamo.reset()
            counter, loss = CompileCounterWithBackend(backend), LOSSES[name](**common)
            alone = LOSSES[name](gather_distributed=False)
            fast = torch.compile(loss, backend=counter, fullgraph=True)
            errors = []
            for step in range(3):
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    errors.append(shared_errors(rank, world, fast, alone, world))
            for samples in sizes:
                errors.append(shared_errors(rank, world, fast, alone, world, samples))
            same = not isinstance(loss, nn.Module) or all(
                map(torch.equal, loss.state_dict().values(), alone.state_dict().values())
            )
            heard[name] = errors, counter.frame_count, same
        torch._dynamo.reset()
    return heard


@pytest.mark.parametrize("whose", ["default", "sub-group"])
def test_aot_eager(whose: str) -> None:
    """One graph, two for any N, which crosses D; no break, and no new graph at each step."""
    sizes = [3, 6, 7, 2, 11]
    heard = run(compiled, 2, "aot_eager", list(LOSSES), sizes, whose)
    for said in heard:
        for name, (errors, graphs, same) in said.items():
            assert within(errors), name
            assert graphs <= 2, name
            assert same, name


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for inductor"
)
@pytest.mark.parametrize("whose", ["default", "sub-group"])
def test_inductor(whose: str) -> None:
    names = ["CovarianceLoss", "VISRegLoss", "sliced_sketch_loss()"]
    for said in run(compiled, 2, "inductor", names, [3], whose):
        for name, (errors, graphs, same) in said.items():
            assert within(errors), name
            assert graphs <= 2, name
            assert same, name


def compiled_before(rank: int, world: int) -> dict[str, Any]:
    """Compiled and used by one process; then in a group, before and after a reset; then alone."""
    heard: dict[str, Any] = {}
    names = ["VarianceLoss", "VICRegLoss", "wasserstein", "invariance_loss()"]
    z = whole_batch(world)[rank]
    torch._dynamo.reset()
    losses = {name: LOSSES[name]() for name in names}
    fast = {name: torch.compile(loss, backend="aot_eager") for name, loss in losses.items()}
    for loss in fast.values():
        loss(z)
    join(rank, world)
    for name, loss in fast.items():
        heard[f"{name} before"] = refusal(lambda loss=loss: loss(z))
    torch._dynamo.reset()
    for name, loss in fast.items():
        if isinstance(losses[name], nn.Module):
            losses[name].load_state_dict(LOSSES[name]().state_dict())  # the same slices again
        alone = LOSSES[name](gather_distributed=False)
        heard[name] = shared_errors(rank, world, loss, alone, world)
    dist.barrier()
    dist.destroy_process_group()
    z.requires_grad_()  # as it was compiled in the group
    for name, loss in fast.items():
        heard[f"{name} after"] = refusal(lambda loss=loss: loss(z))
    torch._dynamo.reset()
    return heard


def test_compiled_for_another_number_of_ranks() -> None:
    """Not silently local: an error, that says what to do, and helps."""
    for said in run(compiled_before, 2, joined=False):
        assert len(said) == 12
        for name, heard in said.items():
            if isinstance(heard, str):
                counts = ("1 rank(s)", "got 2") if "before" in name else ("2 rank(s)", "got 1")
                assert heard.startswith("RuntimeError"), name
                assert all(words in heard for words in (*counts, "torch._dynamo.reset()")), heard
            else:
                assert within(heard), name


# FSDP and DDP


class Model(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D))
        self.double()


def reference(world: int, make: Callable[..., Loss]) -> list[Tensor]:
    """Gradients of the parameters in one process with all samples."""
    model = Model()
    z = torch.cat(whole_batch(world), 1)
    make(gather_distributed=False)([model(z[0]), model(z[1])]).backward()
    return [p.grad for p in model.parameters()]


def gradient_errors(model: nn.Module, truth: list[Tensor]) -> list[float]:
    # Biases before a loss that is invariant to an offset have none.
    floor = max(g.norm().item() for g in truth)
    gradients = [p.grad for p in model.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return [oracles.error(g, t, floor) for g, t in zip(whole, truth, strict=True)]


def fully_sharded(rank: int, world: int, shape: tuple[int, ...], adds: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    z, heard = whole_batch(world)[rank], {}
    for name, make in MODULES.items():
        model = Model()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if adds:
            for layer in (model[0], model[2], model):
                layer.set_gradient_divide_factor(1)
        loss = make(reduction="sum" if adds else "mean")
        loss(model(z[0]), model(z[1])).backward()
        heard[name] = gradient_errors(model, reference(world, make))
    return heard


@pytest.mark.parametrize("adds", [False, True], ids=["mean", "sum"])
@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["FSDP2", "HSDP"])
def test_fully_sharded(shape: tuple[int, ...], adds: bool) -> None:
    world = shape[0] ** len(shape)
    for said in run(fully_sharded, world, shape, adds):
        assert within(said), said


DDP = ("static_graph", "find_unused_parameters")


def data_parallel(rank: int, world: int, way: str) -> dict[str, Any]:
    """Two steps each, the second without gradients of the first."""
    z, heard = whole_batch(world)[rank], {}
    for name, make in MODULES.items():
        model, loss = Model(), make()
        wrapped = DistributedDataParallel(model, **{way: True} if way in DDP else {})
        for _ in range(2):
            model.zero_grad()
            if isinstance(loss, nn.Module) and hasattr(loss, "step"):
                loss.step.zero_()
            views = [wrapped(z[0]), wrapped(z[1])]
            if way == "checkpoint":
                value = checkpoint(loss, *views, use_reentrant=False)
            else:
                value = loss(*views)
            value.backward()
        heard[name] = gradient_errors(model, reference(world, make))
    return heard


@pytest.mark.parametrize("way", ["plain", *DDP, "checkpoint"])
def test_data_parallel(way: str) -> None:
    for said in run(data_parallel, 2, way):
        assert within(said), said


def in_one_step(rank: int, world: int) -> dict[str, Any]:
    """Two losses in one step, one graph used twice, a scaled upstream gradient, ``torch.func``."""
    parts = whole_batch(world)
    whole, heard = torch.cat(parts, 1), {}
    mine = slice(rank * N, (rank + 1) * N)

    def compare(name: str, actual: Tensor, factor: float, *makes: Callable[..., Loss]) -> None:
        alone = [make(gather_distributed=False) for make in makes]
        true = value_and_grad(lambda z: sum(loss(z) for loss in alone), whole)[1][:, mine]
        heard[name] = oracles.error(actual, world * factor * true)

    for name, make in MODULES.items():
        other = MODULES["VISRegLoss"]
        two = make(), other()
        gradient = value_and_grad(lambda z, two=two: two[0](z) + two[1](z), parts[rank])[1]
        compare(f"{name} and another", gradient, 1, make, other)
        z = parts[rank].clone().requires_grad_()
        value = make()(z)
        value.backward(retain_graph=True)
        value.backward()
        compare(f"{name} twice", z.grad, 2, make)
        scale = 2.0**16
        z = parts[rank].clone().requires_grad_()
        (make()(z) * scale).backward()
        compare(f"{name} scaled", z.grad / scale, 1, make)
        gradient = torch.func.grad(make())(parts[rank])
        compare(f"{name} functional", gradient, 1, make)
    return heard


def test_what_one_step_may_do() -> None:
    for said in run(in_one_step, 2):
        assert within(said), said


# Copies


def saved(loss: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def restored(loss: nn.Module, make: Callable[..., nn.Module], **common: Any) -> nn.Module:
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = make(**common)
    other.load_state_dict(torch.load(file))
    return other


def copies(rank: int, world: int) -> dict[str, Any]:
    """Each in its pair of ranks, after one call: the slices go on, and in the same pair."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    place, heard = rank % 2, {}
    group = pairs[rank // 2]
    for name, make in MODULES.items():
        loss, alone = make(process_group=group), make(gather_distributed=False)
        for both in (loss, alone):
            both(oracles.embeddings(2, N, D))
        made = {
            "deepcopy": copy.deepcopy(loss),
            "pickle": pickle.loads(pickle.dumps(loss)),
            "save": saved(loss),
            "state_dict": restored(loss, make, process_group=group),
            "by name": restored(loss, make, process_group=group.group_name),
        }
        for way, twin in made.items():
            true = copy.deepcopy(alone)
            heard[f"{name} {way}"] = shared_errors(place, 2, twin, true, 2)
    return heard


def test_copies_go_on_in_their_group() -> None:
    for said in run(copies, 4):
        assert within(said), said
