"""Every term and option against the textbook formulas, in float64 and float32."""

from itertools import count

import oracles
import pytest
import torch
from oracles import Loss, Term, error, float32_errors, truth, unit_directions, value_and_grad
from torch import Tensor

from vicreg_losses import LeJEPALoss, VICRegLoss, VISRegLoss, _epps_pulley, functional

# Two float64 evaluation orders differ by about the number of summands (at most 1e4 here) times
# 1e-16; 1e-10 leaves room for cancellation in a residual and none for a wrong coefficient.
FLOAT64 = 1e-10
# Terms that vanish in exact arithmetic (covariance of one dimension, centring one view) are
# compared with this instead of with 0: inputs and gradients here are of order 1 and 1e-2.
VANISHING = 1e-3
# Half an ulp of float32.
U = 2.0**-24

# V, N, D, K: one of everything, N < D, N = D, N > D, nothing a power of two but by accident.
SHAPES = [
    (1, 2, 1, 1),
    (1, 2, 5, 3),
    (5, 2, 3, 7),
    (6, 31, 1, 2),
    (1, 3, 2, 9),
    (2, 7, 7, 7),
    (2, 16, 5, 33),
    (2, 5, 16, 6),
    (3, 33, 20, 31),
    (4, 64, 3, 1),
    (7, 12, 13, 10),
    (8, 9, 11, 5),
    (2, 50, 128, 23),
    (1, 129, 31, 100),
    (2, 257, 17, 65),
    (2, 128, 64, 13),
]
FLOAT32_SHAPES = [
    (2, 33, 17, 13),
    (2, 64, 48, 13),
    (3, 50, 50, 7),
    (4, 48, 100, 5),
    (1, 200, 8, 13),
    (2, 257, 31, 5),
    (1, 300, 129, 1),
]


def shape_id(shape: tuple[int, ...]) -> str:
    return "v{}-n{}-d{}-k{}".format(*shape)


def assert_exact(loss: Loss, formula: Loss, z: Tensor) -> None:
    """Compares a float64 loss and its gradient with the formula."""
    (value, gradient), (true_value, true_gradient) = value_and_grad(loss, z), truth(formula, z)
    assert value.dtype == gradient.dtype == torch.float64
    assert error(value, true_value, VANISHING) <= FLOAT64
    assert error(gradient, true_gradient, VANISHING) <= FLOAT64


def assert_as_good_as_plain(loss: Loss, formula: Loss, z: Tensor) -> None:
    """Allows twice plain PyTorch's float32 error, and four more roundings of the result.

    Whatever the order of evaluation, the value is rounded by the last addition, by the division of
    the mean, by the mean over views and when stored, and so is each entry of the gradient: 4 U,
    which matters only where plain PyTorch happens to be exact.
    """
    (value, gradient), (true_value, true_gradient) = value_and_grad(loss, z), truth(formula, z)
    plain_value, plain_gradient = float32_errors(formula, z)
    assert value.dtype == gradient.dtype == torch.float32
    assert error(value, true_value) <= 2 * plain_value + 4 * U
    assert error(gradient, true_gradient) <= 2 * plain_gradient + 4 * U


