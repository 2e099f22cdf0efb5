"""Half precision, autocast, loss scaling and non-finite numbers: compute in float32, round once."""

import math
from collections.abc import Callable

import oracles
import pytest
import torch
from oracles import Loss, error, truth, value_and_grad
from torch import Tensor

from vicreg_losses import LeJEPALoss, VICRegLoss, VISRegLoss, functional

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32, torch.float64]

# Fresh losses at each call, so that a sketch draws the same slices every time.
LOSSES: dict[str, Callable[[], Loss]] = {
    **{t.name: lambda t=t: t.library(functional) for t in oracles.TERMS},
    "covariance-gram": lambda: oracles.covariance_term("gram").library(functional),
    "vicreg": VICRegLoss,
    "visreg": lambda: VISRegLoss(num_slices=7),
    "lejepa": lambda: LeJEPALoss(num_slices=7),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def scaled_gradient(loss: Loss, z: Tensor, upstream: float) -> Tensor:
    """Gradient of the loss times `upstream`, as a gradient scaler asks for it."""
    return value_and_grad(lambda leaf: upstream * loss(leaf), z)[1]


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_dtypes(loss: Callable[[], Loss], dtype: torch.dtype) -> None:
    value, gradient = value_and_grad(loss(), oracles.embeddings(2, 9, 5, dtype=dtype))
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype


@each_loss
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 12), (3, 10, 40)], ids=str)
def test_half_is_float32_compute_rounded_once(
    loss: Callable[[], Loss], dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    z = oracles.embeddings(*shape, dtype=dtype)
    value, gradient = value_and_grad(loss(), z)
    wide_value, wide_gradient = value_and_grad(loss(), z.float())
    assert torch.equal(value, wide_value)
    assert torch.equal(gradient, wide_gradient.to(dtype))


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", HALVES, ids=str)
def test_autocast_changes_nothing(
    loss: Callable[[], Loss], dtype: torch.dtype, autocast: torch.dtype
) -> None:
    z = oracles.embeddings(2, 30, 21, dtype=dtype)
    value, gradient = value_and_grad(loss(), z)
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        cast_value = loss()(leaf)
    (cast_gradient,) = torch.autograd.grad(cast_value, leaf)  # outside, as trainers do
    with torch.autocast("cpu", dtype=autocast):
        inside_value, inside_gradient = value_and_grad(loss(), z)
    for other_value, other_gradient in [
        (cast_value, cast_gradient),
        (inside_value, inside_gradient),
    ]:
        assert other_value.dtype == value.dtype
        assert torch.equal(other_value, value)
        assert other_gradient.dtype == gradient.dtype
        assert torch.equal(other_gradient, gradient)


@each_loss
def test_float16_of_spread_300(loss: Callable[[], Loss]) -> None:
    # Squares overflow float16 (65504) many times over. Uncorrelated columns and N = 256 keep the
    # covariance gradient itself, about 4 * 300^3 / sqrt(D) / N^1.5, within its range.
    normal = torch.randn(2, 256, 32, generator=torch.Generator().manual_seed(0))
    z = (300 * normal).half()
    value, gradient = value_and_grad(loss(), z)
    wide_value, wide_gradient = value_and_grad(loss(), z.float())
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert torch.equal(value, wide_value)
    assert torch.equal(gradient, wide_gradient.half())


@each_loss
def test_loss_scaling_saves_small_float16_gradients(loss: Callable[[], Loss]) -> None:
    z = oracles.embeddings(2, 512, 64, dtype=torch.float16) / 16
    scaled = scaled_gradient(loss(), z, 65536.0)
    assert torch.equal(scaled, scaled_gradient(loss(), z.float(), 65536.0).half())
    # One rounding to float16 is all that is lost: at most 2^-11 of each entry.
    assert error(scaled, scaled_gradient(loss(), z.double(), 65536.0)) <= 2.0**-11


def test_without_loss_scaling_they_underflow() -> None:
    # What makes the test above able to fail: a factor applied after the cast finds nothing left.
    z = oracles.embeddings(2, 512, 64, dtype=torch.float16) / 16
    late = 65536 * scaled_gradient(functional.covariance_loss, z, 1.0)
    assert error(late, scaled_gradient(functional.covariance_loss, z.double(), 65536.0)) > 0.5


@each_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 7, 2), (1, 19, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_input_shows_in_value_and_gradient(
    loss: Callable[[], Loss], bad: float, place: tuple[int, int, int], dtype: torch.dtype
) -> None:
    z = oracles.embeddings(2, 20, 9, dtype=dtype)
    z[place] = bad
    value, gradient = value_and_grad(loss(), z)
    assert not value.isfinite()
    assert not gradient.isfinite().all()


@each_loss
@pytest.mark.parametrize("scale", [1e8, 1e10, 1e12, 1e15, 1e19, 1e20, 1e25, 1e37])
@pytest.mark.parametrize("shape", [(2, 20, 9), (2, 9, 20)], ids=str)
def test_overflow_is_never_hidden_from_the_gradient_scaler(
    loss: Callable[[], Loss], scale: float, shape: tuple[int, int, int]
) -> None:
    z = (scale * oracles.embeddings(*shape)).float()
    value, gradient = value_and_grad(loss(), z)
    assert value.isfinite() or not gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1e15, 1e19, 1e20, 1e25, 1e37])
@pytest.mark.parametrize("term", [t for t in oracles.TERMS if t.name != "epps_pulley"], ids=str)
def test_a_finite_value_at_a_huge_scale_is_right(term: oracles.Term, scale: float) -> None:
    # Epps-Pulley cannot be: a float32 angle above 2 pi / U has no direction.
    z = (scale * oracles.embeddings(2, 20, 9)).float()
    value = term.library(functional)(z)
    true_value, _ = truth(term.oracle(), z)
    # 1e-5: float32 rounding of at most 20 x 9 terms; a deviation that overflowed is 100 % wrong.
    assert not value.isfinite() or error(value, true_value) <= 1e-5


def test_huge_scales_do_overflow() -> None:
    # What makes the two tests above able to fail.
    z = (1e25 * oracles.embeddings(2, 20, 9)).float()
    assert not functional.covariance_loss(z).isfinite()
    assert not VICRegLoss()(z).isfinite()


@pytest.mark.parametrize(
    "loss", [VICRegLoss(invariance=1e38), VISRegLoss(num_slices=4, center=1e38)], ids=repr
)
def test_weighted_sum_that_overflows_has_no_finite_gradient(loss: torch.nn.Module) -> None:
    """Finite terms whose sum is not: each of their own gradients would be finite."""
    z = (10 * torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)) + 30).float()
    z.requires_grad_()
    terms = loss.terms(z)
    assert all(term.isfinite() for term in terms)
    value = loss.total(terms)
    value.backward()
    assert not value.isfinite()
    assert not z.grad.isfinite().any()
