"""The sliced sketch on a GPU: the suite, and what is wanted of it."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

import vicreg_losses as vl
from benchmarks.gpu_cases import Rates, free_bytes, launches, print_suite, step
from benchmarks.gpu_measure import Bench, Call, Row, Stage, figure
from benchmarks.gpu_sketch_cases import (
    F16,
    F32,
    FULL,
    TINY,
    Case,
    Cases,
    Sizes,
    loss_of,
    row_of,
    sort_floor_us,
)
from vicreg_losses.kernels import directions, launch, plan
from vicreg_losses.kernels.rows import Rows
from vicreg_losses.kernels.sort import sort_residual, targets

# Wanted: forward and backward, and the ratios of the published formula's time to ours.
VISREG_US, BEAT_VISREG, BEAT_AT_THE_END = 600.0, 5.0, 5.0
BEAT_SORT = 5.0  # of the library's sort to ours
SIGREG_FLOOR_US, BEAT_SIGREG, SIGREG_MEMORY = 102.0, 20.0, 0.02
STRAIGHT = 0.15  # distance of the cost from a line
NAMED = (("triton", "highest"), ("triton", "high"), ("torch", "half"), ("torch", "highest"))
NAMED += (("published", "high"), ("published", "highest"))


def suite(stage: Stage, rates: Rates) -> None:
    """What is wanted first, then all sweeps, then what is compiled."""
    bench, first = stage.bench, len(stage.asked)
    sizes, free = TINY if bench.dry else FULL, free_bytes(bench)

    def rows(cases: Sequence[Case], *who: tuple[str, str]) -> None:
        for case in cases:
            for kind, products in who:
                competitor = case.competitor(kind, products)
                name = f"{case.name} {competitor.name}"
                stage.row(name, partial(row_of, bench, case, competitor, rates, free))

    ours, published, compiled = ((by, "half") for by in ("triton", "published", "compiled"))
    named = (sizes.visreg, sizes.visreg._replace(loss="visreg"), sizes.sigreg)
    swept = tuple(case for cases in sizes.axes.values() for case in cases)
    rows(named, ours, published)
    for case in (sizes.visreg, sizes.sigreg):
        sort_rows(stage, case, rates)
    rows(sizes.cost, ours)
    rows(sizes.cost[::-1], published)
    for case in (sizes.visreg, sizes.cost[0]):
        draw_rows(stage, case.dimensions, case.slices, rates)
    rows(swept, ours)
    rows(named, *NAMED)
    for case in named:
        z = bench.randn(*case.shape, dtype=case.half).requires_grad_()
        for kind, _ in (ours, published):
            call = partial(step, loss_of(case, case.competitor(kind, "half"), bench), z)
            launches(stage, f"{case.name} {kind} half", call)
    rows(sizes.others, ours, published, ("triton", "highest"))
    rows((*swept, *sizes.others), published, ("torch", "half"))
    rows(named, compiled, ("compiled", "high"))
    rows((*sizes.cost, *swept, *sizes.others), compiled)
    print_suite(stage, "sketch", stage.asked[first:])
    _summarise(stage, sizes)


def sort_call(
    bench: Bench, shape: tuple[int, int, int], parts: int, network: plan.Network | None
) -> Call:
    """A call that sorts projections by our kernels and writes their residuals.

    Args:
        bench: the device.
        shape: (K, V, N).
        parts: 1 for an order of equal steps, 2 for that of float32.
        network: in registers, or ``None`` for the library's sort.
    """
    p = bench.randn(*shape)
    levels = torch.arange(1, shape[2] + 1, device=p.device) / (shape[2] + 1)
    constants = targets(torch.special.ndtri(levels), network)
    scales = torch.ones(shape[1], 4, dtype=torch.float64, device=p.device)
    residual = torch.empty((parts, *shape), dtype=F16, device=p.device)
    sums = p.new_empty(shape[1], shape[0])
    rows = Rows(p, shape[2], scales, 1.0, residual, 1.0, sums, 0, parts)
    return partial(sort_residual, rows, constants)


def sort_name(case: Case) -> str:
    """What rows of the sort of a case's projections begin with."""
    return f"sort {case.views}x{case.samples} k{case.slices}"


def sort_rows(stage: Stage, case: Case, rates: Rates) -> None:
    """The sort of a case's projections alone, ours and the library's."""
    bench, name, samples = stage.bench, sort_name(case), case.samples
    shape, elements = (case.slices, case.views, samples), case.slices * case.views * samples

    def timed(parts: int, make: Callable[[], Call]) -> Row:
        least, us = sort_floor_us(elements, samples, parts, rates), bench.time_us([make()])
        return {
            "us": us,
            "floor_us": least,
            "of_floor": least / us,
            "gkeys_s": 1e-3 * elements / us,
        }

    for order, parts in (("steps", 1), ("exact", 2)):
        network = plan.network(launch.target(bench.device), samples, parts == 2)
        ours = partial(sort_call, bench, shape, parts, network)
        stage.row(f"{name} triton {order}", partial(timed, parts, ours))
    for dtype in (case.half, F32):

        def library(dtype: torch.dtype = dtype) -> Call:
            return partial(torch.sort, bench.randn(*shape, dtype=dtype))

        stage.row(f"{name} torch.sort {8 * dtype.itemsize} bits", partial(timed, 1, library))


