"""The kernels of the sketch on a GPU: accuracy at real sizes, slices, graphs, memory, addresses.

Without a GPU the arithmetic of this file runs in Triton's interpreter, as that of test_gpu.py does.
"""

import copy
import functools
import math
from collections.abc import Iterator
from functools import partial
from itertools import product

import oracles
import pytest
import torch
from oracles import Loss, error, value_and_grad
from test_gpu import DEVICE, LAYOUTS, OUTPUT, PRECISIONS, SMALL, cuda_only, each_dtype, scaled
from torch import Tensor, nn

from vicreg_losses import LeJEPALoss, SlicedSketchLoss, VISRegLoss, _slices, functional
from vicreg_losses.kernels import launch, plan

# PyTorch and Triton warn of their own options on a GPU: shown, no errors.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

Case = tuple[int, int, int, int]  # V, N, D, K
BOTH = ("float32", "bfloat16")
ODD = (2, 33, 130, 7) if SMALL else (2, 129, 130, 70)
NARROW = (2, 20, 7, 3) if SMALL else (2, 1000, 32, 128)
VISREG = (3, 20, 24, 5) if SMALL else (10, 1024, 256, 4096)
SIGREG = (1, 70, 24, 5) if SMALL else (1, 4096, 256, 4096)
WIDE = (1, 20, 300, 3) if SMALL else (1, 2048, 8192, 256)
REPEATED, TIMES = ((4, 20, 7, 3), 3) if SMALL else ((1024, 64, 32, 57), 577)
LONG = (1, 2000, 1, 1) if SMALL else (1, 2**25, 1, 1)
# Around powers of two and, in each precision, the longest that a network sorts. Each length and
# each precision is a kernel of its own to compile, which takes seconds.
LENGTHS = [*product((2, 65, 1000, 2048, 8192, 8193, 65536), ["float32"])]
LENGTHS += product((3, 64, 65, 1000, 2048, 8192, 8193, 16384, 16385), ["bfloat16"])
if SMALL:
    LENGTHS = [*product((2, 3, 64, 65, 100, 16385), BOTH)]
CASES = [((*NARROW[:1], n, *NARROW[2:]), precision, "wasserstein") for n, precision in LENGTHS]
CASES += [(c, p, "epps_pulley") for c, p, _ in CASES if c[1] in (2, 65, 1000, 16385, 65536)]
STATISTICS = {"wasserstein": oracles.sliced_wasserstein, "epps_pulley": oracles.epps_pulley}
CASES += product([ODD], PRECISIONS, STATISTICS)
CASES += [*product([VISREG, SIGREG], BOTH, STATISTICS), *product([WIDE], BOTH[1:], STATISTICS)]

COLUMNS = {"scale": partial(oracles.variance, form="squared"), "center": oracles.center}
COLUMNS["invariance"] = partial(oracles.invariance, form="center")
COMPOSITES = dict(zip(STATISTICS, (VISRegLoss, LeJEPALoss), strict=True))
MODULES = {s: partial(SlicedSketchLoss, statistic=s) for s in STATISTICS}
MODULES |= {cls.__name__: cls for cls in COMPOSITES.values()}
each_statistic = pytest.mark.parametrize("statistic", STATISTICS)
each_module = pytest.mark.parametrize("name", MODULES)
quantiles = functools.cache(oracles.normal_quantiles)


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def made(name: str) -> nn.Module:
    return MODULES[name](num_slices=NARROW[3], seed=3, impl="triton").to(DEVICE)


def slices_of(case: Case) -> Tensor:
    return oracles.unit_directions(case[2], case[3]).to(DEVICE)


def sketch(w: Tensor, statistic: str, impl: str = "triton") -> Loss:
    return partial(functional.sliced_sketch_loss, directions=w, statistic=statistic, impl=impl)


