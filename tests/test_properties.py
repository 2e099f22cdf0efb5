"""What must hold for every shape, layout, offset, scale and degeneracy, searched by Hypothesis."""

import math

import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import Term, error, float32_errors, truth, unit_directions, value_and_grad
from torch import Tensor

from vicreg_losses import functional

TERMS = {term.name: term for term in oracles.TERMS}
CENTERED = ["variance-hinge", "variance-squared", "covariance-auto", "wasserstein"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# As in test_values: float64 orders of evaluation differ by far less, wrong coefficients by far
# more; and what vanishes in exact arithmetic is compared with this, of inputs of order 1.
FLOAT64, VANISHING = 1e-10, 1e-3
# Half an ulp of float32, and the accuracy asked of float32 whatever the offset or scale: 16 U.
U, FLOAT32 = 2.0**-24, 1e-6
K = 5

# Identical samples may by chance be of length 1.
pytestmark = pytest.mark.filterwarnings("ignore:.*have length 1:UserWarning")
each_term = pytest.mark.parametrize("term", oracles.TERMS, ids=str)
examples = settings(max_examples=40)


@st.composite
def shapes(draw: st.DrawFn, min_d: int = 1, max_n: int = 40) -> tuple[int, int, int]:
    """(V, N, D) with every edge: one view, two samples, one dimension, N on both sides of D."""
    v, n, d = st.integers(1, 8), st.integers(2, max_n), st.integers(min_d, 40)
    return draw(v), draw(n), draw(d)


@st.composite
def inputs(
    draw: st.DrawFn, term: Term, min_d: int = 1, kinds: tuple[str, ...] = ("normal",)
) -> Tensor:
    """Float64 embeddings holding float32 numbers, of one of several kinds."""
    v, n, d = draw(shapes(min_d))
    v = max(v, term.min_views)
    z = oracles.embeddings(v, n, d, seed=draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(kinds))
    if kind == "heavy-tailed":  # Cauchy
        z = torch.tan(1.5 * torch.erf(z))
    elif kind == "rank-one":
        z = z[:, :, :1] * torch.linspace(-1, 2, d, dtype=z.dtype)
    elif kind == "duplicated-columns":
        z = z[:, :, torch.arange(d) // 2]
    elif kind == "constant-columns":
        z = torch.where(torch.arange(d) % 2 == 0, z, 0.5)
    return z.float().double()


def assert_close(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = FLOAT64
) -> None:
    """Compares (value, gradient) pairs of float64 losses of inputs of order 1."""
    assert error(actual[0], expected[0], VANISHING) <= tolerance
    assert error(actual[1], expected[1], VANISHING) <= tolerance


def decided(term: Term, z: Tensor) -> bool:
    """Whether float32 rounding can change neither a rank nor the active side of the hinge.

    A projection carries an error of about sqrt(D) U < 4e-7, a deviation one of a few U.
    """
    if term.name == "wasserstein":
        return oracles.rank_gap(z, unit_directions(z.shape[-1], K)) > 4e-6
    if term.name == "variance-hinge":
        deviations = torch.sqrt(z.double().var(1) + 1e-4)
        return (deviations - 1).abs().min().item() > 4e-6
    return True


@each_term
@examples
@given(data=st.data())
def test_any_shape(term: Term, data: st.DataObject) -> None:
    z = data.draw(inputs(term))
    k = data.draw(st.integers(1, 40))
    assert_close(value_and_grad(term.library(functional, k), z), truth(term.oracle(k), z))


@each_term
@examples
@given(data=st.data())
def test_degenerate_float64(term: Term, data: st.DataObject) -> None:
    kinds = ("heavy-tailed", "rank-one", "duplicated-columns", "constant-columns")
    z = data.draw(inputs(term, kinds=kinds))
    assert_close(value_and_grad(term.library(functional, K), z), truth(term.oracle(K), z))


@each_term
@examples
@given(data=st.data())
def test_degenerate_float32(term: Term, data: st.DataObject) -> None:
    kinds = ("heavy-tailed", "rank-one", "duplicated-columns", "constant-columns")
    z = data.draw(inputs(term, min_d=2, kinds=kinds)).float()
    assert_float32(term, z, reference=z)


def assert_float32(term: Term, z: Tensor, reference: Tensor) -> None:
    """Allows FLOAT32 and twice the error that plain float32 makes on the benign `reference`.

    The second part is the condition of the problem: the cancellation in a residual that no float32
    computation avoids. Gradients are compared where they are not set-valued.
    """
    value, gradient = value_and_grad(term.library(functional, K), z)
    true_value, true_gradient = truth(term.oracle(K), z)
    plain_value, plain_gradient = float32_errors(term.oracle(K), reference)
    assert error(value, true_value, U) <= FLOAT32 + 2 * plain_value
    if decided(term, z):
        assert error(gradient, true_gradient, U) <= FLOAT32 + 2 * plain_gradient


@pytest.mark.parametrize("name", sorted(set(TERMS) - {"epps_pulley"}))
@examples
@given(data=st.data())
def test_offsets_float32(name: str, data: st.DataObject) -> None:
    """The offset costs nothing: as accurate as plain PyTorch where it has been taken away.

    Epps-Pulley is not here: its cosines of the offset itself have no accurate float32 value.
    """
    term = TERMS[name]
    z = data.draw(inputs(term, min_d=2))
    sign = torch.where(torch.arange(z.shape[-1]) % 3 == 0, -1.0, 1.0)
    z = (z + sign * 10.0 ** data.draw(st.integers(0, 6))).float()
    shifted = z if name == "center" else (z.double() - z.double().mean((0, 1))).float()
    assert_float32(term, z, reference=shifted)


@each_term
@examples
@given(data=st.data())
def test_scales_float32(term: Term, data: st.DataObject) -> None:
    exponent = data.draw(st.integers(-8, 12))
    z = (data.draw(inputs(term, min_d=2)) * 10.0**exponent).float()
    value, gradient = value_and_grad(term.library(functional, K), z)
    if not value.isfinite():
        assert not gradient.isfinite().all()
        return
    if term.name == "epps_pulley" and exponent > 0:
        return  # a float32 angle above 2 pi / U has no direction
    true_value, _ = truth(term.oracle(K), z)
    plain_value, _ = float32_errors(term.oracle(K), z)
    # Where plain PyTorch overflows, the scale-free problem below says what float32 can do.
    if not math.isfinite(plain_value):
        plain_value, _ = float32_errors(term.oracle(K), z / 10.0**exponent)
    assert error(value, true_value) <= FLOAT32 + 2 * plain_value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_term
@settings(max_examples=30)
@given(data=st.data())
def test_collapse(term: Term, dtype: torch.dtype, data: st.DataObject) -> None:
    """Identical samples: finite, right, and no gradient from the terms of the spread."""
    v, n, d = data.draw(shapes())
    v = max(v, term.min_views)
    rows = oracles.embeddings(v, 1, d, seed=data.draw(st.integers(0, 10**6))).to(dtype)
    z = data.draw(st.sampled_from([0, 1, 100])) * rows.expand(v, n, d)
    loss = term.library(functional, K)
    value, true_value = loss(z), truth(term.oracle(K), z)[0]
    # The sketch divides by 1e-6: for two samples its gradient, up to 2 q / (N 1e-6) = 4e5, is
    # outside float16. A loss scale of 2^-10, applied before the cast, brings it back.
    _, gradient = value_and_grad(lambda leaf: 2.0**-10 * loss(leaf), z)
    assert value.isfinite()
    assert gradient.isfinite().all()
    # At 100 the float32 angles of Epps-Pulley, 3 x 100, are wrong by up to 300 U.
    tolerance = 300 * FLOAT32 if term.name == "epps_pulley" else FLOAT32
    assert error(value, true_value, VANISHING) <= tolerance
    # The slope of the squared form is -1 at the least spread and 0 at none: rounding must not pass
    # for spread. Of the hinge, a mean off by U |z| shows as at most U |z| / sqrt(eps).
    if term.name == "variance-squared":
        assert (gradient == 0).all()
    if term.name == "variance-hinge":
        assert gradient.abs().max() <= 2.0**-10 * 100 * U * z.abs().max()


@each_term
@examples
@given(data=st.data())
def test_layouts(term: Term, data: st.DataObject) -> None:
    """Strided, expanded and offset inputs equal contiguous ones, and stay as they were."""
    z = data.draw(inputs(term))
    v, n, d = z.shape
    layout, strided = data.draw(st.sampled_from(sorted(strided_copies(z).items())))
    if layout == "expanded views":
        z = z[:1].expand(v, n, d).contiguous()
    elif layout == "expanded columns":
        z = z[:, :, :1].expand(v, n, d).contiguous()
    assert torch.equal(strided, z)
    loss = term.library(functional, K)
    # Only the order of additions in a matrix product may follow the layout.
    assert_close(value_and_grad(loss, strided), value_and_grad(loss, z), 1e-12)
    assert torch.equal(strided, z)


def strided_copies(z: Tensor) -> dict[str, Tensor]:
    """The same numbers in every layout a trainer may hand over."""
    v, n, d = z.shape
    padded = torch.full((v + 1, 2 * n + 1, 3 * d + 2), math.nan, dtype=z.dtype)
    padded[1:, 1::2, 2::3] = z
    return {
        "transposed": z.mT.contiguous().mT,
        "views last": z.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "stepped slice": padded[1:, 1::2, 2::3],
        "storage offset": torch.cat([z.new_full((3,), math.nan), z.flatten()])[3:].view(v, n, d),
        "expanded views": z[:1].expand(v, n, d),
        "expanded columns": z[:, :, :1].expand(v, n, d),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_term
def test_input_and_its_surroundings_are_not_written(term: Term, dtype: torch.dtype) -> None:
    storage = oracles.embeddings(3, 14, 9, dtype=dtype)
    before = storage.clone()
    value_and_grad(term.library(functional, K), storage[1:, 2:12, 1:8])
    assert torch.equal(storage, before)


@each_term
@examples
@given(data=st.data())
def test_permuted_samples_permute_the_gradient(term: Term, data: st.DataObject) -> None:
    z = data.draw(inputs(term))
    order = torch.tensor(data.draw(st.permutations(range(z.shape[1]))))
    loss = term.library(functional, K)
    value, gradient = value_and_grad(loss, z)
    assert_close(value_and_grad(loss, z[:, order]), (value, gradient[:, order]))


@pytest.mark.parametrize("name", CENTERED)
@examples
@given(data=st.data())
def test_shift_changes_nothing(name: str, data: st.DataObject) -> None:
    z = data.draw(inputs(TERMS[name]))
    # Float32 numbers plus an integer of 20 bits: exact in float64, so only the loss can be off.
    # Centring again costs float64 rounding at the shift, 1e6 * 1e-16 of the spread.
    shift = data.draw(st.integers(-(2**20), 2**20))
    loss = TERMS[name].library(functional, K)
    assume(z.std(1).min() > 1e-3)
    assert_close(value_and_grad(loss, z + shift), value_and_grad(loss, z), 1e-8)


@pytest.mark.parametrize("name", CENTERED)
@examples
@given(data=st.data())
def test_gradient_has_zero_column_sums(name: str, data: st.DataObject) -> None:
    _, gradient = value_and_grad(TERMS[name].library(functional, K), data.draw(inputs(TERMS[name])))
    # N <= 40 additions of entries that each carry a few ulp.
    assert (gradient.sum(1).abs() <= 1e-12 * gradient.norm()).all()


@pytest.mark.parametrize("strategy", ["auto", "gram", "feature"])
@examples
@given(data=st.data())
def test_covariance_scales_with_the_fourth_power(strategy: str, data: st.DataObject) -> None:
    term = oracles.covariance_term(strategy)
    z = data.draw(inputs(term))
    scale = data.draw(st.floats(0.01, 100))
    loss = term.library(functional)
    value, gradient = value_and_grad(loss, z)
    scaled_value, scaled_gradient = value_and_grad(loss, scale * z)
    assert_close((scaled_value / scale**4, scaled_gradient / scale**3), (value, gradient))


@pytest.mark.parametrize("strategy", ["auto", "gram", "feature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_dimension_has_no_covariance(strategy: str, dtype: torch.dtype) -> None:
    z = oracles.embeddings(3, 21, 1, dtype=dtype)
    value, gradient = value_and_grad(oracles.covariance_term(strategy).library(functional), z)
    # The square of the variance, of order 1 here, may cancel to rounding only.
    assert value.abs() <= 8 * torch.finfo(dtype).eps
    assert gradient.abs().max() <= 8 * torch.finfo(dtype).eps


@each_term
@examples
@given(data=st.data())
def test_duplicated_samples(term: Term, data: st.DataObject) -> None:
    """Equal samples share a set-valued sketch gradient: the sum over each group is what counts."""
    few = data.draw(inputs(term))
    n = data.draw(st.integers(few.shape[1], 40))
    group = torch.arange(n) % few.shape[1]
    order = torch.tensor(data.draw(st.permutations(range(n))))
    z = few[:, group[order]]
    value, gradient = value_and_grad(term.library(functional, K), z)
    true_value, true_gradient = truth(term.oracle(K), z)
    sums = [torch.zeros_like(few).index_add(1, group[order], g) for g in (gradient, true_gradient)]
    assert_close((value, sums[0]), (true_value, sums[1]))
