"""Triton kernels of the variance, centre and covariance terms against float64, at tiny sizes.

On a CPU they run in Triton's interpreter (conftest asks for it), on a CUDA device as they are.
"""

import math
from collections.abc import Iterator

import oracles
import pytest
import torch
from oracles import Loss, Term, error, float32_errors, truth, value_and_grad
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from vicreg_losses import CovarianceLoss, VICRegLoss, functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]

TERMS = [t for t in oracles.ALL_TERMS if t.function in ("variance_loss", "center_loss")]
COVARIANCES = [t for t in oracles.ALL_TERMS if t.function == "covariance_loss"]
SHAPES = [(1, 2, 1), (1, 2, 3), (2, 9, 5), (3, 10, 40), (1, 64, 64), (2, 65, 63), (1, 63, 129)]
# The interpreter computes with numpy.
numpy_may_warn = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def kernels(term: Term) -> Loss:
    """The public function by its kernels."""
    return term.library(functional, impl="triton")


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def data(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return oracles.embeddings(*shape, seed=seed, dtype=dtype).to(DEVICE)


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of storing a number in a dtype.

    Half a unit in the last place; but the interpreter cuts off what bfloat16 does not hold.
    """
    truncated = dtype == torch.bfloat16 and DEVICE == "cpu"
    return torch.finfo(dtype).eps * (1 if truncated else 0.5)


@pytest.mark.parametrize("term", TERMS, ids=str)
@each_dtype
@each_shape
def test_single_columns(term: Term, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    z = data(shape, dtype)
    value, gradient = value_and_grad(kernels(term), z)
    true_value, true_gradient = truth(term.oracle(), z)
    plain_value, plain_gradient = float32_errors(term.oracle(), z.float())
    assert value.shape == () and value.dtype == torch.float32 and gradient.dtype == dtype  # noqa: PT018
    # Plain PyTorch's own error in float32, or eight roundings of it, and the storage of the result.
    least = 8 * rounding(torch.float32)
    assert error(value, true_value) <= max(2 * plain_value, least)
    stored = rounding(dtype) if dtype in HALVES else 0
    assert error(gradient, true_gradient) <= max(2 * plain_gradient, least) + stored


def off_diagonal_share(z: Tensor) -> float:
    """Of the squares of the covariances, those off the diagonal: what the Gram form keeps."""
    x = z.double() - z.double().mean(1, keepdim=True)
    everything = (x @ x.mT).square().sum()
    return ((everything - x.square().sum(1).square().sum()) / everything).item()


@pytest.mark.parametrize("term", COVARIANCES, ids=str)
@each_dtype
@each_shape
def test_covariance(
    term: Term, dtype: torch.dtype, shape: tuple[int, int, int], precision: str
) -> None:
    z = data(shape, dtype)
    value, gradient = value_and_grad(kernels(term), z)
    true_value, true_gradient = truth(term.oracle(), z)
    assert gradient.dtype == dtype
    parts = 2 if dtype == torch.float32 and precision == "highest" else 1
    # An operand of one part is rounded to 11 bits, of two to 22. The value is a form of degree 4 in
    # the operand, its gradient of degree 3 with one more rounding of the inner product; and the
    # Gram form takes the diagonal off, which leaves the share of the rest.
    operand = 2.0 ** (-11 * parts)
    gram = "gram" in term.name or ("auto" in term.name and shape[1] < shape[2])
    share = off_diagonal_share(z) if gram else 1.0
    if shape[2] == 1:  # the covariance of one dimension is 0; compared with the diagonal instead
        diagonal = z.double().var(1).square().mean().item()
        assert value.item() <= 4 * operand * diagonal
        return
    plain_value, plain_gradient = float32_errors(term.oracle(), z.float())
    assert error(value, true_value) <= max(2 * plain_value, 4 * operand / share)
    stored = rounding(dtype) if dtype in HALVES else 0
    assert error(gradient, true_gradient) <= max(2 * plain_gradient, 4 * operand / share) + stored


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e3, 1e8])
@pytest.mark.parametrize("shape", [(2, 20, 9), (2, 9, 20)], ids=str)
def test_scale_is_only_an_exponent(scale: float, shape: tuple[int, int, int]) -> None:
    """Powers of two in, powers of two out: not a bit changes while all is in float32's range."""
    factor = 2.0 ** round(math.log2(scale))
    z = data(shape, torch.float32)
    plain = value_and_grad(kernels(COVARIANCES[0]), z)
    scaled = value_and_grad(kernels(COVARIANCES[0]), factor * z)
    for actual, expected, degree in zip(scaled, plain, (4, 3), strict=True):
        wide = expected.double() * factor**degree
        assert torch.equal(actual, wide.float()) or wide.abs().max() < 1e-36


@pytest.mark.parametrize("shape", [(1, 200, 260), (1, 30, 260)], ids=str)
def test_gram_form_of_dominant_columns(shape: tuple[int, int, int], precision: str) -> None:
    """The diagonal is nearly all, and what is taken off must be what was put in."""
    spread = torch.arange(1, shape[2] + 1, dtype=torch.float64) ** -1
    z = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).double() * spread).float()
    z = z.to(DEVICE)
    assert off_diagonal_share(z) < 0.1
    loss = kernels(oracles.covariance_term("gram"))
    value, gradient = value_and_grad(loss, z)
    true_value, true_gradient = truth(oracles.covariance, z)
    # The loss at a point that is an operand's rounding away; float32 sums divide by the share.
    operand = 2.0 ** (-11 * (2 if precision == "highest" else 1))
    sums = 4 * 2.0**-24 * math.sqrt(shape[2]) / off_diagonal_share(z)
    assert error(value, true_value) <= 4 * operand + sums
    assert error(gradient, true_gradient) <= 4 * operand + sums


