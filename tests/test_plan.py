"""How the kernels cut their work: every way to cut gives the same result, and fits every chip."""

import math
import os
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from vicreg_losses.kernels import device, launch, plan  # noqa: E402
from vicreg_losses.kernels.centering import center, own_tickets  # noqa: E402
from vicreg_losses.kernels.gradient import product_gradient  # noqa: E402
from vicreg_losses.kernels.inner import inner_product  # noqa: E402
from vicreg_losses.kernels.launch import SHARED, Target  # noqa: E402
from vicreg_losses.kernels.moments import moments  # noqa: E402
from vicreg_losses.kernels.plan import Blocks, Plan  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="needs Triton's interpreter")
SQUARE = Blocks(16, 16, 16, 4, 1)
WIDE = Blocks(16, 32, 16, 4, 1)
PIECES = Blocks(16, 128, 16, 4, 1)  # an epilogue in two pieces


def covariance(z: Tensor, cut: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, gradient, inner product and tickets, by the kernels as they are cut."""
    views, samples, dimensions = z.shape
    own = own_tickets(views, dimensions, cut.padded)
    columns = moments(z, own + cut.tickets)
    centered = center(columns, "", 1.0, 1e-4, cut.parts, cut.gram, cut.padded)
    shape = (views, samples, dimensions)
    value, inner = inner_product(centered, shape, cut, columns.tickets[own:], keep=True)
    one = torch.ones((), device=z.device)
    factor = 4 / (views * dimensions * (samples - 1) ** 2)
    operand = centered.centered
    gradient = product_gradient(
        operand, inner, centered.statistics, centered.scales,
        shape, cut, (one, value, factor), None, None, z.dtype,
    )  # fmt: skip
    return value, gradient, inner, columns.tickets[own:]


def batch(views: int, samples: int, dimensions: int) -> Tensor:
    return oracles.embeddings(views, samples, dimensions, dtype=torch.float32).to(DEVICE)


def tiny(shape: tuple[int, int, int], gram: bool, parts: int, **choice: object) -> Plan:
    blocks = {"inner": SQUARE, "gradient": SQUARE, **choice}
    return plan.cut(launch.target(torch.device(DEVICE)), shape, gram, parts, **blocks)


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "feature"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("blocks", [SQUARE, WIDE, PIECES], ids=["square", "wide", "pieces"])
@pytest.mark.parametrize("shape", [(1, 17, 50), (2, 40, 33)], ids=str)
def test_every_cut_gives_the_same(
    gram: bool, parts: int, blocks: Blocks, shape: tuple[int, int, int]
) -> None:
    z = batch(*shape)
    value, true_gradient = oracles.truth(oracles.covariance, z)
    bound = 4 * 2.0 ** (-11 * parts)  # as in test_kernels; the share of the rest is over a half
    whole = tiny(shape, gram, parts, inner=blocks, gradient=blocks).steps
    inners = []
    for span in {1, 2, 3, whole - 1, whole, whole + 1, 5 * whole + 2} - {0}:
        cut = tiny(shape, gram, parts, inner=blocks, gradient=blocks, span=span)
        assert cut.is_shared == (span % whole != 0)
        ours, gradient, inner, tickets = covariance(z, cut)
        assert oracles.error(ours, value) <= 2 * bound
        assert oracles.error(gradient, true_gradient) <= 2 * bound
        # All tiles came in; of a shared tile each program that had steps of it.
        tiles = shape[0] * cut.tiles
        assert tickets[0] == tiles
        if cut.is_shared:
            programs = [
                len({step // span for step in range(t * whole, (t + 1) * whole)})
                for t in range(tiles)
            ]
            expected = programs
            assert tickets[1:].tolist() == expected
        # Both triangles, and a zero diagonal in the feature form.
        low_order = 2.0**-20 if parts == 2 else 0  # products of two parts do not commute to a bit
        wide = inner.double().sum(0)
        torch.testing.assert_close(wide, wide.mT, rtol=low_order, atol=low_order * wide.max())
        assert gram or wide.diagonal(dim1=1, dim2=2).count_nonzero() == 0
        inners.append(wide)
    for other in inners[1:]:
        assert oracles.error(other, inners[0]) <= 2.0 ** (-10 * parts)


@interpreted
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "feature"])
@pytest.mark.parametrize("order", ["backward", "shuffled"])
def test_the_order_of_programs_changes_no_bit(
    gram: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes last differs on a GPU from run to run; the sums must not."""
    from triton.runtime import interpreter

    z = batch(2, 40, 50)
    cut = tiny((2, 40, 50), gram, 2, span=2)
    assert cut.is_shared
    expected = covariance(z, cut)
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx

    def permuted(x: int, y: int, w: int) -> None:
        count = builder.grid_dim[0]
        places = list(range(count))[::-1]
        if order == "shuffled":
            shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(count))
            places = shuffled.tolist()
        original(places[x], y, w)

    monkeypatch.setattr(builder, "set_grid_idx", permuted)
    for actual, before in zip(covariance(z, cut), expected, strict=True):
        assert torch.equal(actual, before)


