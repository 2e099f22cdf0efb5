"""Eight questions whose answers are numbers in the code."""

import itertools
from functools import partial

import torch

import vicreg_losses as vl
from benchmarks.gpu_cases import (
    BY_NAME,
    FULL,
    TINY,
    Rates,
    Shape,
    label,
    loss_of,
    step,
)
from benchmarks.gpu_measure import MIB, Bench, Row, Stage, figure, print_table
from benchmarks.gpu_tuning import Problem, matrix_product
from vicreg_losses.kernels import centering, moments

PASSES = ("moments_us", "center_us", "moments_share", "center_share")


def thresholds(stage: Stage, rates: Rates) -> None:
    """Ask all of them."""
    bench, row = stage.bench, stage.row
    sizes = TINY if bench.dry else FULL
    for dtype, length in itertools.product((torch.float32, torch.float16), sizes.sorted_lengths):
        name = f"1 sort: {dtype.itemsize} B x {length}"
        row(name, partial(sorting, bench, sizes.elements, length, dtype))
    for side in sizes.sides:
        row(f"2 half product or mm: {side}", partial(_library, bench, (1, side, sizes.depth)))
    for percent in (87, 100, 115):
        shape = 1, sizes.form_samples, 64 * round(sizes.form_samples * percent / 6400)
        row(f"3 form, D/N: {percent}%", partial(forms, bench, shape))
    for shape in sizes.small:
        row(f"4 small: {label(shape)}", partial(small, bench, shape))
    for shape in sizes.targets:
        row(f"5 two passes: {label(shape)}", partial(_passes, bench, shape, rates))
    row("6 scatter: 16 bits", partial(scattering, bench, sizes.elements))
    row("7 projections: 16 bits", partial(projections, bench, *sizes.projected))
    for mib in sizes.cached_mib:
        row(f"8 cache: {mib} MiB", partial(cached, bench, mib))
    answers: dict[str, list[str]] = {}
    for name, figures in stage.rows.items():
        question, case = name.split(": ")
        keys = " / ".join(figures)
        shown = " / ".join(map(figure, figures.values())) if "error" not in figures else "error"
        answers.setdefault(f"{question} ({keys})", []).append(f"{case}: {shown}")
    stage.record["answers"] = answers
    for question, found in answers.items():
        stage.say(f"{question}: {'; '.join(found)}")
        print_table(question, ("answer",), [[each] for each in found])


def fastest(**times: float) -> Row:
    """Times in microseconds, and whose is the shortest."""
    return {"fastest": min(times, key=times.__getitem__), **{f"{k}_us": times[k] for k in times}}


def _library(bench: Bench, shape: Shape) -> Row:
    """Half of a product with its energy, or all of it and the energy by the library."""
    p = Problem(bench, shape)
    return fastest(ours=p.inner_us(p.current), mm=p.library_us("inner", True, square_sum=True))


def _passes(bench: Bench, shape: Shape, rates: Rates) -> Row:
    """The two passes over the embeddings: time, and how much of it their bytes take."""
    p = Problem(bench, shape)
    tickets = centering.own_tickets(shape[0], shape[2], p.current.padded) + p.current.tickets
    columns = moments.moments(p.z, tickets)
    first = bench.time_us([partial(moments.moments, p.z, tickets)], 10.0)
    second = bench.time_us([partial(p.center, columns, p.current)], 10.0, columns.tickets.zero_)
    bandwidth = 1e-6 * rates.bytes
    shares = p.z.nbytes / bandwidth / first, (p.z.nbytes + 2 * p.z.numel()) / bandwidth / second
    return dict(zip(PASSES, (first, second, *shares), strict=True))


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