def test_views_with_a_lazy_sign() -> None:
    """PyTorch may keep a minus sign beside the memory, which is what a kernel reads."""
    z = torch.randn(12, 20, dtype=torch.cfloat, device=DEVICE).conj().imag.detach()
    assert z.is_neg()
    for term in (TERMS[0], TERMS[-1], COVARIANCES[0]):
        expected = value_and_grad(kernels(term), z.clone())
        for actual, other in zip(value_and_grad(kernels(term), z), expected, strict=True):
            assert torch.equal(actual, other)


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("term", [*TERMS, *COVARIANCES], ids=str)
def test_offsets(term: Term, offset: float) -> None:
    z = data((2, 100, 12), torch.float32) + offset
    value, gradient = value_and_grad(kernels(term), z)
    true_value, true_gradient = truth(term.oracle(), z)
    assert error(value, true_value) <= 2e-6  # z is what it is: no bit of it is lost by centring
    assert error(gradient, true_gradient) <= 4e-6


def adversarial(samples: int) -> dict[str, Tensor]:
    """Batches that a single pass about a fixed pivot gets wrong."""
    z = oracles.embeddings(1, samples, 6, dtype=torch.float32)
    outlier, sorted_, blocks = z.clone(), z.clone(), z.clone()
    outlier[:, 0] += 300.0  # in the row that the pivot starts from
    sorted_ = sorted_.sort(1).values * 100
    blocks[:, : samples // 2] += 1e4
    return {"outlier": outlier, "sorted": sorted_, "blocks": blocks}


@pytest.mark.parametrize("name", adversarial(2))
@pytest.mark.parametrize("samples", [40, 300])
@pytest.mark.parametrize("term", [TERMS[0], TERMS[1], *COVARIANCES], ids=str)
def test_statistics_of_awkward_batches(name: str, samples: int, term: Term) -> None:
    z = adversarial(samples)[name].to(DEVICE)
    value, gradient = value_and_grad(kernels(term), z)
    true_value, true_gradient = truth(term.oracle(), z)
    # The rounding of z - pivot, at most sqrt(N / 16) spreads away, is 2^-24 of it; over four.
    bound = 4 * 2.0**-24 * max(4.0, math.sqrt(samples / 16)) + 2.0**-20
    bound /= off_diagonal_share(z) if "gram" in term.name else 1
    assert error(value, true_value, 1e-12) <= bound
    assert error(gradient, true_gradient, 1e-12) <= bound


@each_dtype
@pytest.mark.parametrize("shape", [(2, 20, 9), (2, 9, 20), (1, 130, 3)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 0.3, 1e3 + 1 / 3])
def test_exact_collapse_is_exact(
    dtype: torch.dtype, shape: tuple[int, int, int], offset: float, precision: str
) -> None:
    z = torch.full(shape, offset, device=DEVICE).to(dtype)
    for term in [*TERMS, *COVARIANCES]:
        value, gradient = value_and_grad(kernels(term), z)
        if term.function != "center_loss":
            assert gradient.count_nonzero() == 0
        if term.function == "covariance_loss":
            assert value == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 7, 2), (1, 19, 8)], ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 9), (2, 20, 37)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@numpy_may_warn
def test_non_finite_input_shows_in_value_and_gradient(
    bad: float, place: tuple[int, int, int], shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    z = data(shape, dtype)
    z[place] = bad
    for term in [*TERMS, *COVARIANCES]:
        value, gradient = value_and_grad(kernels(term), z)
        assert not value.isfinite()
        assert not gradient.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@numpy_may_warn
def test_non_finite_input_shows_where_the_covariance_is_nothing(bad: float) -> None:
    """Of one dimension only the diagonal is there, and that is left out."""
    z = data((2, 20, 1), torch.float32)
    z[1, 3, 0] = bad
    value, gradient = value_and_grad(kernels(COVARIANCES[0]), z)
    assert not value.isfinite()
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e8, 1e10, 1e12, 1e15, 1e19, 1e20, 1e25, 1e37])
@pytest.mark.parametrize("shape", [(2, 20, 9), (2, 9, 20)], ids=str)
@numpy_may_warn
def test_overflow_is_never_hidden(scale: float, shape: tuple[int, int, int]) -> None:
    z = (scale * oracles.embeddings(*shape)).float().to(DEVICE)
    for term in [*TERMS, *COVARIANCES]:
        value, gradient = value_and_grad(kernels(term), z)
        true_value, _ = truth(term.oracle(), z)
        assert value.isfinite() or not gradient.isfinite().all()
        assert not value.isfinite() or error(value, true_value) <= 1e-5


