"""Compiled, fake and meta: the same values and gradients, few graphs, and shapes without data."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from oracles import Loss, error, value_and_grad
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    _compat,
    _evaluate,
    _opaque,
    functional,
)
from vicreg_losses._evaluate import Request

pytestmark = pytest.mark.usefixtures("fresh_compiler")
K = 5
W = oracles.unit_directions(6, K)
# Compiled code calls an opaque operator or the operations of eager code, in float32, and fuses some
# of them (test_fusible compares those with the truth): 1e-6 is 16 roundings.
CLOSE = 1e-6

MODULES: dict[str, Callable[[], nn.Module]] = {
    "VarianceLoss": VarianceLoss,
    "squared": lambda: VarianceLoss(form="squared"),
    "CovarianceLoss": CovarianceLoss,
    "InvarianceLoss": InvarianceLoss,
    "wasserstein": lambda: SlicedSketchLoss(K),
    "epps_pulley": lambda: SlicedSketchLoss(K, statistic="epps_pulley"),
    "generator_seed": lambda: SlicedSketchLoss(K, generator_seed=3),
    "directions": lambda: SlicedSketchLoss(directions=W),
    "VICRegLoss": VICRegLoss,
    "VISRegLoss": lambda: VISRegLoss(num_slices=K),
    "LeJEPALoss": lambda: LeJEPALoss(num_slices=K),
}
FUNCTIONS: dict[str, Loss] = {
    **{
        f"{term}()": partial(
            getattr(functional, term.function),
            **term.options,
            **({"directions": W} if term.sketch else {}),
        )
        for term in oracles.TERMS
    },
    "generator_seed()": partial(functional.sliced_sketch_loss, num_slices=K, generator_seed=3),
}
LOSSES: dict[str, Callable[[], Loss]] = {
    **MODULES,
    **{name: lambda f=f: f for name, f in FUNCTIONS.items()},
}


def embeddings(n: int = 9, d: int = 6, v: int = 2) -> Tensor:
    return oracles.embeddings(v, n, d, seed=n, dtype=torch.float32)


def dense_permuted(z: Tensor) -> Tensor:
    """The same numbers in the memory order of the transposed: catches wrong fake strides."""
    return z.transpose(-2, -1).contiguous().transpose(-2, -1)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert error(a, e) <= CLOSE


def assert_compiles(
    make: Callable[[], Loss], backend: str, sizes: Sequence[int], graphs: int
) -> None:
    """Three steps of one shape take one graph, and have the values and slices of eager code."""
    counter, module, eager = CompileCounterWithBackend(backend), make(), make()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            actual = value_and_grad(compiled, embeddings() + step)
        assert_close(actual, value_and_grad(eager, embeddings() + step))
    for n in sizes:
        assert_close(value_and_grad(compiled, embeddings(n)), value_and_grad(eager, embeddings(n)))
    assert counter.frame_count <= graphs
    if isinstance(module, nn.Module):
        assert all(map(torch.equal, module.state_dict().values(), eager.state_dict().values()))


@pytest.mark.parametrize("name", LOSSES)
def test_aot_eager_takes_few_graphs(name: str) -> None:
    """The second is dynamic; N crosses D = 6, where the covariance changes from plain to opaque."""
    crosses = name in ("CovarianceLoss", "VICRegLoss", "covariance-auto()")
    sizes = (4, 6, 7, 12, 5, 40, 3)
    assert_compiles(LOSSES[name], "aot_eager", sizes=sizes, graphs=2 + crosses)


@pytest.mark.parametrize("name", ["covariance-auto()", "wasserstein", "VISRegLoss"])
def test_inductor(name: str) -> None:
    assert_compiles(LOSSES[name], "inductor", sizes=(), graphs=1)


@pytest.mark.parametrize("name", ["VICRegLoss", "VISRegLoss"])
def test_inductor_of_opaque_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_opaque, "_fuses", lambda *_: False)
    assert_compiles(LOSSES[name], "inductor", sizes=(), graphs=1)


def test_inductor_of_transposed_embeddings() -> None:
    """It allocates what an operator's fake implementation announces, strides included."""
    for n in (9, 4):  # plain, and opaque
        compiled = torch.compile(VICRegLoss(), backend="inductor", fullgraph=True)
        z = dense_permuted(embeddings(n))
        assert_close(value_and_grad(compiled, z), value_and_grad(VICRegLoss(), z))


