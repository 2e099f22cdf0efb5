"""Shapes, floors, the suite and single measurements of the GPU benchmark."""

import time
from collections.abc import Callable
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
    """What the chip can do in a second: 16-bit operations of its tensor cores, bytes of memory."""

    flops: float = 790e12
    bytes: float = 4.3e12


def floor_us(
    shape: Shape, input_bytes: int, parts: int, forward_only: bool, rates: Rates | None = None
) -> float:
    """The time below which the covariance term cannot be evaluated this way, in microseconds.

    With m = min(N, D): the forward reads the input twice and writes a centred copy of ``parts``
    16-bit numbers for each element; then half of a symmetric product, 1 or (of two parts) 3 times
    N D m operations, while it reads the copy and writes m x m. The backward is a whole product,
    which reads both and writes the gradient. Each product is bound by operations or by memory.

    Args:
        shape: (V, N, D).
        input_bytes: of an element.
        parts: 2 for products of float32 quality.
        forward_only: without the backward.
        rates: of the chip.
    """
    flops, bandwidth = rates or Rates()
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


def ceilings(bench: Bench, sizes: Sizes) -> Row:
    """Rates of this chip: bytes of a copy, operations of 16-bit and float32 products."""
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
    return {**rates, "summary": [_listed(rates)]}


class Competitor(NamedTuple):
    """A way to evaluate the covariance term; the published formula has bfloat16 under autocast."""

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
BY_NAME = {competitor.name: competitor for competitor in COMPETITORS}


def label(shape: Shape) -> str:
    """A shape as one word."""
    return "x".join(map(str, shape))