def decided_embeddings(v: int, n: int, d: int, k: int) -> Tensor:
    """Float32 embeddings of which all ranks are decided (see `oracles.rank_gap`).

    A projection of D standardised terms carries an error of about sqrt(D) U: 4e-6 is four times
    that at the largest D here.
    """
    samples = (oracles.embeddings(v, n, d, seed, torch.float32) for seed in count())
    return next(z for z in samples if oracles.rank_gap(z, unit_directions(d, k)) > 4e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("term", oracles.ALL_TERMS, ids=str)
def test_float64(term: Term, shape: tuple[int, int, int, int]) -> None:
    v, n, d, k = shape
    z = oracles.embeddings(max(v, term.min_views), n, d, seed=n + d)
    assert_exact(term.library(functional, k), term.oracle(k), z)


@pytest.mark.parametrize("shape", FLOAT32_SHAPES, ids=shape_id)
@pytest.mark.parametrize("term", oracles.ALL_TERMS, ids=str)
def test_float32(term: Term, shape: tuple[int, int, int, int]) -> None:
    v, n, d, k = shape
    z = decided_embeddings(max(v, term.min_views), n, d, k)
    assert_as_good_as_plain(term.library(functional, k), term.oracle(k), z)


@pytest.mark.parametrize("term", oracles.TERMS, ids=str)
def test_one_view_without_the_view_axis(term: Term) -> None:
    if term.min_views > 1:
        term = oracles.ALL_TERMS[1]  # a pair needs two views
    z = oracles.embeddings(1, 20, 6)
    stacked = value_and_grad(term.library(functional), z)
    single = value_and_grad(term.library(functional), z[0])
    assert torch.equal(single[0], stacked[0])
    assert torch.equal(single[1], stacked[1][0])


@pytest.mark.parametrize("term", oracles.ALL_TERMS, ids=str)
def test_value_without_a_gradient(term: Term) -> None:
    z, loss = oracles.embeddings(3, 19, 8), term.library(functional)
    assert error(loss(z), truth(term.oracle(), z)[0]) <= FLOAT64
    with torch.no_grad():
        assert torch.equal(loss(z.requires_grad_()), loss(z.detach()))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("term", oracles.TERMS, ids=str)
def test_two_threads(term: Term, dtype: torch.dtype) -> None:
    z = oracles.embeddings(2, 700, 40, dtype=dtype)
    value, gradient = value_and_grad(term.library(functional, 300), z)
    true_value, true_gradient = truth(term.oracle(300), z)
    # A block of slices or samples lost or done twice is wrong by more than 1 %. In float32 a few
    # of 4e5 ranks are not decided, and each moves a sample's gradient by its distance to the next.
    tolerance = FLOAT64 if dtype == torch.float64 else 1e-3
    assert error(value, true_value) <= tolerance
    assert error(gradient, true_gradient) <= tolerance


@pytest.mark.parametrize("num_global", [1, 2, 3, 4])
def test_invariance_center_of_the_global_views(num_global: int) -> None:
    options = {"form": "center", "num_global": num_global}
    assert_exact(
        lambda z: functional.invariance_loss(z, **options),
        lambda z: oracles.invariance(z, **options),
        oracles.embeddings(4, 10, 3),
    )


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
def test_hinge_options(gamma: float, eps: float) -> None:
    assert_exact(
        lambda z: functional.variance_loss(z, gamma=gamma, eps=eps),
        lambda z: oracles.variance(z, gamma=gamma, eps=eps),
        oracles.embeddings(2, 40, 9),
    )


# Dominant diagonals: where `sum C^2 - sum diag^2` cancels. Whitened columns of variance 1e3 leave
# an off-diagonal energy below the float32 resolution of the diagonal's; one large column out of
# many does the same when N < D.
def whitened(n: int, d: int) -> Tensor:
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * (1e3 * (n - 1)) ** 0.5
    return (white + 0.01 * noise).float()[None]


def one_large_column(n: int, d: int) -> Tensor:
    z = oracles.embeddings(1, n, d)
    z[:, :, 0] *= 1e3
    return z.float()


@pytest.mark.parametrize("strategy", ["auto", "gram", "feature"])
@pytest.mark.parametrize(
    "z",
    [whitened(256, 64), whitened(65, 64), one_large_column(16, 64), one_large_column(64, 16)],
    ids=["white-n256-d64", "white-n65-d64", "large-n16-d64", "large-n64-d16"],
)
def test_covariance_with_dominant_diagonal(z: Tensor, strategy: str) -> None:
    assert_as_good_as_plain(
        lambda z: functional.covariance_loss(z, strategy=strategy), oracles.covariance, z
    )


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_vicreg(shape: tuple[int, int, int, int]) -> None:
    v, n, d, _ = shape
    z = oracles.embeddings(max(v, 2), n, d)
    assert_exact(VICRegLoss(), oracles.vicreg, z)
    loss = VICRegLoss(invariance=2.0, variance=3.0, covariance=0.5, gamma=1.3, eps=1e-3)
    weights = (2.0, 3.0, 0.5)
    assert_exact(loss, lambda z: oracles.vicreg(z, weights, gamma=1.3, eps=1e-3), z)


@pytest.mark.parametrize("shape", FLOAT32_SHAPES, ids=shape_id)
def test_vicreg_float32(shape: tuple[int, int, int, int]) -> None:
    v, n, d, _ = shape
    z = oracles.embeddings(max(v, 2), n, d, dtype=torch.float32)
    assert_as_good_as_plain(VICRegLoss(), oracles.vicreg, z)


@pytest.mark.parametrize("num_global", [None, 2])
@pytest.mark.parametrize("shape", [(2, 20, 6), (4, 7, 15), (3, 2, 2)], ids=str)
def test_lejepa(shape: tuple[int, int, int], num_global: int | None) -> None:
    directions = unit_directions(shape[-1], 11).double()
    loss = LeJEPALoss(weight=0.3, num_slices=11, num_global=num_global)
    assert_exact(
        lambda z: loss(z, directions=directions),
        lambda z: oracles.lejepa(z, directions, 0.3, num_global),
        oracles.embeddings(*shape),
    )


@pytest.mark.parametrize("num_global", [None, 2])
@pytest.mark.parametrize("shape", [(2, 20, 6), (4, 7, 15), (3, 3, 2)], ids=str)
def test_visreg(shape: tuple[int, int, int], num_global: int | None) -> None:
    directions = unit_directions(shape[-1], 11).double()
    parts = {"scale": 2.0, "shape": 0.5, "center": 3.0}
    loss = VISRegLoss(weight=0.7, num_slices=11, num_global=num_global, **parts)
    assert_exact(
        lambda z: loss(z, directions=directions),
        lambda z: oracles.visreg(z, directions, 0.7, tuple(parts.values()), num_global),
        oracles.embeddings(*shape),
    )


@pytest.mark.parametrize("composite", ["visreg", "lejepa"])
@pytest.mark.parametrize("shape", [(1, 9), (2, 64), (5, 31)], ids=str)
def test_default_weights_in_one_dimension(composite: str, shape: tuple[int, int]) -> None:
    # Every slice of one dimension is +-1, so the drawn slices do not matter.
    loss = {"visreg": VISRegLoss(), "lejepa": LeJEPALoss()}[composite]
    formula = {"visreg": oracles.visreg, "lejepa": oracles.lejepa}[composite]
    z = oracles.embeddings(*shape, 1)
    assert_exact(loss, lambda z: formula(z, torch.ones(1, 1)), z)


@pytest.mark.parametrize(
    "loss",
    [VICRegLoss(), VISRegLoss(num_slices=5), LeJEPALoss(num_slices=5)],
    ids=lambda loss: type(loss).__name__,
)
def test_views_may_come_apart_or_stacked(loss: torch.nn.Module) -> None:
    z = oracles.embeddings(3, 10, 4)
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    results = []
    for views in ([z], [list(z)], list(z)):
        loss.load_state_dict(state)  # the same slices for each
        results.append(loss(*views))
    # Bitwise: the same arithmetic on the same numbers.
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("n", "spread"), [(16, 0.716), (64, 0.892), (256, 0.963)])
def test_variance_of_the_quantiles(n: int, spread: float) -> None:
    # Where all samples coincide every projection is 0 and the value is the targets' mean square:
    # the published variances, to the three digits they are given in.
    collapsed = torch.zeros(n, 3, dtype=torch.float64)
    paper = functional.sliced_sketch_loss(collapsed, num_slices=3)
    exact = functional.sliced_sketch_loss(collapsed, num_slices=3, quantiles="exact")
    assert paper.item() == pytest.approx(spread, abs=5e-4)
    assert spread < exact.item() < 1