def data(kind: str, case: Case, precision: str = "float32") -> Tensor:
    """Embeddings; but for "white" most of each is one skewed factor, so no projection is normal.

    The residuals are then of the order of 1, and an error of the projections is one of theirs.
    """
    views, samples, dimensions, _ = case
    empty = partial(torch.empty, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    z = empty((views, samples, dimensions)).normal_(generator=generator)
    if kind != "white":
        factor = empty((views, samples, 1)).exponential_(generator=generator)
        columns = torch.arange(1, dimensions + 1, device=DEVICE)
        # Standard deviations of .5 to .9, and 1.5: none near 1, which a variance term pulls to.
        spread = torch.where(columns % 2 == 0, 1.5, 0.5 + 0.4 * columns / dimensions)
        z = (0.8 * factor + 0.6 * z) * spread - 0.5
    if kind == "means":
        z += empty((views, 1, dimensions)).normal_(std=10, generator=generator)
    if kind == "outlier":
        z[:, 0] *= 1000
    return (z * (1e-4 if kind == "collapse" else 1)).to(PRECISIONS[precision])


def rounded(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round(), exponent - bits) if bits else x


def closed_form(
    z: Tensor, w: Tensor, statistic: str, bits: int = 0
) -> tuple[Tensor, Tensor, float]:
    """Value and gradient in float64; with ``bits``, of operands that are rounded to so many.

    Projections are then sorted by equal steps, as many as the words of a network hold. And how much
    the gradient changes, in norm, if all neighbours within 2^-20, which float32 does not tell
    apart, change places: one exchange is more than all else that is off.
    """
    (views, samples, _), slices, exchanges = z.shape, w.shape[1], 0.0
    z, w = z.double(), w.double()
    mean, sigma = z.mean(1, keepdim=True), torch.ones_like(z[:, :1])
    if statistic == "wasserstein":
        sigma = z.std(1, correction=0, keepdim=True) + 1e-6
    p = rounded(w, bits).T @ rounded((z - mean) / sigma, bits).mT  # (V, K, N)
    if statistic == "wasserstein":
        q = quantiles(samples).to(DEVICE)
        if bits and samples <= 2**14:
            low, high = p.aminmax(dim=-1, keepdim=True)
            step = (high - low).clamp(min=1e-20) / 2 ** min(24, 31 - (samples - 1).bit_length())
            p = low + step * ((p - low) / step).round()
        p, order = p.sort(dim=-1, stable=True)
        jumps = 2 * (q.diff().square() * (p.diff(dim=-1) < 2**-20)).sum(-1, keepdim=True)
        squares = (jumps * (w / sigma.mT).square().sum(1).unsqueeze(-1)).sum()
        exchanges = squares.sqrt().item() * 2 / (samples * views * slices)
        r = (p - q).gather(-1, order.argsort(dim=-1))
        value, factor = r.square().mean(), 2 / samples
    else:
        p += w.T @ mean.mT
        value, r, factor = p.new_zeros(()), torch.zeros_like(p), 1.0
        for j in range(1, 17):
            t, ends = 3 * j / 16, 1 + (j < 16)
            phi = math.exp(-t * t / 2)
            cosine, sine = (t * p).cos(), (t * p).sin()
            excess, odd = cosine.mean(-1, keepdim=True) - phi, sine.mean(-1, keepdim=True)
            value += samples * 3 / 16 * ends * phi * (excess.square() + odd.square()).mean()
            r += 3 / 8 * ends * phi * t * (odd * cosine - excess * sine)
    gradient = rounded(r, bits).mT @ rounded(w, bits).T / sigma * (factor / (views * slices))
    return value, gradient, exchanges


def truth(
    z: Tensor, w: Tensor, statistic: str, precision: str
) -> tuple[Tensor, Tensor, float, float]:
    """Value and gradient, and how far from them, relatively and in norm, kernels may be.

    One part: twice what its 11 bits do in exact arithmetic. And to the value, where that may cancel
    by luck, the effect of the one operand in 2^11 that float32 rounds to the other side: an eighth,
    generously, of 2^-11 of each slice's projections, which add up at random.

    Two parts: twice plain PyTorch's error in float32; for 22 bits instead of 11, 2^-10; and a
    tensor core that cuts each of 3 D / 16 sums to 24 bits, all to the same side, against 2^-12:
    D 2^-14. It shifts the projections by less than D 2^-25, the value by twice that over the gap.
    """
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    *true, exchanges = closed_form(z, w, statistic)
    single = [*map(error, closed_form(z, w, statistic, bits=11)[:2], true)]
    # How far the projections are from normal ones: in units of theirs, and of exp(i t p).
    gap = (true[0].item() / (1 if statistic == "wasserstein" else 2.5 * z.shape[1])) ** 0.5
    if precision != "float32":
        value = 2 * single[0] + 2**-14 * w.shape[1] ** -0.5 / gap
        return *true, value, 2 * single[1] + OUTPUT[precision]
    plain = [*map(error, value_and_grad(sketch(w, statistic, "torch"), z), true)]
    bound = 2 * plain[1] + single[1] * (2**-10 + z.shape[2] * 2**-14)
    if statistic == "wasserstein":
        bound += 1e-6 + exchanges / true[1].norm().item()
    else:
        bound += 4e-6  # four products to the 16th harmonic
    return *true, 2 * plain[0] + 2e-6 + z.shape[2] * 2**-24 / gap, bound


def check(
    z: Tensor, w: Tensor, statistic: str, precision: str, note: object = "", times: int = 1
) -> None:
    """Compare with the truth; of the slices so many times over, which has the same one."""
    *true, value_bound, bound = truth(z, w, statistic, precision)
    errors = [*map(error, scaled(sketch(w.repeat(1, times), statistic), z, true[1]), true)]
    assert errors[0] <= value_bound, (note, errors, value_bound)
    assert errors[1] <= bound, (note, errors, bound)


@pytest.mark.parametrize(("case", "precision", "statistic"), CASES, ids=str)
def test_accuracy(case: Case, precision: str, statistic: str) -> None:
    w, kinds = slices_of(case), ["far", "white", "means", "collapse"]
    for kind in kinds + ["outlier"] * (statistic == "wasserstein"):  # the other loses its phase
        z = data(kind, case, precision)
        check(z, w, statistic, precision, kind)
        if case == ODD:
            with DEVICE:  # the formula makes constants
                true = oracles.truth(lambda leaf: STATISTICS[statistic](leaf, w), z)
            assert max(map(error, closed_form(z, w, statistic), true)) <= 1e-9


@each_statistic
@pytest.mark.parametrize(("case", "precision"), [*product([ODD, VISREG], BOTH)], ids=str)
def test_composites(case: Case, precision: str, statistic: str) -> None:
    """Each term alone, the others without an upstream gradient, and all of them."""
    z, w = data("far", case, precision), slices_of(case)
    loss = COMPOSITES[statistic](impl="triton")
    columns = {name: oracles.truth(formula, z) for name, formula in COLUMNS.items()}
    *true, value_bound, bound = truth(z, w, statistic, precision)
    terms = loss.terms(z, directions=w)._asdict()
    for name, value in terms.items():
        off = error(value, columns.get(name, true)[0])
        assert off <= (2e-6 if name in columns else value_bound)
    for factors in (*torch.eye(len(terms)).tolist(), [0.1, 0.9, 2.0, 0.5][: len(terms)]):

        def weighted(leaf: Tensor, factors: list[float] = factors) -> Tensor:
            each = zip(factors, loss.terms(leaf, directions=w), strict=True)
            return sum(factor * term for factor, term in each if factor)

        total = sum(f * columns.get(n, true)[1] for f, n in zip(factors, terms, strict=True))
        share = max(f * (n not in columns) for f, n in zip(factors, terms, strict=True))
        share *= bound * true[1].norm() / total.norm()
        actual = scaled(weighted, z, total)[1]
        assert error(actual, total) <= 4e-6 + share + OUTPUT[precision], factors


def test_addresses_past_32_bits() -> None:
    """More than 2^31 projections: the same slices over and over, and one slice of a long batch."""
    assert SMALL or math.prod(REPEATED[:2]) * REPEATED[3] * TIMES > 2**31
    for statistic in STATISTICS:
        z, w = data("far", REPEATED, "bfloat16"), slices_of(REPEATED)
        check(z, w, statistic, "bfloat16", times=TIMES)
        check(data("far", LONG), slices_of(LONG), statistic, "float32")


@each_module
def test_slices_of_the_device(name: str) -> None:
    """The kernel's numbers are those of the formula; a state resumes; no two calls share slices."""
    module, z = made(name), data("white", NARROW)
    values = [module(z) for _ in range(3)]
    assert len({value.item() for value in values}) == 3
    resumed = made(name)
    module.step -= 2
    resumed.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(resumed(z), values[1])
    module.step.zero_()
    expected = _slices.draw_directions(module.seed, module.step, *NARROW[2:])
    drawn = module.next_directions(z)
    # Other roundings of the logarithm, the cosine and the norm: a few units in the last place.
    assert (drawn - expected).abs().max() <= 8 * 2**-24
    module.step.zero_()
    assert torch.equal(drawn, module.next_directions(z.bfloat16()))


@cuda_only
@each_module
def test_graph_replays_with_other_slices(name: str) -> None:
    static, side, module = data("white", NARROW), torch.cuda.Stream(), made(name)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            value_and_grad(module, static)
    torch.cuda.current_stream().wait_stream(side)
    graph, values = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        replayed = value_and_grad(module, static)
    module.step.zero_()
    eager = made(name)
    for _ in range(3):
        graph.replay()
        assert all(map(torch.equal, replayed, value_and_grad(eager, static)))
        values.append(replayed[0].item())
    assert len(set(values)) == 3


@cuda_only
@each_statistic
@pytest.mark.parametrize("precision", BOTH)
def test_repeats_are_equal_and_the_host_never_waits(statistic: str, precision: str) -> None:
    z, w, side = data("white", SIGREG, precision), slices_of(SIGREG), torch.cuda.Stream()
    loss, left = sketch(w, statistic), torch.randn(2048, 2048, device=DEVICE).bfloat16()
    first = value_and_grad(loss, z)
    side.wait_stream(torch.cuda.current_stream())
    for repeat in range(5):
        with torch.cuda.stream(side):
            for _ in range(7 * repeat):
                torch.mm(left, left)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = value_and_grad(loss, z)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(map(torch.equal, again, first))


@cuda_only
@each_statistic
def test_peak_memory(statistic: str) -> None:
    """The 16-bit residual, the directions, the gradient, and one chunk of projections: no more."""
    z, w = data("white", VISREG, "bfloat16"), slices_of(VISREG)
    loss = sketch(w, statistic)
    value_and_grad(loss, z)  # compiled
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value_and_grad(loss, z)
    peak = torch.cuda.max_memory_allocated() - before
    views, samples, _, slices = VISREG
    sorts = statistic == "wasserstein"
    p = plan.sketch_plan(launch.target(z.device), z.shape, slices, 1, sorts)
    residue = 2 * p.slices * (views * p.padded[0] + p.padded[1])
    chunk = 4 * min(views * samples * slices, 1 << (26 if sorts else 22))
    operands = 2 * views * p.padded[0] * p.padded[1] + 4 * w.numel()
    # No int64 index, no sorted copy, nothing with knots.
    assert residue <= peak <= residue + 1.1 * chunk + operands + 4 * z.numel() + 2**22


@pytest.mark.parametrize("layout", LAYOUTS)
@each_statistic
def test_strides(statistic: str, layout: str) -> None:
    z = LAYOUTS[layout](data("far", ODD))
    loss = sketch(oracles.unit_directions(z.shape[2], ODD[3]).to(DEVICE), statistic)
    actual, expected = value_and_grad(loss, z), value_and_grad(loss, z.clone().contiguous())
    # On a GPU another variant may give the threads other rows to add, and a rank may change.
    assert max(map(error, actual, expected)) <= (0 if SMALL else 1e-3)


@each_dtype
@each_statistic
def test_non_finite_input_shows_in_value_and_gradient(statistic: str, dtype: torch.dtype) -> None:
    loss = sketch(slices_of(ODD), statistic)
    for bad in (math.nan, math.inf, -math.inf):
        z = data("far", ODD).to(dtype)
        z[1, -1, -1] = bad
        value, gradient = value_and_grad(loss, z)
        assert not value.isfinite(), bad
        assert not gradient.isfinite().all(), bad


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e15, 1e20, 1e37])
@each_statistic
def test_overflow_is_never_hidden(statistic: str, scale: float) -> None:
    value, gradient = value_and_grad(sketch(slices_of(ODD), statistic), scale * data("far", ODD))
    assert value.isfinite() or not gradient.isfinite().all()


@each_dtype
@each_statistic
def test_collapse_is_finite(statistic: str, dtype: torch.dtype) -> None:
    """Ties of all: the value is that of projections at one point."""
    views, samples, dimensions, _ = ODD
    for offset in (0.0, 1 / 3):
        z = torch.full((views, samples, dimensions), offset, device=DEVICE, dtype=dtype)
        value, gradient = value_and_grad(sketch(slices_of(ODD), statistic), z)
        assert gradient.isfinite().all()
        if statistic == "wasserstein":
            assert error(value, quantiles(samples).square().mean()) <= 1e-4
