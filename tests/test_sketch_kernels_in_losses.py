"""The sketch's kernels as trainers meet them: in composites, with what embeddings may be."""

import math
from collections.abc import Callable

import oracles
import pytest
import torch
from oracles import error, value_and_grad
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

from vicreg_losses import LeJEPALoss, SlicedSketchLoss, VISRegLoss, _fused, _slices, functional
from vicreg_losses.kernels import directions as kernel_directions
from vicreg_losses.kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SKETCHES = [t for t in oracles.TERMS if t.sketch]
D = 7
# The interpreter computes with numpy.
numpy_may_warn = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:invalid value:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
)
LOSSES: dict[str, Callable[[str], nn.Module]] = {
    "VISRegLoss": lambda impl: VISRegLoss(num_slices=3, impl=impl),
    "LeJEPALoss": lambda impl: LeJEPALoss(num_slices=3, impl=impl),
    "wasserstein": lambda impl: SlicedSketchLoss(3, impl=impl),
    "epps_pulley": lambda impl: SlicedSketchLoss(3, "epps_pulley", impl=impl),
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
each_sketch = pytest.mark.parametrize("term", SKETCHES, ids=str)


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Far from normal along every direction, so that no rank hangs on a rounding."""
    generator = torch.Generator().manual_seed(5)
    z = torch.rand(shape, generator=generator, dtype=torch.float64).pow(-0.4)
    return (z + z[..., :1]).to(DEVICE, dtype)


@each_loss
def test_same_slices_as_plain_pytorch(make: Callable[[str], nn.Module]) -> None:
    """Step after step, in the value and in the gradient."""
    z, loss, plain = data((2, 12, D)), make("triton").to(DEVICE), make("torch").to(DEVICE)
    seen = set()
    for _ in range(3):
        pair = value_and_grad(loss, z), value_and_grad(plain, z)
        assert error(pair[0][0], pair[1][0]) <= 2e-6
        assert error(pair[0][1], pair[1][1]) <= 4e-6
        seen.add(pair[0][0].item())
    assert len(seen) == 3
    assert loss.state_dict() == plain.state_dict()


@pytest.mark.parametrize("shape", [(3, 12, D), (2, 5, 70)], ids=str)
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 5), (0, 0, 0)], ids=str)
def test_upstream_gradients(wanted: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    """Each regularizer alone, all, and none: what finishes the gradient differs."""
    z = data(shape).requires_grad_()
    exact = z.detach().double().requires_grad_()
    w = oracles.unit_directions(shape[2], 3).to(DEVICE)
    for leaf, impl in ((z, "triton"), (exact, "torch")):
        terms = VISRegLoss(impl=impl).terms(leaf, directions=w.to(leaf.dtype))
        pairs = zip(wanted, (terms.scale, terms.shape, terms.center), strict=True)
        sum((c * term for c, term in pairs if c), 0 * terms.invariance).backward()
    assert error(z.grad, exact.grad) <= 4e-6


def test_embeddings_of_16_bits_have_operands_of_16_bits() -> None:
    """Composites compute in float32, but what came in 16 bits needs no more in a kernel."""
    z = data((2, 40, D), torch.bfloat16)
    w = oracles.unit_directions(D, 3).to(DEVICE)
    narrow = VISRegLoss(impl="triton").terms(z, directions=w).shape
    alone = functional.sliced_sketch_loss(z, directions=w, impl="triton")
    assert torch.equal(narrow, alone)
    wide = VISRegLoss(impl="triton").terms(z.float(), directions=w).shape
    assert not torch.equal(narrow, wide)
    assert error(narrow, wide) <= 2.0**-9


@pytest.mark.parametrize("which", range(2))
def test_one_view_alone_may_require_a_gradient(which: int) -> None:
    views = [*data((2, 12, D)).unbind(0)]
    views[which].requires_grad_()
    w = oracles.unit_directions(D, 3).to(DEVICE)
    VISRegLoss(impl="triton")(*views, directions=w).backward()
    assert views[1 - which].grad is None
    exact = [view.detach().double() for view in views]
    exact[which].requires_grad_()
    VISRegLoss()(*exact, directions=w.double()).backward()
    assert error(views[which].grad, exact[which].grad) <= 4e-6


@each_sketch
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_offsets(term: oracles.Term, offset: float) -> None:
    """Wasserstein forgets the mean; waves of large angles keep what float32 has of the angle."""
    z = data((2, 33, D)) + offset
    value, gradient = value_and_grad(term.library(functional, 3, impl="triton"), z)
    expected = oracles.truth(term.oracle(3), z)
    if term.name == "wasserstein":
        assert error(value, expected[0]) <= 4e-6
        assert error(gradient, expected[1]) <= 8e-6
        return
    plain = oracles.float32_errors(term.oracle(3), z)
    assert error(value, expected[0]) <= max(2 * plain[0], 1e-4)
    assert error(gradient, expected[1]) <= max(2 * plain[1], 1e-4)


@each_sketch
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 19, D - 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@numpy_may_warn
def test_non_finite_input_shows_in_value_and_gradient(
    term: oracles.Term, bad: float, place: tuple[int, int, int], dtype: torch.dtype
) -> None:
    z = data((2, 20, D), dtype)
    z[place] = bad
    value, gradient = value_and_grad(term.library(functional, 3, impl="triton"), z)
    assert not value.isfinite()
    assert not gradient.isfinite().all()


@each_sketch
@pytest.mark.parametrize("scale", [1e8, 1e15, 1e19, 1e20, 1e30, 1e37])
@numpy_may_warn
def test_overflow_is_never_hidden(term: oracles.Term, scale: float) -> None:
    z = scale * data((2, 20, D))
    value, gradient = value_and_grad(term.library(functional, 3, impl="triton"), z)
    assert value.isfinite() or not gradient.isfinite().all()
    if term.name == "wasserstein" and value.isfinite():
        assert error(value, oracles.truth(term.oracle(3), z)[0]) <= 4e-6


@each_sketch
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9, 1e-20, 0.0])
@pytest.mark.parametrize("offset", [0.0, 1 / 3])
def test_collapse_is_finite(term: oracles.Term, scale: float, offset: float) -> None:
    z = scale * data((2, 20, D)) + offset
    value, gradient = value_and_grad(term.library(functional, 3, impl="triton"), z)
    expected = value_and_grad(term.library(functional, 3, impl="torch"), z)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert error(value, expected[0]) <= 1e-5
    if scale == 0 and term.name == "wasserstein":  # of equal samples only the sum is determined
        assert gradient.any()
        assert (gradient.sum(1).norm() <= 1e-5 * gradient.norm()).all()
    elif scale >= 1e-6:
        assert error(gradient, expected[1]) <= 1e-4


@pytest.mark.parametrize("t_max", [1e-20, 1e-3, 30.0, 1e4])
def test_extreme_knots(t_max: float) -> None:
    """Weights that vanish are no division by 0."""
    z = data((1, 20, D))
    term = oracles.sketch_term("extreme", "epps_pulley", t_max=t_max, knots=5)
    actual = value_and_grad(term.library(functional, 3, impl="triton"), z)
    expected = value_and_grad(term.library(functional, 3, impl="torch"), z)
    for one, other in zip(actual, expected, strict=True):
        assert one.isfinite().all()
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-12 * z.norm()


@each_sketch
def test_strides(term: oracles.Term) -> None:
    wide = data((3, 13, 2 * D))
    loss = term.library(functional, 2, impl="triton")
    for z in (
        wide.mT.contiguous().mT,
        wide[:, ::2, 1:],
        wide.transpose(0, 1).contiguous().transpose(0, 1),
        wide[:1].expand(3, -1, -1),
        torch.complex(wide, wide).conj().imag,
    ):
        expected = value_and_grad(loss, z.clone().contiguous())
        assert all(map(torch.equal, value_and_grad(loss, z), expected))


def test_directions_of_any_strides() -> None:
    z, w = data((1, 13, D)), oracles.unit_directions(D, 4).to(DEVICE)
    for term in SKETCHES:
        loss = lambda x, w, s=term.options["statistic"]: functional.sliced_sketch_loss(  # noqa: E731
            x, directions=w, statistic=s, impl="triton"
        )
        expected = loss(z, w)
        negative = torch.complex(w, -w).conj().imag
        for other in (w.T.contiguous().T, torch.stack([w, w], 2)[..., 0], negative):
            assert torch.equal(loss(z, other), expected)


@pytest.mark.parametrize("term", SKETCHES, ids=str)
def test_keeping_nothing_gives_the_same_value(term: oracles.Term) -> None:
    z = data((2, 12, D))
    loss = term.library(functional, 3, impl="triton")
    value = loss(z)
    assert not value.requires_grad
    assert torch.equal(value, loss(z.requires_grad_()))


@each_sketch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(term: oracles.Term, dtype: torch.dtype) -> None:
    z = data((2, 12, D))
    loss = term.library(functional, 3, impl="triton")
    expected = value_and_grad(loss, z)
    with torch.autocast(DEVICE, dtype):
        assert all(map(torch.equal, value_and_grad(loss, z), expected))


def test_second_derivatives_are_refused() -> None:
    z = data((1, 12, D)).requires_grad_()
    value = functional.sliced_sketch_loss(z, num_slices=2, generator_seed=0, impl="triton")
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    with pytest.raises(RuntimeError, match="second one"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (9, 6), (130, 5), (301, 2)], ids=str)
@numpy_may_warn
def test_draw(shape: tuple[int, int]) -> None:
    """The kernel's numbers are those of plain PyTorch on an accelerator, to float32's rounding."""
    seed, step = torch.tensor(7, device=DEVICE), torch.tensor(11, device=DEVICE)
    drawn = kernel_directions.draw(seed, step, -2, *shape)
    assert drawn.shape == shape
    key = _slices._key(seed, step - 2)
    normal = _slices.counter_normal(key, *shape).T.double()
    assert (drawn - normal / normal.norm(dim=0)).abs().max() <= 2e-6
    assert (drawn.double().norm(dim=0) - 1).abs().max() <= 1e-6
    assert not torch.equal(drawn, kernel_directions.draw(seed, step, -1, *shape)) or shape == (1, 1)


def test_constants_are_made_once() -> None:
    z = data((1, 12, D))
    loss = SKETCHES[0].library(functional, 2, impl="triton")
    _fused._CONSTANTS.clear()
    loss(z)
    first = dict(_fused._CONSTANTS)
    with torch.inference_mode():
        loss(z)
    assert {k: id(v) for k, v in first.items()} == {k: id(v) for k, v in _fused._CONSTANTS.items()}
    for samples in range(2, 2 + 2 * _fused._MOST_CONSTANTS):
        request = _fused.Request(sketch="wasserstein", parts=1)
        _fused._statistic(request, samples, torch.device(DEVICE))
    assert len(_fused._CONSTANTS) == _fused._MOST_CONSTANTS
    # A captured graph may read them for ever.
    assert all(_fused._CONSTANTS[key] is value for key, value in first.items())


def test_visreg_takes_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, directions, a product of the library's, sort, mean; backward one product."""
    names, call = [], launch.call

    def record(kernel: object, *args: object, **options: object) -> None:
        names.append(kernel.fn.__name__.strip("_").removesuffix("_kernel"))
        call(kernel, *args, **options)

    monkeypatch.setattr(launch, "call", record)
    terms = VISRegLoss(num_slices=3, impl="triton").terms(data((2, 12, D)).requires_grad_())
    assert names == ["moments", "center", "operand", "sort", "mean"]
    (terms.scale + terms.shape + terms.center).backward()
    assert names[5:] == ["sketch_gradient"]
