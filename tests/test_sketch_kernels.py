"""Triton kernels of the sliced sketch against float64, at tiny sizes.

On a CPU they run in Triton's interpreter (conftest asks for it), on a CUDA device as they are.
"""

import math
from collections.abc import Iterator
from functools import partial

import oracles
import pytest
import torch
from oracles import Loss, Term, error, float32_errors, truth, value_and_grad
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from vicreg_losses import _fused, functional
from vicreg_losses.kernels import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]
WASSERSTEIN = [t for t in oracles.ALL_TERMS if t.options.get("statistic") == "wasserstein"]
EPPS_PULLEY = [t for t in oracles.ALL_TERMS if t.options.get("statistic") == "epps_pulley"]
SKETCHES = [WASSERSTEIN[0], EPPS_PULLEY[0]]
SLICES = 3
# N of one step, of a few threads, odd, a power of two and one more, and the largest of them last.
SAMPLES = [2, 3, 33, 64, 65]
# The interpreter computes with numpy.
numpy_may_warn = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:invalid value:RuntimeWarning",
    "ignore:divide by zero:RuntimeWarning",
)


# The dtype of the embeddings, the precision that is set for float32 products, and the parts of an
# operand that follow from them.
SETTINGS = [(torch.float32, "highest", 2), (torch.float32, "high", 1)]
SETTINGS += [(dtype, "highest", 1) for dtype in HALVES]


@pytest.fixture(params=SETTINGS, ids=str)
def setting(request: pytest.FixtureRequest) -> Iterator[tuple[torch.dtype, int]]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param[1])
    yield request.param[0], request.param[2]
    torch.set_float32_matmul_precision(before)


def kernels(term: Term, slices: int = SLICES) -> Loss:
    """The public function by its kernels, along the oracle's directions."""
    return term.library(functional, slices, impl="triton")


