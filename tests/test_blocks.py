"""Inputs that are worked on in several blocks, against the oracle."""

import math
from collections.abc import Callable
from functools import partial

import oracles
import pytest
import torch
from torch import Tensor

from vicreg_losses import (
    LeJEPALoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    _deviations,
    _epps_pulley,
    _torch,
    functional,
)
from vicreg_losses.distributed import batch_statistics


def value_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    x = z.detach().clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def assert_same(ours: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor], z: Tensor):
    (value, gradient), (true_value, true_gradient) = (
        value_and_gradient(f, z) for f in (ours, truth)
    )
    assert abs(value - true_value) <= 1e-10 * abs(true_value)
    assert (gradient - true_gradient).norm() <= 1e-10 * true_gradient.norm()


@pytest.mark.parametrize("strategy", ["gram", "feature"])
@pytest.mark.parametrize("shape", [(1, 300, 290), (2, 260, 520), (2, 530, 259)])
def test_triangle_of_blocks(shape: tuple[int, int, int], strategy: str) -> None:
    """From 256 on the symmetric product is made of block rows."""
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z + 0.5 * z.roll(1, -1) + 2

    def truth(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for view in x:
            centered = view - view.mean(0)
            c = centered.T @ centered / (len(view) - 1)
            total = total + (c - c.diagonal().diag()).square().sum() / view.shape[1]
        return total / len(x)

    assert_same(lambda x: functional.covariance_loss(x, strategy=strategy), truth, z)


@pytest.mark.parametrize("statistic", ["wasserstein", "epps_pulley"])
def test_chunks_of_slices(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 slices at a time, and a few rows of harmonics, instead of all."""
    monkeypatch.setattr(_torch, "_CPU_CHUNK", 1)
    monkeypatch.setattr(_epps_pulley, "_CPU_GRAIN", 100)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 45, 12, dtype=torch.float64, generator=generator)
    w = torch.randn(12, 50, dtype=torch.float64, generator=generator)
    w = w / w.norm(dim=0)
    oracle = getattr(oracles, {"wasserstein": "sliced_wasserstein"}.get(statistic, statistic))
    assert_same(
        lambda x: functional.sliced_sketch_loss(x, directions=w, statistic=statistic),
        lambda x: oracle(x, w),
        z,
    )


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are worked on three samples at a time."""
    monkeypatch.setattr(_deviations, "_WHOLE", 0)
    monkeypatch.setattr(_deviations, "_ROWS", 3 * 12)
    monkeypatch.setattr(_torch, "_WIDENED", 20)
    monkeypatch.setattr(_torch, "_ENERGY", 7)


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e-30, 3e18, 1e30])
def test_energy_beyond_the_range_of_float32(scale: float) -> None:
    """Squares that are too large or too small for float32 count all the same.

    Each of the sums of 256 squares in float32 is wrong by some half ulps, in either direction; of
    300 of them the mean by less than four.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(301, 257, generator=generator, dtype=torch.float64).mul(scale).float()
    for part in (x, x.T, x[:, 1:]):
        truth = part.double().square().sum()
        assert abs(_torch.energy(part) - truth) <= 4 * 2.0**-24 * truth


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_energy_of_what_is_not_finite(bad: float) -> None:
    x = torch.ones(40_000)
    x[1234] = bad
    assert not _torch.energy(x).isfinite()


def test_energy_of_one_large_number() -> None:
    """Its neighbours' squares are lost beside it, as they are in the truth."""
    x = torch.full((40_000,), 1e-3)
    x[777] = 1e4
    assert abs(_torch.energy(x) - (1e8 + 39_999e-6)) <= 1e-7 * 1e8


W = oracles.unit_directions(12, 9).double()
LOSSES: dict[str, tuple[oracles.Loss, oracles.Loss]] = {
    **{
        str(term): (term.library(functional), term.oracle())
        for term in oracles.ALL_TERMS
        if term.min_views <= 3
    },
    "vicreg": (VICRegLoss(), oracles.vicreg),
    "visreg": (
        lambda z: VISRegLoss(num_global=2)(z, directions=W),
        lambda z: oracles.visreg(z, W, num_global=2),
    ),
    "lejepa": (
        lambda z: LeJEPALoss(num_global=1)(z, directions=W),
        lambda z: oracles.lejepa(z, W, num_global=1),
    ),
}


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("samples", [2, 3, 19, 21])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_samples(name: str, samples: int) -> None:
    ours, truth = LOSSES[name]
    z = oracles.embeddings(3, samples, 12, seed=samples)
    assert_same(ours, truth, z)
    with torch.no_grad():
        assert torch.equal(ours(z.requires_grad_()), ours(z.detach()))


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", ["vicreg", "variance-hinge", "center", "invariance-center"])
def test_rows_in_float32(name: str) -> None:
    """Twice plain PyTorch's error, and four roundings of the result."""
    ours, truth = LOSSES[name]
    z = oracles.embeddings(3, 300, 12, dtype=torch.float32)
    (value, gradient), (true_value, true_gradient) = (
        oracles.value_and_grad(ours, z),
        oracles.truth(truth, z),
    )
    plain_value, plain_gradient = oracles.float32_errors(truth, z)
    assert oracles.error(value, true_value) <= 2 * plain_value + 4 * 2.0**-24
    assert oracles.error(gradient, true_gradient) <= 2 * plain_gradient + 4 * 2.0**-24


