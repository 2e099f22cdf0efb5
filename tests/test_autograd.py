"""The gradients as autograd sees them: against finite differences, under every way to ask."""

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import oracles
import pytest
import torch
from oracles import Loss, error, value_and_grad
from torch import Tensor, nn
from torch.autograd import forward_ad
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

# The part of the library's message that must survive rewording.
DOUBLE_BACKWARD = "double backward"
V, N, D, K = 2, 7, 4, 5
W = oracles.unit_directions(D, K).double()


def function(term: oracles.Term) -> Loss:
    """The public function with the options of a term, for any way to pass the views."""
    directions = {"directions": W} if term.sketch else {}
    return partial(getattr(functional, term.function), **term.options, **directions)


TERMS: dict[str, Loss] = {str(term): function(term) for term in oracles.ALL_TERMS}
COMPOSITES: dict[str, Loss] = {
    "VICRegLoss": VICRegLoss(),
    "VISRegLoss": lambda z: VISRegLoss()(z, directions=W),
    "LeJEPALoss": lambda z: LeJEPALoss()(z, directions=W),
}
LOSSES = {**TERMS, **COMPOSITES}
# Their gradient holds sigma fixed, so it is not the derivative of the value.
STOPPED_SIGMA = {"wasserstein", "wasserstein-exact", "VISRegLoss"}

MODULES: dict[str, Callable[[], nn.Module]] = {
    "VarianceLoss": VarianceLoss,
    "CovarianceLoss": CovarianceLoss,
    "InvarianceLoss": InvarianceLoss,
    "wasserstein": lambda: SlicedSketchLoss(K),
    "epps_pulley": lambda: SlicedSketchLoss(K, statistic="epps_pulley"),
    "VICRegLoss": VICRegLoss,
    "VISRegLoss": lambda: VISRegLoss(num_slices=K),
    "LeJEPALoss": lambda: LeJEPALoss(num_slices=K),
}

each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@pytest.fixture
def z() -> Tensor:
    """Float64 embeddings: no std within 1e-3 of a hinge, no ranks within 1e-4 of a tie."""
    z = oracles.embeddings(V, N, D, seed=3)
    std = (z.var(1) + 1e-4).sqrt()
    assert min((std - gamma).abs().min() for gamma in (0.7, 1, 2)) > 1e-3
    assert oracles.rank_gap(z, W) > 1e-4
    return z


def leaf(z: Tensor) -> Tensor:
    return z.detach().clone().requires_grad_()


def right_or_refused(
    derivative: Callable[[], Tensor | None], expected: Tensor, words: str = ""
) -> bool:
    try:
        actual = derivative()
    except RuntimeError as refusal:
        return words in str(refusal)
    return actual is not None and error(actual, expected) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, z: Tensor) -> None:
    """Finite differences of 1e-6 do not reach the hinge or a tie (see `z`).

    With sigma held fixed by definition, the gradient is the derivative of the value along
    embeddings of constant sigma: those that a differentiable normalization makes.
    """
    loss, spread = LOSSES[name], z.std(1, correction=0, keepdim=True)

    def of_constant_sigma(u: Tensor) -> Tensor:
        centered = u - u.mean(1, keepdim=True)
        sigma = centered.square().mean(1, keepdim=True).sqrt()
        return loss(centered / sigma * spread + u.mean(1, keepdim=True))

    checked = of_constant_sigma if name in STOPPED_SIGMA else loss
    assert torch.autograd.gradcheck(checked, (leaf(z),), check_undefined_grad=False)


@each_loss
def test_double_backward_is_an_error(loss: Loss, z: Tensor) -> None:
    """The graph for it may be asked for: only its use is refused."""
    x = leaf(z)
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert torch.equal(gradient, value_and_grad(loss, z)[1])
    with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
        torch.autograd.grad(gradient.square().sum(), x)