def test_unseeded_draws_differ_between_and_within_compiled_calls() -> None:
    """Inductor merges equal calls of an operator, unless it is told that their results differ."""
    draw = partial(functional.sliced_sketch_loss, num_slices=K)
    twice = torch.compile(lambda z: (draw(z), draw(z)), backend="inductor", fullgraph=True)
    z = embeddings().requires_grad_()
    values = [value.item() for _ in range(3) for value in twice(z)]
    assert len(set(values)) == 6


@pytest.mark.parametrize("name", ["VarianceLoss", "CovarianceLoss", "VICRegLoss"])
def test_transform_inside_of_compiled_code(name: str) -> None:
    """PyTorch up to 2.14 gives a gradient of 0 where it traces it; refused, it runs eagerly."""
    loss, z = LOSSES[name](), embeddings()
    gradient = torch.compile(torch.func.grad(loss), backend="aot_eager")(z)
    assert_close((loss(z), gradient), value_and_grad(loss, z.clone()))


@pytest.mark.parametrize("name", ["VICRegLoss", "VISRegLoss", "covariance-auto()"])
def test_double_backward_of_compiled_code_is_an_error(name: str) -> None:
    compiled = torch.compile(LOSSES[name](), backend="aot_eager", fullgraph=True)
    z = embeddings().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(z) + z.pow(3).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["VICRegLoss", "wasserstein"])
def test_trainer_step_compiles_as_a_whole(name: str) -> None:
    """The views come from a model in the same graph, as a list, under autocast."""
    model, eager_loss, loss = nn.Linear(6, 6), LOSSES[name](), LOSSES[name]()

    def step(regularizer: Loss, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return regularizer([model(x[0]), model(x[1])])

    compiled = torch.compile(partial(step, loss), backend="aot_eager", fullgraph=True)
    assert_close(
        value_and_grad(compiled, embeddings()),
        value_and_grad(partial(step, eager_loss), embeddings()),
    )


@pytest.mark.parametrize("way", ["checkpoint of compiled", "compiled checkpoint"])
def test_activation_checkpointing(way: str) -> None:
    """The recomputation takes the slices of the forward pass, and no step of its own."""
    eager, module = SlicedSketchLoss(K), SlicedSketchLoss(K)
    compiler = partial(torch.compile, backend="aot_eager")
    if way == "compiled checkpoint":
        loss = compiler(partial(checkpoint, module, use_reentrant=False))
    else:
        loss = partial(checkpoint, compiler(module), use_reentrant=False)
    for _ in range(2):
        z, same_z = embeddings().requires_grad_(), embeddings().requires_grad_()
        eager(z).backward()
        loss(same_z).backward()
        assert_close([same_z.grad], [z.grad])
    assert module.step == eager.step


def test_compiled_training_switches_to_evaluation() -> None:
    module = SlicedSketchLoss(K)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    z = embeddings()
    compiled(z)
    module.eval()
    assert compiled(z) == compiled(z)
    assert module.step == 1


class Recorder(TorchDispatchMode):
    """Notes the calls of the library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vicreg_losses":  # recorded as the autograd.Function calls it
            self.calls.append((func, pytree.tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


def operator_calls(
    make: Callable[[], Loss], z: Tensor | list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Any, tuple[Any, ...]]]:
    """What compiled code calls, as arguments with data."""
    loss = make()
    with monkeypatch.context() as patch, Recorder() as recorder:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        loss(z).backward()
    return recorder.calls


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "stacked": lambda z: z.requires_grad_(),
    "permuted": lambda z: dense_permuted(z).requires_grad_(),
    "list": lambda z: [view.clone().requires_grad_() for view in z],
    "permuted-list-float16": lambda z: [dense_permuted(v).half().requires_grad_() for v in z],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["VarianceLoss", "CovarianceLoss", "wasserstein", "epps_pulley", "VISRegLoss"]
)
@pytest.mark.parametrize("fuses", [True, False])
def test_operators_pass_opcheck(
    name: str, layout: str, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, autograd registration, fake implementation, and both under dynamic shapes."""
    if not fuses:
        monkeypatch.setattr(_opaque, "_fuses", lambda *_: False)
    for n in (9, 4):
        z = LAYOUTS[layout](embeddings(n))
        for operator, arguments in operator_calls(LOSSES[name], z, monkeypatch):
            torch.library.opcheck(operator, arguments)


def test_every_registered_operator_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    gram = partial(functional.covariance_loss, strategy="gram")
    for make in (LOSSES["VISRegLoss"], lambda: functional.sliced_sketch_loss, lambda: gram):
        z = embeddings().requires_grad_()
        called |= {func.name() for func, _ in operator_calls(make, z, monkeypatch)}
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name for name in registered if name.startswith("vicreg_losses::")}
    elsewhere = {"all_gather", "reduce_scatter"}
    if not _compat.TRACES_FUNCTIONS:
        elsewhere |= {"same_world_", "wasserstein_"}
    assert called == ours - {f"vicreg_losses::{name}" for name in elsewhere}