@each_dtype
def test_strides(dtype: torch.dtype) -> None:
    wide = data((3, 41, 30), dtype)
    for z in (
        wide.mT.contiguous().mT,
        wide[:, ::2, 1:],
        wide[1:, :, ::3],
        wide.transpose(0, 1).contiguous().transpose(0, 1),
        wide[:1].expand(3, -1, -1),
        wide[:, :, :1].expand(-1, -1, 4),
    ):
        for loss in (CovarianceLoss(impl="triton"), kernels(TERMS[0]), kernels(TERMS[-1])):
            value, gradient = value_and_grad(loss, z)
            other, other_gradient = value_and_grad(loss, z.contiguous())
            assert torch.equal(value, other)
            assert torch.equal(gradient, other_gradient)


@pytest.mark.skipif(DEVICE != "cpu", reason="the pages of the operating system serve here")
def test_input_beyond_two_billion_elements() -> None:
    """Rows 2^30 elements apart in memory of which only the touched pages exist."""
    import numpy as np

    memory = torch.from_numpy(np.zeros(4 * 2**30 + 64, dtype=np.float16))
    z = memory.as_strided((1, 5, 7), (0, 2**30, 1))
    z.copy_(oracles.embeddings(1, 5, 7, dtype=torch.float16))
    for loss in (kernels(COVARIANCES[0]), kernels(TERMS[0])):
        far, near = value_and_grad(loss, z), value_and_grad(loss, z.clone())
        assert torch.equal(far[0], near[0])
        assert torch.equal(far[1], near[1])


@pytest.mark.parametrize("dtypes", [HALVES, [torch.float16, torch.float32]], ids=str)
def test_views_of_mixed_dtypes(dtypes: list[torch.dtype]) -> None:
    one, other = data((2, 20, 30), torch.float32).unbind(0)
    views = [one.to(dtypes[0]).requires_grad_(), other.to(dtypes[1]).requires_grad_()]
    loss = VICRegLoss(impl="triton")
    loss(*views).backward()
    wide = [view.detach().double().requires_grad_() for view in views]
    VICRegLoss()(*wide).backward()
    for view, exact in zip(views, wide, strict=True):
        assert view.grad.dtype == view.dtype
        assert error(view.grad, exact.grad) <= 4 * 2.0**-11 + rounding(view.dtype)


@pytest.mark.parametrize("which", range(2))
def test_one_view_alone_may_require_a_gradient(which: int) -> None:
    views = [*data((2, 12, 20), torch.float32).unbind(0)]
    views[which].requires_grad_()
    VICRegLoss(impl="triton")(*views).backward()
    assert views[1 - which].grad is None
    exact = [view.detach().double() for view in views]
    exact[which].requires_grad_()
    VICRegLoss()(*exact).backward()
    assert error(views[which].grad, exact[which].grad) <= 2e-6


@pytest.mark.parametrize("coefficients", [(1, 0), (0, 1), (2, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 20), (2, 20, 12)], ids=str)
def test_upstream_gradients(coefficients: tuple[float, float], shape: tuple[int, int, int]) -> None:
    """Each alone, both, and none: other kernels finish the gradient in each case."""
    z = data(shape, torch.float32).requires_grad_()
    exact = z.detach().double().requires_grad_()
    for leaf, impl in ((z, "triton"), (exact, "torch")):
        terms = VICRegLoss(impl=impl).terms(leaf)
        wanted = zip(coefficients, (terms.variance, terms.covariance), strict=True)
        total = sum((c * term for c, term in wanted if c), 0 * terms.invariance)
        total.backward()
    assert error(z.grad, exact.grad) <= 2e-6


def test_scaled_loss_keeps_small_float16_gradients() -> None:
    z = data((2, 128, 64), torch.float16) / 16
    (scaled,) = torch.autograd.grad(
        65536 * functional.covariance_loss(z.requires_grad_(), impl="triton"), z
    )
    exact = z.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(65536 * functional.covariance_loss(exact), exact)
    assert error(scaled, true) <= 4 * 2.0**-11 + rounding(torch.float16)


def test_second_derivatives_are_refused() -> None:
    z = data((1, 12, 20), torch.float32).requires_grad_()
    value = functional.covariance_loss(z, impl="triton")
    (gradient,) = torch.autograd.grad(value, z, create_graph=True)
    with pytest.raises(RuntimeError, match="second one"):
        gradient.sum().backward()


def test_no_gradient_keeps_nothing() -> None:
    z = data((2, 12, 20), torch.float32)
    value = functional.covariance_loss(z, impl="triton")
    assert not value.requires_grad
    assert torch.equal(value, functional.covariance_loss(z.requires_grad_(), impl="triton"))