@each_loss
def test_double_backward_in_a_mixed_objective_is_an_error(loss: Loss, z: Tensor) -> None:
    """A term that silently dropped out of a gradient penalty would leave this one finite."""
    x = leaf(z)
    (gradient,) = torch.autograd.grad(loss(x) + x.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
        torch.autograd.grad(gradient.square().sum(), x)


@each_module
def test_gradient_penalty_through_a_model_is_an_error(
    make: Callable[[], nn.Module], z: Tensor
) -> None:
    model, loss = nn.Linear(D, D).double(), make()
    x = leaf(z)
    objective = loss(model(x)) + model(x).square().sum()
    (gradient,) = torch.autograd.grad(objective, x, create_graph=True)
    with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
        gradient.square().sum().backward()


@each_loss
def test_second_derivatives_of_torch_func_are_errors(loss: Loss, z: Tensor) -> None:
    gradient = torch.func.grad(loss)
    with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
        torch.func.grad(lambda x: gradient(x).square().sum())(z)
    with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
        torch.autograd.functional.hessian(loss, z)


@each_loss
def test_torch_func_gives_the_gradient_of_backward(loss: Loss, z: Tensor) -> None:
    value, gradient = value_and_grad(loss, z)
    assert torch.equal(torch.func.grad(loss)(z), gradient)
    by_vjp, pull_back = torch.func.vjp(loss, z)
    assert torch.equal(by_vjp, value)
    assert torch.equal(pull_back(torch.tensor(2.0, dtype=z.dtype))[0], 2 * gradient)


@each_module
def test_functional_call_differentiates_a_model(make: Callable[[], nn.Module], z: Tensor) -> None:
    trained = nn.Sequential(nn.Linear(D, D, dtype=z.dtype), make())
    parameters = {name: p.detach() for name, p in trained.named_parameters()}
    buffers = {name: b.clone() for name, b in trained.named_buffers()}

    def objective(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(trained, {**p, **b}, (z,))

    gradients = torch.func.grad(objective)(parameters, buffers)
    trained(z).backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in trained.named_parameters())
    assert all(torch.equal(buffers[name], b) for name, b in trained.named_buffers())


@each_loss
def test_vmap_is_an_error(loss: Loss, z: Tensor) -> None:
    batch = torch.stack([z, z + 1])
    with pytest.raises(TypeError, match=r"outside torch\.vmap"):
        torch.func.vmap(loss, randomness="different")(batch)
    with pytest.raises((TypeError, RuntimeError), match="vmap"):
        torch.func.vmap(torch.func.grad(loss), randomness="different")(batch)


# PyTorch's forward mode scripts functions when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_right_or_an_error(name: str, z: Tensor) -> None:
    """Never a tangent that some term silently dropped out of."""
    loss, tangent = LOSSES[name], z.flip(0)
    expected = (value_and_grad(loss, z)[1] * tangent).sum()

    def by_dual_numbers() -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(z, tangent))).tangent

    assert right_or_refused(lambda: torch.func.jvp(loss, (z,), (tangent,))[1], expected)
    assert right_or_refused(by_dual_numbers, expected)


@each_loss
def test_batched_upstream_gradients_are_right_or_an_error(loss: Loss, z: Tensor) -> None:
    x, upstream = leaf(z), torch.tensor([1.0, -2.0, 4.0], dtype=z.dtype)
    expected = upstream[:, None, None, None] * value_and_grad(loss, z)[1]
    value = loss(x)
    assert right_or_refused(
        lambda: torch.autograd.grad(value, x, upstream, is_grads_batched=True)[0], expected
    )