@triton.jit
def _numbered(out_ptr, rows, BAND: tl.constexpr):
    place = tl.program_id(0)
    row, column = device.banded_triangle(place, rows, BAND)
    tl.store(out_ptr + 2 * place, row)
    tl.store(out_ptr + 2 * place + 1, column)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 17, 24])
@pytest.mark.parametrize("band", [1, 4, 8])
def test_bands_number_every_tile_once(rows: int, band: int) -> None:
    count = rows * (rows + 1) // 2
    out = torch.empty(count, 2, dtype=torch.int32, device=DEVICE)
    _numbered[(count,)](out, rows, BAND=band)
    triangle = [(r, c) for r in range(rows) for c in range(r + 1)]
    assert sorted(map(tuple, out.tolist())) == triangle


@triton.jit
def _scaled(bound_ptr, out_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    power = device.power_of_two(tl.load(bound_ptr + i, mask=i < count, other=0), 14)
    tl.store(out_ptr + i, power, mask=i < count)
    tl.store(out_ptr + count + i, device.inverse(power), mask=i < count)


def test_power_of_two() -> None:
    bounds = [0.0, 1e-45, 1e-38, 1e-20, 0.99, 1.0, 1.01, 2.0, 16383.0, 16384.0, 1e20, 3e38]
    bound = torch.tensor(bounds, device=DEVICE)
    out = torch.empty(2, len(bounds), device=DEVICE)
    _scaled[(1,)](bound, out, len(bounds), BLOCK=16)
    power, inverse = out.double().cpu()
    assert torch.equal(power * inverse, torch.ones_like(power))
    assert torch.equal(power.log2(), power.log2().round())
    assert power[0] == 1
    reached = bound.cpu().double() * power
    assert (reached[1:] < 2**14).all()
    assert (reached[3:] >= 2**13).all()  # below that the scale stays a normal number


def test_headline_shapes_fill_the_chip() -> None:
    """On 132 processors: a last round that is almost full, or pieces that are equal."""
    hopper = Target("sm_90", 132, SHARED["sm_90"])
    for shape in [(1, 2048, 8192), (1, 4096, 2048), (1, 16384, 2048), (1, 2048, 65536)]:
        cut = plan.plan(hopper, shape, shape[1] < shape[2], 1)
        assert cut.is_shared
        assert (cut.inner.rows, cut.inner.columns) == (128, 128)
        assert cut.programs == hopper.processors
        tiles = math.prod(-(-p // b) for p, b in zip(cut.padded, cut.gradient[:2], strict=True))
        rounds = tiles / hopper.processors
        assert rounds / math.ceil(rounds) > 0.9


def gate(*flags: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the compile gate on one shape, in a process without the interpreter."""
    code = "import sys\nfrom benchmarks import compile_gate\n"
    if limit is not None:
        code += f"compile_gate.launch.SHARED['sm_90'] = {limit}\n"
    code += f"sys.argv[1:] = {[*flags, '--quick']}\ncompile_gate.main()"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


source_tree = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="not a source tree")


@source_tree
@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_kernels_compile_without_a_device(chip: str) -> None:
    """For one shape here; `make gate` does it for all shapes, dtypes and chips."""
    pytest.importorskip("rich")
    done = gate("--chip", chip)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for kernel in ("moments", "center", "inner", "gradient", "column_gradient"):
        assert f"_{kernel}_kernel" in done.stdout


@source_tree
def test_the_compile_gate_can_fail() -> None:
    pytest.importorskip("rich")
    done = gate("--chip", "sm_90", limit=20_000)
    assert done.returncode == 1
    assert "of shared memory, over 20000" in done.stdout