def data(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return oracles.embeddings(*shape, seed=seed, dtype=dtype).to(DEVICE)


def skewed(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Far from normal along every direction, so that no rank hangs on a rounding."""
    generator = torch.Generator().manual_seed(5)
    z = torch.rand(shape, generator=generator, dtype=torch.float64).pow(-0.4)
    return (z + z[..., :1]).to(DEVICE, dtype)


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a gradient's storage; the interpreter cuts bfloat16 off."""
    truncated = dtype == torch.bfloat16 and DEVICE == "cpu"
    return torch.finfo(dtype).eps * (1 if truncated else 0.5) if dtype in HALVES else 0


def rounded_operands(term: Term, z: Tensor, slices: int, parts: int) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64 of what the kernels are to compute: of rounded operands.

    One part of an operand has the 11 bits of float16, two have 22 and are left as they are.
    """
    w = oracles.unit_directions(z.shape[-1], slices).double().to(z.device)
    options = {**term.formula_options}
    values, gradients = [], []

    def part(x: Tensor) -> Tensor:
        return x if parts == 2 else (2**8 * x).half().double() / 2**8

    for view in z.double():
        mean, sigma = view.mean(0), view.std(0, correction=0) + 1e-6
        if term.options["statistic"] == "epps_pulley":
            p, sigma = part(view - mean) @ part(w) + mean @ w, torch.ones_like(sigma)
            # The formula projects too: along the axes of the projections.
            axes = torch.eye(slices, dtype=torch.float64, device=z.device)
            statistic = partial(lambda axes, x: oracles.epps_pulley(x[None], axes, **options), axes)
        else:
            p = part((view - mean) / sigma) @ part(w)
            q = oracles.normal_quantiles(len(view), options.get("quantiles", "paper"))[:, None]
            statistic = partial(lambda q, x: (x.sort(dim=0).values - q).square().mean(), q.to(p))
        value, slope = value_and_grad(statistic, p)
        values.append(value)
        gradients.append(slope @ part(w).T / sigma)
    return torch.stack(values).mean(), torch.stack(gradients) / len(z)


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("term", [*EPPS_PULLEY, *WASSERSTEIN], ids=str)
def test_value_and_gradient(term: Term, samples: int, setting: tuple[torch.dtype, int]) -> None:
    dtype, parts = setting
    make = skewed if term in WASSERSTEIN else data
    z = make((2, samples, 7), dtype)
    value, gradient = value_and_grad(kernels(term), z)
    assert (value.shape, value.dtype, gradient.dtype) == ((), torch.float32, dtype)
    expected = rounded_operands(term, z, SLICES, parts)
    plain = float32_errors(term.oracle(SLICES), z.float())
    # Plain PyTorch's error in float32, or eight roundings of it. With one part the residual is
    # rounded to 11 bits, and where a float32 rounds across a float16, so is an operand: by 2^-11.
    least = 2.0**-21 if parts == 2 else 2.0**-12
    if term in EPPS_PULLEY:  # T = N sum_t w e^2, and a harmonic is good to 2^-21, not e
        least *= max(1.0, math.sqrt(2.5 * samples / expected[0].item()))
    assert error(value, expected[0]) <= max(2 * plain[0], least)
    assert error(gradient, expected[1]) <= max(4 * plain[1], 2 * least) + rounding(dtype)
    if parts == 2:  # then it is the truth
        true_value, true_gradient = truth(term.oracle(SLICES), z)
        assert error(value, true_value) <= max(2 * plain[0], least)
        assert error(gradient, true_gradient) <= max(4 * plain[1], 2 * least)


@pytest.mark.parametrize("samples", [128, 200, 256])
def test_long_rows(samples: int, setting: tuple[torch.dtype, int]) -> None:
    dtype, parts = setting
    z = skewed((1, samples, 5), dtype)
    for term in SKETCHES:
        value, gradient = value_and_grad(kernels(term, 2), z)
        expected = rounded_operands(term, z, 2, parts)
        assert error(value, expected[0]) <= (2e-6 if parts == 2 else 2.0**-11)
        assert error(gradient, expected[1]) <= (2e-6 if parts == 2 else 2.0**-10) + rounding(dtype)


@pytest.mark.parametrize("slices", [1, 2, 65])
def test_numbers_of_slices(slices: int) -> None:
    z = data((1, 6, 3))
    for term in SKETCHES:
        value, gradient = value_and_grad(kernels(term, slices), z)
        true_value, true_gradient = truth(term.oracle(slices), z)
        assert error(value, true_value) <= 2e-6
        assert error(gradient, true_gradient) <= 4e-6


@pytest.mark.parametrize("dimensions", [1, 2, 63, 65, 129])
@pytest.mark.parametrize("views", [1, 5])
def test_numbers_of_dimensions_and_views(dimensions: int, views: int) -> None:
    z = data((views, 5, dimensions))
    for term in SKETCHES:
        value, gradient = value_and_grad(kernels(term, 2), z)
        true_value, true_gradient = truth(term.oracle(2), z)
        assert error(value, true_value) <= 2e-6
        assert error(gradient, true_gradient, 1e-6) <= 4e-6


@pytest.mark.parametrize("term", SKETCHES, ids=str)
def test_slices_are_projected_some_at_a_time(term: Term, monkeypatch: pytest.MonkeyPatch) -> None:
    z = data((1, 6, 3))
    whole = value_and_grad(kernels(term, 70), z)
    monkeypatch.setattr(plan, "_PROJECTIONS", {False: 1, True: 1})
    assert plan.sketch_plan(_fused.target(z.device), (1, 6, 3), 70, 2).chunk == 64
    assert all(map(torch.equal, value_and_grad(kernels(term, 70), z), whole))


@pytest.fixture
def library_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves rows that no program can hold."""
    monkeypatch.setattr(plan, "_NETWORK_WARPS", {False: {0: 1}, True: {0: 1}})


@pytest.mark.usefixtures("library_sort")
def test_rows_that_no_program_holds(setting: tuple[torch.dtype, int]) -> None:
    dtype, parts = setting
    for samples in (2, 33, 1030):
        z = skewed((2, samples, 5), dtype)
        term = WASSERSTEIN[0]
        value, gradient = value_and_grad(kernels(term, 2), z)
        expected = rounded_operands(term, z, 2, parts)
        assert error(value, expected[0]) <= (2e-6 if parts == 2 else 2.0**-11)
        assert error(gradient, expected[1]) <= (2e-6 if parts == 2 else 2.0**-10) + rounding(dtype)
        with torch.no_grad():
            assert torch.equal(kernels(term, 2)(z), value)


def ordered_residual(p: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Sums of squares and residual of given projections, (K, N), by the sorting kernel alone."""
    from vicreg_losses.kernels.rows import Rows
    from vicreg_losses.kernels.sort import sort_residual, targets

    samples = p.shape[1]
    padded = -(-samples // 64) * 64
    q = oracles.normal_quantiles(samples).float().to(DEVICE)
    cut = plan.network(_fused.target(p.device), samples, parts == 2)
    wide = torch.full((len(p), 1, padded), math.nan, device=DEVICE)
    wide[:, 0, :samples] = p
    residual = torch.full((parts, len(p), 1, padded), math.nan, device=DEVICE).half()
    sums = torch.full((1, len(p)), math.nan, device=DEVICE)
    scales = torch.ones(1, 4, dtype=torch.float64, device=DEVICE)
    rows = Rows(wide, samples, scales, 1.0, residual, 1.0, sums, 0, parts)
    sort_residual(rows, targets(q, cut))
    assert residual[..., samples:].isnan().all()  # nothing beyond the row is written
    return sums[0], residual[:, :, 0, :samples].float().sum(0)


def stable_residual(p: Tensor) -> Tensor:
    index = p.sort(dim=1, stable=True).indices
    q = oracles.normal_quantiles(p.shape[1]).float().to(p.device)
    return torch.empty_like(p).scatter_(1, index, p.gather(1, index) - q)


ROWS = {
    "ordinary": lambda p: p,
    "ties": lambda p: (4 * p).round() / 4,
    "constant": lambda p: p * 0 + 0.7,
    "zeros of both signs": lambda p: torch.where(p > 0.5, 1.0, 0.0 * p),
    "increasing": lambda p: p.sort(1).values,
    "decreasing": lambda p: p.sort(1, descending=True).values,
    "outlier": lambda p: torch.where(p == p.max(), 3e4, p),
    "tiny": lambda p: p * 1e-30,
    "two values": lambda p: p.sign(),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("samples", [3, 64, 200])
def test_ranks_are_those_of_a_stable_sort(kind: str, samples: int) -> None:
    """With two parts the order is that of float32, whatever the values."""
    p = torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
    p = ROWS[kind](p.to(DEVICE))
    sums, residual = ordered_residual(p, 2)
    expected = stable_residual(p)
    assert error(sums, expected.double().square().sum(1)) <= 2.0**-21
    # The residual is two numbers of 11 bits, and none is below 2^-24.
    assert ((residual - expected).abs() <= 2.0**-22 * expected.abs() + 2.0**-24).all()


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind not in ("outlier", "tiny")])
@pytest.mark.parametrize("samples", [3, 64, 200])
def test_ranks_to_the_resolution_of_a_step(kind: str, samples: int) -> None:
    """With one part, in equal steps of the range; elements of a step keep their order."""
    p = torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
    p = ROWS[kind](p.to(DEVICE))
    sums, residual = ordered_residual(p, 1)
    exact = stable_residual(p)
    assert error(sums, exact.double().square().sum(1)) <= 1e-6
    size = 1 << max(6, (samples - 1).bit_length())
    step = (p.amax(1) - p.amin(1)).max().item() / (min(0x7F000000 // size, 1 << 24) - 4)
    for row, found in zip(p, residual, strict=True):
        # The targets as they were handed out are near enough to tell apart, and in order.
        order = (row - found).sort(stable=True).indices
        assert row[order].diff().min() >= -2 * step
        q = oracles.normal_quantiles(samples).to(DEVICE)
        assert ((row - found)[order] - q).abs().max() <= 2.0**-11 * found.abs().max() + 2 * step
    if kind in ("ties", "constant", "two values", "zeros of both signs"):  # of any number of steps
        assert ((residual - exact).abs() <= 2.0**-11 * exact.abs() + 2 * step).all()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@numpy_may_warn
def test_non_finite_projections_spoil_their_row_alone(bad: float, parts: int) -> None:
    p = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    clean, _ = ordered_residual(p, parts)
    for place in (0, 31, 69):
        spoiled = p.clone()
        spoiled[1, place] = bad
        sums, _ = ordered_residual(spoiled, parts)
        assert not sums[1].isfinite()
        assert torch.equal(sums[[0, 2]], clean[[0, 2]])