def test_gradient_towards_collapse() -> None:
    # A decade of spread: the hinge loses sigma / sqrt(sigma^2 + eps), a factor 7 and then nearly
    # 10, and the sketch, divided by the detached sigma (+ 1e-6), gains nearly 10: at 1e-4 the 1e-6
    # shrinks the projections by 1 %, which is a tenth of the residual.
    z = oracles.embeddings(1, 64, 16)
    z = (z - z.mean(1)) / z.std(1)
    norms = [
        [value_and_grad(t.library(functional), s * z)[1].norm().item() for s in (1e-2, 1e-3, 1e-4)]
        for t in oracles.TERMS
        if t.name in ("variance-hinge", "wasserstein")
    ]
    (hinge, sketch) = norms
    assert hinge[0] / hinge[1] == pytest.approx(7.1, rel=0.01)
    assert hinge[1] / hinge[2] == pytest.approx(9.95, rel=0.01)
    assert sketch[1] / sketch[0] == pytest.approx(10, rel=0.1)
    assert sketch[2] / sketch[1] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("n", [32, 512])
def test_epps_pulley_of_normal_samples_does_not_vanish(n: int) -> None:
    # E|mean of n unit phasors - phi|^2 = (1 - phi^2) / n, so the expected value is
    # sum_t w_t (1 - e^{-t^2}) for every n. One slice scatters by about as much as its mean, and at
    # least 8 * 64 are independent: 4 standard errors are 0.2 of the mean.
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(8, n, 64, generator=generator)
    t = torch.linspace(0, 3, 17)
    expected = torch.trapezoid(2 * torch.exp(-(t**2) / 2) * (1 - torch.exp(-(t**2))), t)
    options = {"statistic": "epps_pulley", "num_slices": 256, "generator_seed": 0}
    value = functional.sliced_sketch_loss(z, **options)
    assert value.item() == pytest.approx(expected.item(), rel=0.2)
    assert expected.item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("grain", [1 << 16, 7], ids=["rows whole", "rows in pieces"])
