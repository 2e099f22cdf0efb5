"""The kernels on a GPU: accuracy at real sizes, determinism, graphs, streams, memory, addresses.

Without a GPU the arithmetic of this file runs in Triton's interpreter, on small shapes: set
VICREG_LOSSES_TEST_DEVICE=cpu and TRITON_INTERPRET=1, and take the skip of conftest.py away.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import oracles
import pytest
import torch
from oracles import Loss, error, value_and_grad
from torch import Tensor
from torch._inductor import config as inductor

from vicreg_losses import VICRegLoss, _dispatch, functional

# PyTorch and Triton warn of their own options on a GPU: shown, no errors.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DEVICE = torch.device(os.environ.get("VICREG_LOSSES_TEST_DEVICE", "cuda"))
SMALL = DEVICE.type == "cpu"
cuda_only = pytest.mark.skipif(SMALL, reason="streams, graphs and memory of CUDA")

Shape = tuple[int, int, int]
BOTH = ("gram", "feature")
ODD = (2, 129, 130)
WIDE = (1, 40, 200) if SMALL else (1, 256, 8192)
LARGE = (1, 80, 200) if SMALL else (1, 2048, 8192)
SQUARE = (2, 70, 130) if SMALL else (2, 1024, 2048)
TALL = (1, 200, 40) if SMALL else (1, 4096, 256)
LARGEST = [] if SMALL else [(1, 65536, 512), (1, 2048, 65536)]
MORE = [(1, 33, 301), (3, 100, 77)] if SMALL else [(1, 333, 5001), (3, 1000, 777), (1, 4096, 2048)]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# "high" is what PyTorch is told of float32 products; only "float32" has two 16-bit parts.
PRECISIONS = {"float32": F32, "high": F32, "bfloat16": BF16, "float16": F16}
# Half a unit in the last place of a gradient; but the interpreter cuts off what bfloat16 lacks.
OUTPUT = {"float32": 0, "high": 0, "bfloat16": 2**-7 if SMALL else 2**-8, "float16": 2**-11}
SINGLE = 3 * 2**-11  # each of the three factors X in a gradient rounded to 11 bits, in norm
CASES = [*product([WIDE, TALL, *MORE[:1], *LARGEST], ["auto"]), *product([SQUARE, *MORE[1:]], BOTH)]
# Not all in every precision: each variant of a kernel takes a second to compile.
PRODUCTS = [*product(CASES, ["float32", "bfloat16"]), *product([(LARGE, "auto")], PRECISIONS)]
PRODUCTS += product(product([ODD, (1, 2, 3)], BOTH), PRECISIONS)
SINGLE_COLUMNS = [*product([WIDE, TALL, LARGE, ODD, *LARGEST], ["float32"])]
SINGLE_COLUMNS += [(LARGE, "bfloat16"), (ODD, "float16")]
RUNS = [pytest.param(*r, marks=cuda_only) for r in ((LARGE, BF16), (WIDE, F32), (SQUARE, F32))]
each_run = pytest.mark.parametrize(("shape", "dtype"), RUNS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)

hinge = partial(functional.variance_loss, impl="triton")
squared = partial(hinge, form="squared")
center = partial(functional.center_loss, impl="triton")
covariance = partial(functional.covariance_loss, impl="triton")
COLUMNS = [(hinge, oracles.variance), (center, oracles.center)]
COLUMNS.append((squared, partial(oracles.variance, form="squared")))
ALL = [*COLUMNS, *((partial(covariance, strategy=s), oracles.covariance) for s in BOTH)]


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def all_kernels(z: Tensor) -> Tensor:
    return VICRegLoss(impl="triton")(z) if len(z) > 1 else covariance(z) + hinge(z)


def data(kind: str, shape: Shape, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    columns = torch.arange(1, shape[2] + 1, device=DEVICE)
    # Standard deviations of .5 to .9, and 1.5: none near the hinge's 1.
    spread = torch.where(columns % 2 == 0, 1.5, 0.5 + 0.4 * columns / shape[2])
    std = {"power": columns.float() ** -0.5, "collapse": 1e-4, "spread": spread}.get(kind, 1.0)
    mean = {"means": 10.0, "spread": 1.0}.get(kind, 0.0)
    return (normal(shape) * std + normal(shape[0], 1, shape[2]) * mean).to(dtype)


def closed_form(z: Tensor, gram: bool) -> tuple[Tensor, Tensor, float, float]:
    """Value and gradient of the covariance in float64, never D x D for D > N, and two numbers.

    With m = diag(Xc^T Xc), from ``|Xc^T Xc|^2 - |m|^2`` and ``Xc Xc^T Xc - Xc diag m``. The kernels
    of the Gram form subtract too: by how much that makes errors grow.
    """
    views, samples, dimensions = z.shape
    x = z.double() - z.double().mean(1, keepdim=True)
    m = x.square().sum(1, keepdim=True)
    inner = x @ x.mT if samples < dimensions else x.mT @ x
    whole = inner.square().sum()
    value = whole - m.square().sum()
    product = inner @ x if samples < dimensions else x @ inner
    gradient = product - x * m
    growth = (whole / value).item(), (product.norm() / gradient.norm()).item()
    factor = 1 / (views * dimensions * (samples - 1) ** 2)
    return value * factor, gradient * (4 * factor), *(growth if gram else (1.0, 1.0))


def scaled(loss: Loss, z: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient, with the loss scaling in between that a float16 gradient needs."""
    scale = 2.0 ** (8 - math.frexp(gradient.abs().max().item())[1])
    value, actual = value_and_grad(lambda leaf: scale * loss(leaf), z)
    assert actual.dtype == z.dtype
    return value.double() / scale, actual.double() / scale