def draw_rows(stage: Stage, dimensions: int, slices: int, rates: Rates) -> None:
    """The draw of the slices alone; its floor is their writing."""
    bench = stage.bench
    like = bench.randn(1, dimensions)
    module = vl.SlicedSketchLoss(slices, impl="torch")
    zero = torch.zeros((), dtype=torch.int64, device=bench.device)
    kernel = partial(directions.draw, zero, zero, 0, dimensions, slices)

    def timed(call: Call) -> Row:
        least, us = 4e6 * dimensions * slices / rates.bytes, bench.time_us([call])
        return {"us": us, "floor_us": least, "of_floor": least / us}

    for by, call in (("triton", kernel), ("torch", partial(module.next_directions, like))):
        stage.row(f"draw {dimensions} k{slices} {by}", partial(timed, call))


def straightness(
    sizes: Sequence[float], times: Sequence[float], offset: bool
) -> tuple[float, float]:
    """How close times are to growing in proportion.

    Args:
        sizes: what grows.
        times: of these.
        offset: whether a part of them may be constant.

    Returns:
        The exponent of the power of the size that fits best; and the largest relative distance
        from the closest line.
    """
    logs = [[math.log(x) for x in some] for some in (sizes, times)]
    exponent = statistics.linear_regression(*logs).slope
    if not offset:
        each = [time / size for size, time in zip(sizes, times, strict=True)]
        return exponent, (max(each) - min(each)) / (max(each) + min(each))
    columns = torch.tensor([[1.0] * len(sizes), list(sizes)], dtype=torch.float64)
    line = (columns / torch.tensor(times, dtype=torch.float64)).T
    fit = torch.linalg.lstsq(line, torch.ones(len(sizes), 1, dtype=torch.float64)).solution
    return exponent, (line @ fit - 1).abs().max().item()


class Verdicts:
    """What was wanted, what was found, and whether that will do."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.found = stage, []

    def judge(
        self, what: str, value: float | None, least: float = 0.0, most: float = math.inf
    ) -> None:
        """Say whether a value, ``None`` if it was not measured, is in the range."""
        met = None if value is None else least <= value <= most
        wanted = f"at least {least:g}" if least else f"at most {most:g}"
        self.found.append({"target": what, "value": value, "wanted": wanted, "met": met})
        said = {None: "not measured", True: "met", False: "NOT MET"}[met]
        self.stage.say(f"{what}: {figure(value)}, wanted {wanted}: {said}")

    def took(self, name: str, key: str = "step_us") -> float | None:
        """A figure of a row."""
        return self.stage.rows.get(name, {}).get(key)

    def ratio(self, name: str, other: str, key: str = "step_us") -> float | None:
        """That of two rows."""
        a, b = self.took(name, key), self.took(other, key)
        return a / b if a and b else None

    def over_ours(self, case: Case, kind: str = "published") -> float | None:
        """A competitor's time over ours."""
        return self.ratio(f"{case.name} {kind} half", f"{case.name} triton half")

    def judge_line(self, axis: str, cases: Cases) -> None:
        """Whether our cost grows in proportion to what is swept."""
        offset = axis in ("dimensions", "slices")  # of which some passes know nothing
        times = {getattr(case, axis): self.took(f"{case.name} triton half") for case in cases}
        known = {size: time for size, time in times.items() if time}
        what = f"cost by {axis}, {len(known)} of {len(times)}"
        distance = None
        if len(known) == len(times):
            exponent, distance = straightness(list(known), list(known.values()), offset)
            what += f", exponent {exponent:.3f}"
        what += f": distance from {'a' if offset else 'the'} line{'' if offset else ' through 0'}"
        self.judge(what, distance, most=STRAIGHT)


def _summarise(stage: Stage, sizes: Sizes) -> None:
    """Print the targets, and where torch.compile is faster."""
    verdicts = Verdicts(stage)
    judge, took, ratio = verdicts.judge, verdicts.took, verdicts.ratio
    for case in (sizes.visreg, sizes.visreg._replace(loss="visreg")):
        judge(f"{case.name}, us", took(f"{case.name} triton half"), most=VISREG_US)
        judge(f"{case.name}, published over ours", verdicts.over_ours(case), BEAT_VISREG)
    for case in (sizes.visreg, sizes.sigreg):
        name = sort_name(case)
        for bits in (16, 32):
            times = ratio(f"{name} torch.sort {bits} bits", f"{name} triton steps", "us")
            judge(f"{name}, torch.sort of {bits} bits over ours", times, BEAT_SORT)
    name, last = sizes.sigreg.name, sizes.cost[-1]
    judge(f"{name}, us", took(f"{name} triton half"), most=2 * SIGREG_FLOOR_US)
    judge(f"{name}, published over ours", verdicts.over_ours(sizes.sigreg), BEAT_SIGREG)
    memory = ratio(f"{name} triton half", f"{name} published half", "step_peak_mib")
    judge(f"{name}, peak memory, ours over published", memory, most=SIGREG_MEMORY)
    judge(f"{last.name}, published over ours", verdicts.over_ours(last), BEAT_AT_THE_END)
    for axis, cases in {"samples": sizes.cost, **sizes.axes}.items():
        verdicts.judge_line(axis, cases)
    everything = {sizes.visreg, sizes.sigreg, *sizes.cost, *sizes.others}
    everything |= {case for cases in sizes.axes.values() for case in cases}
    ratios = {
        case.name: verdicts.over_ours(case, "compiled") for case in sorted(everything, key=str)
    }
    known = {name: ratio for name, ratio in ratios.items() if ratio}
    slower = [f"{name} {1 / ratio:.2f}x" for name, ratio in known.items() if ratio < 1]
    stage.record |= {"sketch_targets": verdicts.found, "sketch_slower_than_compiled": slower}
    stage.say(f"sketch slower than torch.compile, of {len(known)}: {', '.join(slower) or 'none'}")