@pytest.mark.parametrize("in_numpy", [True, False], ids=["numpy", "torch"])
@pytest.mark.parametrize("knots", [2, 3, 6, 17, 20])
def test_harmonics(knots: int, in_numpy: bool, grain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to evaluate them, for any number, with blocks of few rows and of less than one."""
    monkeypatch.setattr(_epps_pulley, "_takes_numpy", lambda p: in_numpy)
    monkeypatch.setattr(_epps_pulley, "_CPU_GRAIN", grain)
    monkeypatch.setattr(_epps_pulley, "_CPU_BLOCK", 2 * grain)
    monkeypatch.setattr(_epps_pulley, "_PRODUCT", grain)
    monkeypatch.setattr(_epps_pulley, "_SERIAL", grain)
    monkeypatch.setattr(_epps_pulley, "CHUNK", grain)
    w = unit_directions(5, 9).double()
    assert_exact(
        lambda z: functional.sliced_sketch_loss(
            z, directions=w, statistic="epps_pulley", knots=knots
        ),
        lambda z: oracles.epps_pulley(z, w, knots=knots),
        oracles.embeddings(2, 21, 5),
    )


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e38])
def test_harmonics_of_what_is_not_finite(bad: float) -> None:
    """Without a warning: value and gradient of that row say so, those of the others are theirs."""
    p = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    table = _epps_pulley.knot_table(17, 3.0, p)
    expected = p.clone()
    expected_values = _epps_pulley.epps_pulley_(expected, table, True)
    p[1, 4] = bad
    values = _epps_pulley.epps_pulley_(p, table, True)
    assert values.isfinite().tolist() == [True, bad == 1e38, True]
    assert torch.equal(values[::2], expected_values[::2])
    assert torch.equal(p[::2], expected[::2])
    assert p[1].isfinite().all() == (bad == 1e38)