@pytest.mark.parametrize(("case", "precision"), PRODUCTS, ids=str)
def test_covariance(case: tuple[Shape, str], precision: str) -> None:
    """In norm, against float64. Two 16-bit parts keep 22 bits.

    Of one part the roundings average out in the value, a sum of squares; but a tensor core cuts
    sums of 16 products to 24 bits, depth/16 times: up to 2^-23 of an element, 2^-22 of the value.
    """
    (_, samples, dimensions), strategy = case
    gram = strategy == "gram" or (strategy == "auto" and samples < dimensions)
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    for kind in ("white", "power", "means", "collapse"):
        z = data(kind, case[0], PRECISIONS[precision])
        *true, value_growth, growth = closed_form(z, gram)
        if dimensions <= 8192:
            with DEVICE:  # the formula makes a mask
                closed, true = true, oracles.truth(oracles.covariance, z)
            assert max(map(error, closed, true)) <= 1e-9
        actual = scaled(partial(covariance, strategy=strategy), z, true[1])
        if precision == "float32":
            bounds = 2e-6 * value_growth, 2e-6 + 2**-21 * (growth - 1)
        else:
            few = 2**-9 * (samples * dimensions) ** -0.5  # little to average over
            cut = (dimensions if gram else samples) * 2**-26
            bounds = (1e-4 + few + cut) * value_growth, SINGLE + few * growth + OUTPUT[precision]
        errors = [*map(error, actual, true)]
        assert all(e <= b for e, b in zip(errors, bounds, strict=True)), (kind, errors, bounds)


@pytest.mark.parametrize("term", COLUMNS, ids=["hinge", "center", "squared"])
@pytest.mark.parametrize(("shape", "precision"), SINGLE_COLUMNS, ids=str)
def test_single_columns(term: tuple[Loss, Loss], shape: Shape, precision: str) -> None:
    z = data("spread", shape, PRECISIONS[precision])
    true = oracles.truth(term[1], z)
    actual = scaled(term[0], z, true[1])
    assert error(actual[0], true[0]) <= 1e-6
    assert error(actual[1], true[1]) <= 2e-6 + OUTPUT[precision]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [SQUARE, (2, 300, 70)], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_vicreg_of_two_tensors(wanted: tuple[bool, bool], shape: Shape, precision: str) -> None:
    both = data("spread", shape, PRECISIONS[precision])

    def step(z: Tensor, impl: str) -> tuple[Tensor, ...]:
        views = [view.clone().requires_grad_(w) for view, w in zip(z, wanted, strict=True)]
        value = VICRegLoss(impl=impl)(*views)
        return value.detach(), *torch.autograd.grad(value, [v for v in views if v.requires_grad])

    true, actual = step(both.double(), "torch"), step(both, "triton")
    # Rounded to the dtype: the gradient of the invariance, that of the rest, their sum.
    bounds = (2e-6, 2e-6) if precision == "float32" else (1e-4, SINGLE + 3 * OUTPUT[precision])
    assert error(actual[0], true[0]) <= bounds[0]
    assert max(map(error, actual[1:], true[1:])) <= bounds[1]