def test_gathering_operators_pass_opcheck() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        name, z = dist.group.WORLD.group_name, embeddings()
        for x in (z[0], dense_permuted(z[0])):
            torch.library.opcheck(torch.ops.vicreg_losses.all_gather.default, (x, name, 1))
        for x in (z[:1], dense_permuted(z[:1])):
            torch.library.opcheck(torch.ops.vicreg_losses.reduce_scatter.default, (x, name))
    finally:
        dist.destroy_process_group()


def assert_shapes_alone(loss: Loss, z: Tensor) -> None:
    value = loss(z.requires_grad_())
    (gradient,) = torch.autograd.grad(value, z)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    assert gradient.shape == z.shape
    assert gradient.dtype == z.dtype
    assert value.device == gradient.device == z.device


# Those without explicit directions, which are tensors with data.
WITHOUT_DATA = [name for name in LOSSES if name not in ("wasserstein()", "epps_pulley()")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_meta_tensors(name: str, dtype: torch.dtype) -> None:
    loss = LOSSES[name]()
    if name == "directions":
        loss.to("meta")
    for shape in ((2, 9, 6), (2, 4, 6)):
        assert_shapes_alone(loss, torch.empty(shape, dtype=dtype, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in WITHOUT_DATA if name != "directions"])
def test_fake_tensors(name: str, dtype: torch.dtype) -> None:
    """No memory is behind them, so reading one number would be an error."""
    with FakeTensorMode():
        loss = LOSSES[name]()
        for shape in ((2, 9, 6), (2, 4, 6)):
            assert_shapes_alone(loss, torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("name", [name for name in WITHOUT_DATA if name != "directions"])
def test_no_value_is_read_back_from_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a CUDA tensor, run on a fake one: any data-dependent step would be an error.

    Forward only: PyTorch's backward pass asks the driver for the device.
    """
    monkeypatch.setattr(_opaque, "has_data", lambda tensors: True)
    with FakeTensorMode():
        z = torch.empty(2, 9, 6, device="cuda")
        assert LOSSES[name]()(z).shape == ()


@pytest.mark.parametrize("strategy", ["auto", "gram", "feature"])
@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 5, 9)])
def test_fake_shapes_are_the_real_ones(shape: tuple[int, int, int], strategy: str) -> None:
    request = Request(
        variance="hinge", center=True, covariance=strategy, sketch="wasserstein", quantiles="exact"
    )
    z, w = torch.randn(shape), torch.eye(shape[2])
    real = _evaluate.evaluate(request, [z], w, True)
    fake = _opaque.evaluate(request, [z.to("meta")], w.to("meta"), True)
    assert [t.shape for t in fake] == [t.shape for t in real]