def test_many_views_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch has blocks of its own for each view, if only one for each."""
    monkeypatch.setattr(_deviations, "_WHOLE", 0)
    ours, truth = LOSSES["vicreg"]
    assert_same(ours, truth, oracles.embeddings(5, 7, 12))


@pytest.mark.usefixtures("few_rows")
def test_batched_gradient_of_one_of_two_terms() -> None:
    """The other's is not batched, so nothing can be added to it in place."""
    z = oracles.embeddings(2, 20, 12).requires_grad_()
    terms = VICRegLoss().terms(z)
    one = torch.ones((), dtype=torch.float64)

    def gradient(upstream: Tensor) -> Tensor:
        both = [terms.invariance, terms.variance]
        return torch.autograd.grad(both, z, [upstream, one], retain_graph=True)[0]

    upstream = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = torch.func.vmap(gradient)(upstream)
    for each, number in zip(found, upstream, strict=True):
        assert (each - gradient(number)).norm() <= 1e-12 * each.norm()


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_a_list(name: str) -> None:
    """Strided views, each a leaf of its own."""
    ours = LOSSES[name][0]
    z = oracles.embeddings(3, 19, 12)
    if name not in ("vicreg", "visreg", "lejepa"):
        function = {str(term): term for term in oracles.ALL_TERMS}[name]
        options = {"directions": W} if function.sketch else {}
        ours = partial(getattr(functional, function.function), **function.options, **options)
    leaves = [view.T.contiguous().T.requires_grad_() for view in z]
    gradients = torch.autograd.grad(ours(leaves), leaves)
    (whole,) = torch.autograd.grad(ours(z.requires_grad_()), z)
    assert (torch.stack(gradients) - whole).norm() <= 1e-12 * whole.norm()


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", ["vicreg", "variance-hinge", "invariance-center"])
def test_rows_of_two_views_in_16_bits(name: str) -> None:
    """The sum of a row's gradients is rounded once: half an ulp of float16 is 2^-11."""
    ours, truth = LOSSES[name]
    z = oracles.embeddings(2, 20, 12).half()
    _, gradient = value_and_gradient(ours, z)
    _, true_gradient = value_and_gradient(truth, z.double())
    assert gradient.dtype == torch.float16
    assert (gradient - true_gradient).norm() <= 2**-10 * true_gradient.norm()


@pytest.mark.usefixtures("few_rows")
def test_rows_at_a_large_offset() -> None:
    """Multiples of 1/8 stay what they are beside 2^20; a constant column has no gradient."""
    z = (8 * oracles.embeddings(1, 100, 12)).round() / 8
    z[..., 0] = 0.125
    for form in ("hinge", "squared"):
        value, gradient = value_and_gradient(VarianceLoss(form=form), (z + 2.0**20).float())
        truth = partial(oracles.variance, form=form)
        true_value, true_gradient = value_and_gradient(truth, z)
        assert gradient[..., 0].count_nonzero() == 0
        assert abs(value - true_value) <= 1e-6 * true_value
        assert (gradient - true_gradient).norm() <= 1e-6 * true_gradient.norm()


@pytest.mark.usefixtures("few_rows")
def test_second_derivative_by_rows_is_an_error() -> None:
    z = oracles.embeddings(2, 20, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(VICRegLoss()(z) + z.pow(3).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("few_rows")
def test_statistics_of_rows() -> None:
    z = oracles.embeddings(2, 20, 12)
    found = batch_statistics(z)
    assert (found.mean - z.mean(1)).abs().max() <= 1e-12
    assert (found.variance - z.var(1)).abs().max() <= 1e-12


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("name", ["variance-squared", "center", "invariance-pairwise", "vicreg"])
def test_batched_upstream_gradients(name: str) -> None:
    """What ``torch.func.vmap`` does to a backward pass: no memory can be written to."""
    ours, truth = LOSSES[name]
    z = oracles.embeddings(2, 20, 12).requires_grad_()
    upstream = torch.tensor([1.0, -3.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(ours(z), z, upstream, is_grads_batched=True)
    (once,) = torch.autograd.grad(truth(z), z)
    assert (found - upstream.view(-1, 1, 1, 1) * once).norm() <= 1e-9 * once.norm()