@each_run
def test_repeats_are_equal_beside_other_work(shape: Shape, dtype: torch.dtype) -> None:
    z, side = data("white", shape, dtype), torch.cuda.Stream()
    left = torch.randn(2048, 2048, device=DEVICE, dtype=BF16)
    first = value_and_grad(all_kernels, z)
    side.wait_stream(torch.cuda.current_stream())
    for repeat in range(10):
        with torch.cuda.stream(side):
            for _ in range(7 * repeat):
                torch.mm(left, left)
        assert all(map(torch.equal, value_and_grad(all_kernels, z), first))
    torch.cuda.synchronize()


@each_run
def test_graph_replays_on_new_data(shape: Shape, dtype: torch.dtype) -> None:
    static, side = data("white", shape, dtype), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            value_and_grad(all_kernels, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = value_and_grad(all_kernels, static)
    for seed in (1, 2):
        z = data("spread", shape, dtype, seed)
        static.copy_(z)
        graph.replay()
        assert all(map(torch.equal, replayed, value_and_grad(all_kernels, z)))


@each_run
def test_host_never_waits(shape: Shape, dtype: torch.dtype) -> None:
    z = data("white", shape, dtype)
    value_and_grad(all_kernels, z)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, _ = value_and_grad(all_kernels, z)
        with pytest.raises(RuntimeError, match="synchroniz"):
            value.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@inductor.patch(compile_threads=1)
def test_compiled_code_is_eager_code_and_follows_the_precision() -> None:
    torch._dynamo.reset()
    z, gradients = data("spread", ODD), []
    for loss in (hinge, covariance):
        compiled = torch.compile(loss, fullgraph=True)
        for products in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(products)
            expected = value_and_grad(loss, z)
            assert all(map(torch.equal, value_and_grad(compiled, z), expected))
            gradients.append(expected[1])
    assert not torch.equal(*gradients[-2:])  # there was something to follow


@cuda_only
@pytest.mark.parametrize("shape", [LARGE, *LARGEST[1:]], ids=str)
def test_peak_memory(shape: Shape) -> None:
    from vicreg_losses.kernels import launch, plan

    z = data("white", shape, BF16)
    value_and_grad(covariance, z)  # compiled
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value_and_grad(covariance, z)
    peak = torch.cuda.max_memory_allocated() - before
    p = plan.plan(launch.target(z.device), shape, True, 1)
    residue = 2 * p.parts * shape[0] * (p.padded[0] * p.padded[1] + p.side**2)
    pieces = p.programs * 2 * p.inner.rows * p.inner.columns * 4 if p.is_shared else 0
    assert residue <= peak <= min(residue + pieces + 2 * z.numel() + 2**21, 1e9)


def test_addresses_past_32_bits() -> None:
    """2.2e9 elements: a block r times down and k times across; Xc^T Xc is k x k blocks r c.

    With x the centred block, c = x^T x and m = diag c, its squares off the diagonal add up to
    ``r^2 (k^2 |c|^2 - k |m|^2)``, and every block of the gradient is ``r (k x c - x diag m)``.
    """
    block, (r, k) = ((33, 20), (2, 3)) if SMALL else ((660, 330), (100, 100))
    if not SMALL and torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    one = data("white", (1, *block), BF16)[0]
    z = one.repeat(r, k).unsqueeze(0)
    assert SMALL or z.numel() > 2**31
    value, gradient = value_and_grad(covariance, z)
    x = one.double() - one.double().mean(0)
    c = x.T @ x
    m = c.diagonal()
    factor = r / (z.shape[2] * (z.shape[1] - 1) ** 2)
    energy = r * (k**2 * c.square().sum() - k * m.square().sum())
    assert error(value, factor * energy) <= 1e-4 + z.shape[1] * 2**-27
    expected = 4 * factor * (k * x @ c - x * m)
    for rows in gradient[0].split(block[0]):
        blocks = rows.view(block[0], k, block[1]).transpose(0, 1)
        assert error(blocks, expected.expand_as(blocks)) <= SINGLE + OUTPUT["bfloat16"]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda z: z.mT.contiguous().mT,
    "sliced": lambda z: torch.stack([z, z + math.nan], 2).flatten(1, 2)[:, ::2, 1:],
    "misaligned": lambda z: z.new_full((z.numel() + 1,), math.nan)[1:].view(z.shape).copy_(z),
    "expanded": lambda z: z[:1].expand(z.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    z = LAYOUTS[layout](data("spread", ODD))
    assert not z.is_contiguous() or z.data_ptr() % 16
    for loss, _ in (ALL[0], *ALL[3:]):
        actual, expected = value_and_grad(loss, z), value_and_grad(loss, z.clone().contiguous())
        pairs = (*actual, loss(z)), (*expected, actual[0])  # the last one keeps nothing
        # On a GPU another variant may give the threads other rows of a column to add.
        assert max(map(error, *pairs)) <= (0 if SMALL else 1e-6)


@each_dtype
def test_non_finite_input_shows_in_value_and_gradient(dtype: torch.dtype) -> None:
    for bad, place in product((math.nan, math.inf, -math.inf), [(0, 0, 0), (1, 7, 2), (1, -1, -1)]):
        z = data("spread", ODD, dtype)
        z[place] = bad
        for loss, _ in ALL:
            value, gradient = value_and_grad(loss, z)
            assert not value.isfinite(), (loss, bad, place)
            assert not gradient.isfinite().all(), (loss, bad, place)


@pytest.mark.parametrize("scale", [1e8, 1e12, 1e15, 1e19, 1e20, 1e25, 1e37])
def test_overflow_is_never_hidden(scale: float) -> None:
    z = scale * data("spread", ODD)
    for loss, formula in ALL:
        value, gradient = value_and_grad(loss, z)
        assert value.isfinite() or not gradient.isfinite().all(), loss
        with DEVICE:
            true_value, _ = oracles.truth(formula, z)
        assert not value.isfinite() or error(value, true_value) <= 1e-5, loss


@each_dtype
@pytest.mark.parametrize("shape", [ODD, LARGE], ids=str)
def test_exact_collapse_is_exact(shape: Shape, dtype: torch.dtype) -> None:
    for offset in (0.0, 1 / 3, (1e3 if dtype == F16 else 1e6) + 1 / 3):
        z = (offset * torch.linspace(-1, 1, shape[2])).to(DEVICE, dtype).repeat(*shape[:2], 1)
        for loss in (covariance, hinge, squared):
            value, gradient = value_and_grad(loss, z)
            assert value == 0 or loss is not covariance
            assert not gradient.any(), (loss, offset)


@cuda_only
def test_current_stream() -> None:
    z, side = data("white", WIDE), torch.cuda.Stream()
    expected, late = value_and_grad(all_kernels, z), torch.zeros_like(z)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # on another stream the kernels would see zeros
        late.copy_(z)
        actual = value_and_grad(all_kernels, late)
    torch.cuda.synchronize()
    assert all(map(torch.equal, actual, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_device_that_is_not_the_current_one() -> None:
    z, other = data("white", WIDE), torch.device("cuda", 1 - torch.cuda.current_device())
    here, there = (value_and_grad(all_kernels, t) for t in (z, z.to(other)))
    assert {t.device for t in there} == {other}
    assert all(map(torch.equal, here, (t.to(DEVICE) for t in there)))


def test_auto_takes_the_kernels_on_measured_chips_alone() -> None:
    from vicreg_losses.kernels import launch

    z, impls = data("white", ODD), ("auto", "triton", "torch")
    auto, triton, plain = (value_and_grad(partial(covariance, impl=i), z) for i in impls)
    measured = launch.target(DEVICE).arch in _dispatch.MEASURED
    assert all(map(torch.equal, auto, triton if measured else plain))
    assert not torch.equal(triton[1], plain[1])  # it can tell them apart
