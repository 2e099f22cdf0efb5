"""Kernels under torch.func, checkpointing and compilers: the eager result, bit for bit."""

from collections.abc import Callable

import oracles
import pytest
import torch
from oracles import Loss, Term, value_and_grad
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton is not installed")

from vicreg_losses import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HINGE = oracles.term("variance-hinge", "variance_loss", oracles.variance, form="hinge")
CENTER = oracles.term("center", "center_loss", oracles.center)
COVARIANCE = oracles.covariance_term("auto")
SKETCHES = [t for t in oracles.TERMS if t.sketch]


def kernels(term: Term) -> Loss:
    """The public function by its kernels; a sketch draws its own slices."""
    function = getattr(functional, term.function)
    draw = {"num_slices": 2, "generator_seed": 3} if term.sketch else {}
    return lambda z: function(z, impl="triton", **draw, **term.options)


def data(shape: tuple[int, int, int]) -> Tensor:
    return oracles.embeddings(*shape, dtype=torch.float32).to(DEVICE)


TRANSFORMS: dict[str, Callable[[Loss], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "func.grad": lambda loss: lambda z: torch.func.grad_and_value(loss)(z)[::-1],
    "checkpoint": lambda loss: (
        lambda z: value_and_grad(lambda leaf: checkpoint(loss, leaf, use_reentrant=False), z)
    ),
    "compile": lambda loss: (
        lambda z: value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), z)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("shape", [(2, 12, 20), (2, 20, 12)], ids=str)
def test_transforms_give_the_eager_result(
    transform: Callable[[Loss], Callable[[Tensor], tuple[Tensor, Tensor]]],
    shape: tuple[int, int, int],
) -> None:
    torch.compiler.reset()
    z = data(shape)
    for term in (HINGE, CENTER, COVARIANCE, *SKETCHES):
        value, gradient = value_and_grad(kernels(term), z)
        other, other_gradient = transform(kernels(term))(z)
        assert torch.equal(value, other)
        assert torch.equal(gradient, other_gradient)


def test_compiled_code_follows_the_precision() -> None:
    torch.compiler.reset()
    z = data((1, 12, 20))
    loss = kernels(COVARIANCE)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    before = torch.get_float32_matmul_precision()
    seen = []
    try:
        for setting in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(setting)
            assert torch.equal(value_and_grad(compiled, z)[1], value_and_grad(loss, z)[1])
            seen.append(value_and_grad(compiled, z)[1])
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("term", SKETCHES, ids=str)
def test_compiled_sketch_of_any_size(term: Term) -> None:
    torch.compiler.reset()
    compiled = torch.compile(kernels(term), fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for samples in (12, 13, *range(30, 280, 50)):  # across networks and tiles
        z = data((1, samples, 9))
        expected = value_and_grad(kernels(term), z)
        assert all(map(torch.equal, value_and_grad(compiled, z), expected))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_compiled_code_of_any_size() -> None:
    torch.compiler.reset()
    loss = kernels(COVARIANCE)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for samples in (12, 13, *range(70, 1200, 90)):  # many more plans than compilations
        z = data((1, samples, 20))
        assert torch.equal(value_and_grad(compiled, z)[1], value_and_grad(loss, z)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("constant", ["detached", "without grad mode"])
def test_a_loss_that_is_not_differentiated_in_a_transform(constant: str) -> None:
    z = data((2, 12, 20))
    loss = kernels(COVARIANCE)

    def both(leaf: Tensor) -> Tensor:
        if constant == "detached":
            return leaf.square().sum() + loss(leaf.detach())
        with torch.no_grad():
            term = loss(leaf)
        return leaf.square().sum() + term

    gradient, value = torch.func.grad_and_value(both)(z)
    assert torch.equal(gradient, 2 * z)
    assert torch.equal(value, z.square().sum() + loss(z))