def loss_of(competitor: Competitor, bench: Bench) -> Loss:
    """What maps (V, N, D) embeddings to the covariance term."""
    if competitor.kind in ("triton", "torch"):
        return vl.CovarianceLoss(impl=competitor.kind)
    function = published.covariance
    if competitor.kind == "compiled":
        backend = "eager" if bench.dry else "inductor"
        function = torch.compile(function, dynamic=False, backend=backend)
    if competitor.dtype == torch.float32:
        return function

    def under_autocast(z: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            return function(z)

    return under_autocast


def step(loss: Loss, z: Tensor) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(loss(z), z)[0]


def measured(bench: Bench, shape: Shape, competitor: Competitor, rates: Rates, free: int) -> Row:
    """Times, peak memory and share of the floor of one competitor at one shape."""
    is_ours = competitor.kind in ("triton", "torch")
    needed = 6 * 4 * shape[2] ** 2  # float32 matrices D x D
    if not is_ours and needed > 0.6 * free:
        raise Skip(f"needs {needed >> 20} MiB, {free >> 20} MiB are free")
    row: Row = {}
    with precision(competitor.precision):
        copies = bench.copies(*shape, dtype=competitor.dtype)
        loss = loss_of(competitor, bench)
        try:
            if competitor.kind == "compiled":
                begin = time.perf_counter()
                with time_limit(COMPILE_SECONDS):
                    step(loss, copies[0])
                    bench.sync()
                row["compile_s"] = time.perf_counter() - begin
            for which, call in (("forward", loss), ("step", partial(step, loss))):
                calls = [partial(call, z) for z in copies]
                size = competitor.dtype.itemsize
                floor = floor_us(shape, size, competitor.parts, which == "forward", rates)
                time_us = bench.time_us(calls)
                row[f"{which}_us"] = time_us
                row[f"{which}_floor_us"] = floor
                row[f"{which}_of_floor"] = floor / time_us
                row[f"{which}_peak_mib"] = bench.peak_mib(calls[0])
        finally:
            if competitor.kind == "compiled":
                torch._dynamo.reset()
    return row


def suite(stage: Stage, sizes: Sizes, rates: Rates) -> None:
    """All competitors at all shapes: the named ones first, compiled ones after the others."""
    bench = stage.bench
    free = 1 << 40 if bench.dry else torch.cuda.mem_get_info()[0]
    for shapes in (sizes.named, sizes.sweep):
        for compiled in (False, True):
            for shape in shapes:
                for competitor in COMPETITORS:
                    if (competitor.kind == "compiled") == compiled:
                        name = f"{label(shape)} {competitor.name}"
                        stage.row(name, partial(measured, bench, shape, competitor, rates, free))
            if shapes is sizes.named and not compiled:
                _launches(stage, sizes)
    columns = ("forward_us", "step_us", "step_floor_us", "step_of_floor", "step_peak_mib")
    table = [
        [name, *(row.get(column, "error" if "error" in row else None) for column in columns)]
        for name, row in stage.rows.items()
        if not name.startswith(("host", "graph"))
    ]
    print_table("covariance term: microseconds, MiB", ("shape, by", *columns), table)
    _summarise(stage, sizes)


def _launches(stage: Stage, sizes: Sizes) -> None:
    """Host time of forward and backward, and its time as a CUDA graph."""
    bench = stage.bench
    for shape in sizes.host:
        for name in ("triton bf16", "torch bf16", "published bf16"):
            z = bench.randn(*shape, dtype=torch.bfloat16).requires_grad_()
            call = partial(step, loss_of(BY_NAME[name], bench), z)
            stage.row(f"host {label(shape)} {name}", partial(bench.host, call))
            if name.startswith("triton"):
                stage.row(f"graph {label(shape)} {name}", partial(bench.replay, call))


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
            stage.say(f"{label(shape)} bf16: {ours:.1f} us, floor {floor:.1f} us, {_listed(entry)}")
    headline = next(iter(sizes.targets))
    for kind in ("bf16", "highest"):
        ours, other = took(headline, f"triton {kind}"), took(headline, f"published {kind}")
        if ours and other:
            entry = {"ratio": other / ours, "wanted": BEAT_EAGER, "met": other >= BEAT_EAGER * ours}
            targets.append({"published over triton": kind, **entry})
            stage.say(f"{label(headline)} {kind}, published over triton: {_listed(entry)}")
    for shape in (*sizes.named, *sizes.sweep):
        for kind in ("bf16", "high"):
            ours, other = took(shape, f"triton {kind}"), took(shape, f"compiled {kind}")
            compared += bool(ours and other)
            if ours and other and ours > other:
                slower.append(f"{label(shape)} {kind} {ours / other:.2f}x")
    stage.record |= {"targets": targets, "slower_than_compiled": slower}
    stage.say(f"slower than torch.compile, of {compared}: {', '.join(slower) or 'none'}")
    for name, row in stage.rows.items():
        if name.startswith(("host", "graph")) and "error" not in row:
            stage.say(f"{name}: {_listed(row)}")


def _listed(row: Row) -> str:
    return ", ".join(f"{key} {figure(value)}" for key, value in row.items())


def fastest(**times: float) -> Row:
    """Times in microseconds, and whose is the shortest."""
    return {"fastest": min(times, key=times.__getitem__), **{f"{k}_us": times[k] for k in times}}


def matrix_product(bench: Bench, a: Tensor, b: Tensor, wide: bool) -> Call:
    """A call of `torch.mm`; CPUs have none with a float32 result."""
    options = {"out_dtype": torch.float32} if wide and not bench.dry else {}
    return partial(torch.mm, a, b, **options)


def sorting(bench: Bench, elements: int, length: int, dtype: torch.dtype) -> Row:
    """Rate of `torch.sort` along rows."""
    x = bench.randn(elements // length, length, dtype=dtype)
    return {"gkeys_s": 1e-3 * elements / bench.time_us([partial(torch.sort, x)], 20.0)}


def forms(bench: Bench, shape: Shape) -> Row:
    """Forward and backward by the two forms."""
    z = bench.copies(*shape, dtype=torch.bfloat16)
    losses = {form: vl.CovarianceLoss(form, impl="triton") for form in ("gram", "feature")}
    times = {k: bench.time_us([partial(step, loss, x) for x in z]) for k, loss in losses.items()}
    return fastest(**times)


def small(bench: Bench, shape: Shape) -> Row:
    """Forward and backward: on the device, and as the host waits for it."""
    z = bench.copies(*shape, dtype=torch.bfloat16)
    times, row = {}, {}
    for kind in ("triton", "torch", "published"):
        loss = loss_of(BY_NAME[f"{kind} bf16"], bench)
        times[kind] = bench.time_us([partial(step, loss, x) for x in z])
        row[f"{kind}_wall_us"] = bench.host(partial(step, loss, z[0]))["wall_us"]
    return fastest(**times) | row


def scattering(bench: Bench, elements: int) -> Row:
    """Permuting each row of 16-bit numbers, with indices of 64 bits, against a copy."""
    side = int(elements**0.5)
    x = bench.randn(side, side, dtype=torch.float16)
    out, place = torch.empty_like(x), bench.randn(side, side).argsort(1)
    scatter = bench.time_us([partial(out.scatter_, 1, place, x)], 10.0)
    return fastest(scatter=scatter, copy=bench.time_us([partial(out.copy_, x)], 10.0))


def projections(bench: Bench, samples: int, depth: int) -> Row:
    """A product with a 16-bit and with a float32 result."""
    a = bench.randn(samples, depth, dtype=torch.float16)
    times = [bench.time_us([matrix_product(bench, a, a.T, wide)], 10.0) for wide in (False, True)]
    return fastest(half=times[0], single=times[1])


def cached(bench: Bench, mib: int) -> Row:
    """Rate of reading a buffer again and again."""
    x = bench.randn(mib * MIB // 4)
    return {"tb_s": 1e-6 * mib * MIB / bench.time_us([x.sum], 5.0)}