@each_loss
def test_two_passes_over_a_retained_graph(loss: Loss, z: Tensor) -> None:
    x = leaf(z)
    value = loss(x)
    value.backward(retain_graph=True)
    once = x.grad.clone()
    value.backward(retain_graph=True)
    assert torch.equal(x.grad, once + once)
    assert torch.equal(torch.autograd.grad(value, x)[0], once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_loss
def test_upstream_gradient_scales_exactly(loss: Loss, dtype: torch.dtype, z: Tensor) -> None:
    """Powers of two commute with rounding; another factor rounds a few times more."""
    z = z.to(dtype)
    gradient = value_and_grad(loss, z)[1]
    for factor in (2.0**16, 2.0**-4, -0.5):
        assert torch.equal(value_and_grad(lambda x, f=factor: loss(x) * f, z)[1], factor * gradient)
    thrice = value_and_grad(lambda x: 3 * loss(x), z)[1]
    assert error(thrice, 3 * gradient) <= 8 * torch.finfo(dtype).eps


@each_loss
def test_each_view_may_be_constant(loss: Loss, z: Tensor) -> None:
    gradient = value_and_grad(loss, z)[1]
    both = [leaf(view) for view in z]
    value = loss(both)
    assert torch.equal(torch.stack(torch.autograd.grad(value, both)), gradient)
    for i in range(V):
        views = [leaf(view) if j == i else view for j, view in enumerate(z)]
        alone = loss(views)
        assert torch.equal(alone, value)
        alone.backward()
        assert torch.equal(views[i].grad, gradient[i])
        assert views[1 - i].grad is None


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 300, 40), (1, 40, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("term", oracles.TERMS, ids=str)
def test_value_is_the_same_without_a_gradient(
    term: oracles.Term, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    loss = term.library(functional, 40)
    z = oracles.embeddings(max(shape[0], term.min_views), *shape[1:], dtype=dtype)
    x = leaf(z)
    value = loss(x)
    assert value.requires_grad
    with torch.no_grad():
        quiet = [loss(x), loss(z)]
    with torch.inference_mode():
        quiet += [loss(z), loss(z.clone())]
    quiet += [loss(x.detach())]
    assert not any(other.requires_grad for other in quiet)
    assert all(torch.equal(other, value.detach()) for other in quiet)


@pytest.mark.parametrize("reentrant", [True, False])
@each_module
def test_activation_checkpointing(
    make: Callable[[], nn.Module], reentrant: bool, z: Tensor
) -> None:
    """Three steps: the recomputation must take each step's slices, and no slices of its own."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh()).double()
    plain, other = make(), make()
    for _ in range(3):
        x, same_x = leaf(z), leaf(z)
        plain(model(x)).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        value = checkpoint(lambda y: other(model(y)), same_x, use_reentrant=reentrant)
        value.backward()
        assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
        assert torch.equal(same_x.grad, x.grad)
        assert all(map(torch.equal, plain.state_dict().values(), other.state_dict().values()))
        model.zero_grad()


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_checkpointed_losses_in_one_step(reentrant: bool, z: Tensor) -> None:
    """One call of each: what the documentation asks for."""
    plain = [SlicedSketchLoss(K, seed=seed) for seed in range(2)]
    others = [SlicedSketchLoss(K, seed=seed) for seed in range(2)]
    for _ in range(2):
        x, same_x = leaf(z), leaf(z)
        (plain[0](x) + plain[1](x.pow(3))).backward()
        value = checkpoint(others[0], same_x, use_reentrant=reentrant)
        (value + checkpoint(others[1], same_x.pow(3), use_reentrant=reentrant)).backward()
        assert error(same_x.grad, x.grad) < 1e-12


@each_loss
def test_saved_tensors_may_be_offloaded(loss: Loss, z: Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(value_and_grad(loss, z)[1], value_and_grad(loss, z)[1])


@each_loss
def test_overwriting_the_input_before_backward(loss: Loss, z: Tensor) -> None:
    """Autograd notices, or the gradient does not depend on it."""
    x = leaf(z)
    inner = x.clone()
    value = loss(inner)
    with torch.no_grad():
        inner.mul_(inner)
    assert right_or_refused(
        lambda: torch.autograd.grad(value, x)[0],
        value_and_grad(loss, z)[1],
        "modified by an inplace operation",
    )


@each_loss
def test_graph_is_freed_without_the_garbage_collector(loss: Loss, z: Tensor) -> None:
    gc.disable()
    inner = leaf(z) * 1
    value = loss(inner)
    alive = weakref.ref(inner)
    del inner, value
    freed = alive() is None
    gc.enable()
    assert freed


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(2, 300, 80), (2, 80, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("term", oracles.TERMS, ids=str)
def test_repeats_are_bitwise_equal(
    term: oracles.Term, dtype: torch.dtype, shape: tuple[int, int, int], threads: int
) -> None:
    """Large enough for several threads and several blocks of slices."""
    loss, z = term.library(functional, 300), oracles.embeddings(*shape, dtype=dtype)
    first = value_and_grad(loss, z)
    for _ in range(3):
        assert all(map(torch.equal, value_and_grad(loss, z), first))
