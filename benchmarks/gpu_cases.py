"""The covariance term on a GPU: shapes, floor, competitors; and what all suites measure by."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import vicreg_losses as vl
from benchmarks import published
from benchmarks.gpu_measure import (
    MIB,
    Bench,
    Call,
    Row,
    Skip,
    Stage,
    figure,
    precision,
    print_table,
    time_limit,
)

Shape = tuple[int, int, int]
Loss = Callable[[Tensor], Tensor]

COMPILE_SECONDS = 40.0
ROW_SECONDS = 20.0  # all else of a row
BEAT_EAGER = 8.0  # wanted of ours over the published formula at the headline shape


@dataclass(frozen=True)
class Sizes:
    """How large everything is; shapes are (V, N, D), cuts rows, columns and warps."""

    targets: dict[Shape, float]  # forward and backward over the floor; the first is the headline
    named: tuple[Shape, ...]
    sweep: tuple[Shape, ...]
    host: tuple[Shape, ...]  # whose host time and CUDA graph are measured
    tuned: tuple[Shape, ...]
    tiles: tuple[Shape, ...]  # cuts of the products
    stages: tuple[int, ...]
    stripped: tuple[Shape, ...]
    strips: tuple[Shape, ...]  # cuts of the passes
    small: tuple[Shape, ...]
    copied: int  # bytes
    side: int  # of the square products that measure a rate
    elements: int  # sorted, scattered
    sorted_lengths: tuple[int, ...]
    sides: tuple[int, ...]  # of inner products of this depth:
    depth: int
    form_samples: int  # where the two forms meet
    projected: tuple[int, int]
    cached_mib: tuple[int, ...]


SMALL = ((1, 256, 8192), (1, 4096, 256))
LARGE = ((1, 2048, 8192), (1, 4096, 2048), (1, 16384, 2048), (1, 65536, 512), (1, 2048, 65536))
POWERS = (256, 1024, 4096, 16384, 65536)
FULL = Sizes(
    targets=dict(zip(LARGE, (1.4, 1.5, 1.35, 1.5, 1.4), strict=True)),
    named=(*SMALL, *LARGE, (2, 1024, 2048)),
    sweep=(*((1, 1024, d) for d in POWERS), *((1, n, 1024) for n in POWERS if n != 1024)),
    host=SMALL,
    tuned=(LARGE[0], LARGE[1], LARGE[3], (1, 8192, 8192), (1, 1024, 2048), SMALL[0]),
    tiles=((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 128, 4), (64, 64, 4), (64, 128, 8)),
    stages=(3, 4, 2),
    stripped=(LARGE[0], LARGE[3], SMALL[0]),
    strips=tuple((r, c, w) for r in (16, 32, 64) for c in (64, 128) for w in (4, 8)),
    small=(*SMALL, (1, 512, 512), (1, 128, 1024)),
    copied=2 << 30, side=8192, elements=1 << 24, depth=8192, form_samples=2048,
    sorted_lengths=(512, 1024, 2048, 4096, 8192, 16384, 65536), sides=(256, 512, 1024, 2048, 4096),
    projected=(4096, 256), cached_mib=(8, 16, 32, 64, 128),
)  # fmt: skip
TINY = Sizes(
    targets={(1, 16, 40): 1.4}, named=((1, 16, 40),), sweep=((2, 40, 16),),
    host=((1, 16, 40),), tuned=((1, 16, 40), (1, 40, 16)), tiles=((64, 64, 4),), stages=(2,),
    stripped=((1, 16, 40),), strips=((16, 64, 4),), small=((1, 16, 16),), copied=MIB, side=64,
    elements=4096, sorted_lengths=(64,), sides=(64,), depth=64, form_samples=64,
    projected=(64, 16), cached_mib=(1,),
)  # fmt: skip


class Rates(NamedTuple):
    """What the chip can do in a second; the defaults are an H200's under load.

    Attributes:
        flops: 16-bit operations of its tensor cores.
        bytes: of memory.
        clocks: of all processors together.
    """

    flops: float = 790e12
    bytes: float = 4.3e12
    clocks: float = 132 * 1.755e9


def floor_us(
    shape: Shape, input_bytes: int, parts: int, forward_only: bool, rates: Rates | None = None
) -> float:
    """The time below which the covariance term cannot be evaluated this way, in microseconds.

    With m = min(N, D): the forward reads the input (a second time from a cache, at best) and writes
    a centred copy of ``parts`` 16-bit numbers for each element; then half of a symmetric product, 1
    or (of two parts) 3 times N D m operations, while it reads the copy and writes m x m. The
    backward is a whole product, which reads both and writes the gradient. Each product is bound by
    operations or by memory.

    Args:
        shape: (V, N, D).
        input_bytes: of an element.
        parts: 2 for products of float32 quality.
        forward_only: without the backward.
        rates: of the chip.
    """
    flops, bandwidth, _ = rates or Rates()
    views, samples, dimensions = shape
    m = min(samples, dimensions)
    elements = views * samples * dimensions
    work = (1 if parts == 1 else 3) * elements * m
    copy, inner = 2 * parts * elements, 2 * parts * views * m * m
    centring = (input_bytes * elements + copy) / bandwidth
    forward = centring + max(work / flops, (copy + inner) / bandwidth)
    moved = inner + copy + input_bytes * elements
    backward = max(2 * work / flops, moved / bandwidth)
    return 1e6 * (forward if forward_only else forward + backward)


def ceilings(bench: Bench) -> Row:
    """Rates of this chip: bytes of a copy, operations of 16-bit and float32 products."""
    sizes = TINY if bench.dry else FULL
    x = torch.zeros(sizes.copied, dtype=torch.uint8, device=bench.device)
    rates = {"bytes": 2e6 * x.numel() / bench.time_us([partial(torch.empty_like(x).copy_, x)])}
    half, single = (torch.float16, sizes.side), (torch.float32, sizes.side // 2)
    for name, (dtype, side) in {"flops": half, "float32_flops": single}.items():
        a = torch.randn(side, side, device=bench.device).to(dtype)
        with precision("highest"):
            rates[name] = 2e6 * side**3 / bench.time_us([partial(torch.mm, a, a)], 200.0)
    del x, a
    if not bench.dry:
        torch.cuda.empty_cache()
    return {**rates, "summary": [listed(rates)]}


class Competitor(NamedTuple):
    """A way to evaluate a loss; the published formula has 16 bits under autocast."""

    name: str
    kind: str  # "triton" and "torch" are ours; "compiled" is the published formula, too
    dtype: torch.dtype
    precision: str  # of float32 products
    parts: int  # of the floor it is held against


COMPETITORS = (
    Competitor("triton bf16", "triton", torch.bfloat16, "highest", 1),
    Competitor("triton high", "triton", torch.float32, "high", 1),
    Competitor("triton highest", "triton", torch.float32, "highest", 2),
    Competitor("torch bf16", "torch", torch.bfloat16, "highest", 1),
    Competitor("torch highest", "torch", torch.float32, "highest", 2),
    Competitor("published bf16", "published", torch.bfloat16, "highest", 1),
    Competitor("published high", "published", torch.float32, "high", 1),
    Competitor("published highest", "published", torch.float32, "highest", 2),
    Competitor("compiled bf16", "compiled", torch.bfloat16, "highest", 1),
    Competitor("compiled high", "compiled", torch.float32, "high", 1),
)
OURS = ("triton", "torch")
BY_NAME = {competitor.name: competitor for competitor in COMPETITORS}


def label(shape: Shape) -> str:
    """A shape as one word."""
    return "x".join(map(str, shape))


def loss_of(competitor: Competitor, bench: Bench) -> Loss:
    """What maps (V, N, D) embeddings to the covariance term."""
    if competitor.kind in OURS:
        return vl.CovarianceLoss(impl=competitor.kind)
    return as_trained(published.covariance, competitor, bench)


def as_trained(function: Loss, competitor: Competitor, bench: Bench) -> Loss:
    """A published formula, compiled or not; under autocast where the embeddings have 16 bits."""
    if competitor.kind == "compiled":
        backend = "eager" if bench.dry else "inductor"
        function = torch.compile(function, dynamic=False, backend=backend)
    if competitor.dtype == torch.float32:
        return function

    def under_autocast(z: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, competitor.dtype):
            return function(z)

    return under_autocast


def step(loss: Loss, z: Tensor) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(loss(z), z)[0]


def measured(
    bench: Bench,
    shape: Shape,
    competitor: Competitor,
    make: Callable[[], Loss],
    floor: Callable[[bool], float],
) -> Row:
    """Times, peak memory and share of the floor of one competitor at one shape.

    Args:
        bench: the device.
        shape: (V, N, D).
        competitor: who.
        make: makes the loss.
        floor: the floor in microseconds; its argument says whether of the forward alone.
    """
    row: Row = {}
    try:
        with precision(competitor.precision):
            copies = bench.copies(*shape, dtype=competitor.dtype)
            loss = make()
            if competitor.kind == "compiled":
                begin = time.perf_counter()
                with time_limit(COMPILE_SECONDS):
                    step(loss, copies[0])
                    bench.sync()
                row["compile_s"] = time.perf_counter() - begin
            with time_limit(ROW_SECONDS):
                for which, call in (("forward", loss), ("step", partial(step, loss))):
                    calls = [partial(call, z) for z in copies]
                    row[f"{which}_us"] = time_us = bench.time_us(calls)
                    row[f"{which}_floor_us"] = least = floor(which == "forward")
                    row[f"{which}_of_floor"] = least / time_us
                    row[f"{which}_peak_mib"] = bench.peak_mib(calls[0])
    except (TimeoutError, torch.OutOfMemoryError) as error:
        raise Skip(f"{type(error).__name__}: {error}"[:200]) from None
    finally:
        if competitor.kind == "compiled":
            torch._dynamo.reset()
    return row


def free_bytes(bench: Bench) -> int:
    """Free memory of the device."""
    return 1 << 40 if bench.dry else torch.cuda.mem_get_info()[0]


def require(needed: float, free: float) -> None:
    """Leave a row out that would not fit the memory."""
    if needed > free:
        raise Skip(f"needs {needed / MIB:.0f} MiB, {free / MIB:.0f} MiB are free")


def covariance_row(
    bench: Bench, shape: Shape, competitor: Competitor, rates: Rates, free: int
) -> Row:
    """The covariance term by one competitor at one shape."""
    if competitor.kind not in OURS:
        require(6 * 4 * shape[2] ** 2, 0.6 * free)  # float32 matrices D x D
    floor = partial(floor_us, shape, competitor.dtype.itemsize, competitor.parts, rates=rates)
    return measured(bench, shape, competitor, partial(loss_of, competitor, bench), floor)


def suite(stage: Stage, rates: Rates) -> None:
    """All competitors at all shapes: the named ones first, compiled ones after the others."""
    bench = stage.bench
    sizes, free, first = TINY if bench.dry else FULL, free_bytes(bench), len(stage.asked)
    for shapes in (sizes.named, sizes.sweep):
        for compiled in (False, True):
            for shape in shapes:
                for competitor in COMPETITORS:
                    if (competitor.kind == "compiled") == compiled:
                        row = partial(covariance_row, bench, shape, competitor, rates, free)
                        stage.row(f"{label(shape)} {competitor.name}", row)
            if shapes is sizes.named and not compiled:
                for small in sizes.host:
                    for name in ("triton bf16", "torch bf16", "published bf16"):
                        z = bench.randn(*small, dtype=torch.bfloat16).requires_grad_()
                        call = partial(step, loss_of(BY_NAME[name], bench), z)
                        launches(stage, f"{label(small)} {name}", call)
    print_suite(stage, "covariance term", stage.asked[first:])
    _summarise(stage, sizes)


def launches(stage: Stage, name: str, call: Call) -> None:
    """Host time of forward and backward, and ours as a CUDA graph."""
    stage.row(f"host {name}", partial(stage.bench.host, call))
    if " triton " in name:
        stage.row(f"graph {name}", partial(stage.bench.replay, call))


def print_suite(stage: Stage, title: str, names: Sequence[str]) -> None:
    """Forward and backward as a table; all else as lines of the summary."""
    columns = ("forward_us", "step_us", "step_floor_us", "step_of_floor", "step_peak_mib")
    rows = {name: stage.rows[name] for name in names if name in stage.rows}
    alone = [name for name in rows if name.startswith(("host", "graph", "sort", "draw"))]
    table = [
        [name, *(row.get(column, "error" if "error" in row else None) for column in columns)]
        for name, row in rows.items()
        if name not in alone
    ]
    print_table(f"{title}: microseconds, MiB", ("shape, by", *columns), table)
    for name in alone:
        if "error" not in rows[name]:
            stage.say(f"{name}: {listed(rows[name])}")


def _summarise(stage: Stage, sizes: Sizes) -> None:
    def took(shape: Shape, name: str) -> float | None:
        return stage.rows.get(f"{label(shape)} {name}", {}).get("step_us")

    targets, slower, compared = [], [], 0
    for shape, wanted in sizes.targets.items():
        ours = took(shape, "triton bf16")
        if ours is not None:
            floor = stage.rows[f"{label(shape)} triton bf16"]["step_floor_us"]
            entry = {"ratio": ours / floor, "wanted": wanted, "met": ours <= wanted * floor}
            entry["ratio_at_usual_rates"] = ours / floor_us(shape, 2, 1, False)
            targets.append({"shape": label(shape), **entry})
            stage.say(f"{label(shape)} bf16: {ours:.1f} us, floor {floor:.1f} us, {listed(entry)}")
    headline = next(iter(sizes.targets))
    for kind in ("bf16", "highest"):
        ours, other = took(headline, f"triton {kind}"), took(headline, f"published {kind}")
        if ours and other:
            entry = {"ratio": other / ours, "wanted": BEAT_EAGER, "met": other >= BEAT_EAGER * ours}
            targets.append({"published over triton": kind, **entry})
            stage.say(f"{label(headline)} {kind}, published over triton: {listed(entry)}")
    for shape in (*sizes.named, *sizes.sweep):
        for kind in ("bf16", "high"):
            ours, other = took(shape, f"triton {kind}"), took(shape, f"compiled {kind}")
            compared += bool(ours and other)
            if ours and other and ours > other:
                slower.append(f"{label(shape)} {kind} {ours / other:.2f}x")
    stage.record |= {"targets": targets, "slower_than_compiled": slower}
    stage.say(f"slower than torch.compile, of {compared}: {', '.join(slower) or 'none'}")


def listed(row: Row) -> str:
    """A row as one line."""
    return ", ".join(f"{key} {figure(value)}" for key, value in row.items())
