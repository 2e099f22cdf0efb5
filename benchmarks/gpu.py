"""``python -m benchmarks.gpu --out DIR``: tests, suite, tuning and thresholds on a CUDA device.

Writes DIR/gpu.json after every stage and prints tables; ends soon after ``--seconds``.
``--dry-run`` takes the same paths on a CPU, at tiny sizes, in Triton's interpreter.
"""

import argparse
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = str(int("--dry-run" in sys.argv))  # before Triton is imported

import torch
import triton
from torch import Tensor

from benchmarks import gpu_cases, gpu_measure
from benchmarks.gpu_cases import FULL, TINY, Rates, Shape, Sizes, fastest, label, matrix_product
from benchmarks.gpu_measure import Bench, Row, Skip, Stage, figure, print_table
from vicreg_losses import CovarianceLoss, VarianceLoss
from vicreg_losses.kernels import centering, gradient, inner, launch, moments, plan

# Stages, the most seconds of each, and the share of all time that is kept for those after it.
STAGES = {
    "machine": (20, 0.0),
    "ceilings": (30, 0.0),
    "tests": (180, 0.45),
    "sanitizer": (180, 0.45),
    "suite": (200, 0.25),
    "tuning": (150, 0.08),
    "thresholds": (60, 0.0),
}


class Problem:
    """One batch, ready for the kernels under any cut of the work."""

    def __init__(self, bench: Bench, shape: Shape, parts: int = 1) -> None:
        self.bench, self.shape, self.parts = bench, shape, parts
        self.name = f"{label(shape)} p{parts}"
        self.gram = shape[1] < shape[2]
        self.z = bench.randn(*shape, dtype=torch.bfloat16 if parts == 1 else torch.float32)
        self.target = launch.target(self.z.device)
        self.current = plan.plan(self.target, shape, self.gram, parts)

    def cut(self, blocks: Any = None, product: Any = None, span: int | None = None) -> Any:
        """The current plan with other blocks of the inner product or of the gradient."""
        blocks, product = blocks or self.current.inner, product or self.current.gradient
        form = self.gram, self.parts
        return plan.cut(self.target, self.shape, *form, blocks, product, span)

    def passes(self, cut: Any) -> tuple[Any, Tensor]:
        """The centred copy, and the zeros that the inner product counts with."""
        own = centering.own_tickets(self.shape[0], self.shape[2], cut.padded)
        columns = moments.moments(self.z, own + cut.tickets)
        return self.center(columns, cut), columns.tickets[own:]

    def center(self, columns: Any, cut: Any) -> Any:
        """The second pass alone."""
        return centering.center(columns, "", 1.0, 1e-4, self.parts, self.gram, cut.padded)

    def inner_us(self, cut: Any) -> float:
        """Time of the inner product."""
        centered, tickets = self.passes(cut)
        call = partial(inner.inner_product, centered, self.shape, cut, tickets, True)
        return self.bench.time_us([call], 10.0, tickets.zero_)

    def gradient_us(self, cut: Any) -> float:
        """Time of the gradient."""
        x, tickets = self.passes(cut)
        value, product = inner.inner_product(x, self.shape, cut, tickets, True)
        assert product is not None
        up = torch.ones_like(value), value, 1.0
        residue = x.centered, product, x.statistics, x.scales
        run: Callable[..., Tensor] = gradient.product_gradient
        call = partial(run, *residue, self.shape, cut, up, None, None, self.z.dtype)
        return self.bench.time_us([call], 10.0)

    def library_us(self, which: str, wide: bool, square_sum: bool = False) -> float:
        """Time of `torch.mm` for the whole product, with a float32 result if wide."""
        x = self.passes(self.current)[0].centered[0, 0]
        if which == "inner":
            a, b = (x, x.T) if self.gram else (x.T, x)
        else:
            square = self.bench.randn(self.current.side, self.current.side, dtype=x.dtype)
            a, b = (square, x) if self.gram else (x, square)
        product = matrix_product(self.bench, a, b, wide)

        def energy() -> Tensor:
            return product().float().square().sum()

        return self.bench.time_us([energy if square_sum else product], 10.0)


def tuning(stage: Stage, sizes: Sizes, rates: Rates) -> None:
    """The sweep behind the block table of kernels/plan.py, the likely candidates first."""
    del rates
    cases = [(shape, 1) for shape in sizes.tuned] + [(sizes.tuned[0], 2)]
    problems = [Problem(stage.bench, shape, parts) for shape, parts in cases]
    for p in problems:
        stage.row(f"{p.name} inner current", partial(_timed, p.inner_us, p.current))
        stage.row(f"{p.name} gradient current", partial(_timed, p.gradient_us, p.current))
        for which, wide in itertools.product(("inner", "gradient"), (False, True)):
            if p.parts == 1:
                row = partial(_timed, p.library_us, which, wide)
                stage.row(f"{p.name} {which} library{' float32' * wide}", row)
    for usual in (True, False):
        for p in problems:
            if usual and p is problems[-1]:
                _strips(stage, problems[0], sizes)
            for rows, columns, warps in sizes.tiles:
                blocks = plan.shaped(p.target, p.parts, rows, columns, warps)
                others = [s for s in sizes.stages if s != blocks.stages]
                for stages in [blocks.stages] if usual else others:
                    _candidate(stage, p, blocks._replace(stages=stages))
    for shape in sizes.stripped[1:]:
        _strips(stage, Problem(stage.bench, shape), sizes)
    _rank(stage, [(p.name, which) for p in problems for which in ("inner", "gradient")])
    _rank(stage, [(f"{label(shape)} p1", "strips") for shape in sizes.stripped])


def _timed(measure: Callable[..., float], *arguments: Any) -> Row:
    """A row with one time; a candidate that does not fit the chip is left out."""
    try:
        return {"us": measure(*arguments)}
    except triton.OutOfResources as error:
        raise Skip(str(error)) from None


def _candidate(stage: Stage, p: Problem, blocks: Any) -> None:
    """The gradient with these blocks, and the inner product with these and three spans."""
    name = "{}x{}x{} w{} s{}".format(*blocks)
    needed = 2 * p.parts * (blocks.rows + blocks.columns) * blocks.depth * blocks.stages
    if needed > p.target.shared:
        stage.record["skipped"][f"{p.name} {name}"] = f"needs {needed} B of shared memory"
        return
    row = partial(_timed, p.gradient_us, p.cut(product=blocks))
    stage.row(f"{p.name} gradient {name}", row)
    whole = p.cut(blocks)
    even = -(-p.shape[0] * whole.tiles * whole.steps // p.target.processors)
    for kind, span in {"whole": whole.steps, "even": even, "half": -(-even // 2)}.items():
        row = partial(_timed, p.inner_us, p.cut(blocks, span=span))
        stage.row(f"{p.name} inner {name} {kind}", row)


def _strips(stage: Stage, p: Problem, sizes: Sizes) -> None:
    """The two elementwise passes under other strips, with splits as in `plan.strips`."""

    def both_us(strips: Any) -> float:
        with mock.patch.object(moments, "strips", return_value=strips):
            return p.bench.time_us([partial(p.passes, p.current)], 10.0)

    views, samples, dimensions = p.shape
    current = plan.strips(p.target, *p.shape)
    stage.row(f"{p.name} strips current", partial(_timed, both_us, current))
    for rows, columns, warps in sizes.strips:
        count = -(-dimensions // columns)
        wanted = -(-8 * p.target.processors // (views * count))
        splits = max(1, min(128, wanted, -(-samples // (2 * rows))))
        split_rows = rows * -(-samples // (rows * splits))
        strips = plan.Strips(columns, rows, count, -(-samples // split_rows), split_rows, warps)
        name = f"{p.name} strips {rows}x{columns} w{warps}"
        stage.row(name, partial(_timed, both_us, strips))


def _rank(stage: Stage, groups: list[tuple[str, str]]) -> None:
    """Print the best three of each group, and the place of the current choice among all."""
    table = []
    for problem, which in groups:
        prefix = f"{problem} {which} "
        times = {
            name.removeprefix(prefix): row["us"]
            for name, row in stage.rows.items()
            if name.startswith(prefix) and "us" in row
        }
        current = times.pop("current", None)
        library = [times.pop(f"library{wide}", None) for wide in ("", " float32")]
        best = sorted(times, key=times.__getitem__)[:3]
        rank = None if current is None else 1 + sum(us < current for us in times.values())
        shown = [f"{name} {times[name]:.1f}" for name in best] + [None] * (3 - len(best))
        table.append([prefix, current, rank, 1 + len(times), *library, *shown])
        stage.say(
            f"{prefix}{figure(current)} us, place {rank} of {1 + len(times)}, best {shown[0]}, "
            f"mm {', '.join(map(figure, library))}"
        )
    columns = ("", "current us", "place", "of", "mm 16 bits", "mm float32", "best", "2nd", "3rd")
    print_table("tuning: microseconds", columns, table)


def thresholds(stage: Stage, sizes: Sizes, rates: Rates) -> None:
    """Eight questions whose answers are numbers in the code."""
    bench, row = stage.bench, stage.row
    for dtype, length in itertools.product((torch.float32, torch.float16), sizes.sorted_lengths):
        name = f"1 sort: {dtype.itemsize} B x {length}"
        row(name, partial(gpu_cases.sorting, bench, sizes.elements, length, dtype))
    for side in sizes.sides:
        row(f"2 half product or mm: {side}", partial(_library, bench, (1, side, sizes.depth)))
    for percent in (87, 100, 115):
        shape = 1, sizes.form_samples, 64 * round(sizes.form_samples * percent / 6400)
        row(f"3 form, D/N: {percent}%", partial(gpu_cases.forms, bench, shape))
    for shape in sizes.small:
        row(f"4 small: {label(shape)}", partial(gpu_cases.small, bench, shape))
    for shape in sizes.targets:
        row(f"5 two passes: {label(shape)}", partial(_passes, bench, shape, rates))
    row("6 scatter: 16 bits", partial(gpu_cases.scattering, bench, sizes.elements))
    row("7 projections: 16 bits", partial(gpu_cases.projections, bench, *sizes.projected))
    for mib in sizes.cached_mib:
        row(f"8 cache: {mib} MiB", partial(gpu_cases.cached, bench, mib))
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


def sanitize_target(bench: Bench) -> None:
    """A small forward and backward of the kernels in both forms, for a sanitizer to watch."""
    for shape in ((2, 40, 70), (2, 70, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            z = bench.randn(*shape, dtype=dtype).requires_grad_()
            loss = VarianceLoss(impl="triton")(z) + CovarianceLoss(impl="triton")(z)
            assert bool(torch.autograd.grad(loss, z)[0].isfinite().all())


PASSES = ("moments_us", "center_us", "moments_share", "center_share")
CHILDREN = {"suite": gpu_cases.suite, "tuning": tuning, "thresholds": thresholds}


def in_child(name: str, limit: float, options: argparse.Namespace) -> Row:
    """Run a stage in a process: what breaks the CUDA context, or hangs, ends no other stage."""
    part, end = options.out / f"{name}.json", time.time() + limit
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(options.out)]
    command += ["--stage", name, "--deadline", str(end), *["--dry-run"] * options.dry_run]
    for _ in range(4):  # resumes after the row in which it died
        code, _ = gpu_measure.run_process(command, end + 15 - time.time(), show=True)
        if code is None or 0 <= code != gpu_measure.BROKEN or time.time() > end:
            break
    result: Row = json.loads(part.read_text()) if part.exists() else {}
    part.unlink(missing_ok=True)
    if code != 0:
        result.setdefault("error", "ended by force" if code is None else f"exit {code}")
    return result


def run_stage(options: argparse.Namespace, bench: Bench, sizes: Sizes) -> None:
    """What the child of :func:`in_child` does."""
    stage = Stage(bench, options.out / f"{options.stage}.json", options.deadline)
    known = json.loads((options.out / "gpu.json").read_text())["ceilings"]
    rates = Rates(*(known.get(key, usual) for key, usual in Rates()._asdict().items()))
    try:
        CHILDREN[options.stage](stage, sizes, rates)
    except Exception:
        stage.record["error"] = traceback.format_exc()
        raise
    finally:
        stage.save()


def digest(record: Row) -> str:
    """What the end of a log shall carry, in less than 6000 characters."""
    lines = []
    for name, result in record.items():
        rows, skipped = result.get("rows", {}), result.get("skipped", {})
        failed = {row: found["error"] for row, found in rows.items() if "error" in found}
        counts = f"{len(rows)} rows, {len(failed)} failed, skipped {len(skipped)}"
        lines.append(f"== {name}: {result['seconds']:.0f} s, {counts}")
        failures = {"stage": result["error"], **failed} if "error" in result else failed
        for row, error in list(failures.items())[:3]:
            said = [line for line in error.strip().splitlines() if "Error" in line] or [error]
            lines.append(f"failed: {row}: {said[-1][:150]}")
        lines += result.get("summary", [])
    return "\n".join(line[:700] for line in lines)[:5900]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json")
    parser.add_argument("--seconds", type=float, default=450.0, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="all of it, tiny, on the CPU")
    parser.add_argument("--sanitize-target", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA device; --dry-run needs none")
    bench, sizes = Bench(options.dry_run), TINY if options.dry_run else FULL
    if options.sanitize_target:
        return sanitize_target(bench)
    if options.stage:
        return run_stage(options, bench, sizes)
    options.out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[float], Row]] = {
        "machine": lambda _: gpu_measure.machine(bench, launch.target(bench.device).arch),
        "ceilings": lambda _: gpu_cases.ceilings(bench, sizes),
        "tests": lambda limit: gpu_measure.run_tests(limit, bench.dry),
        "sanitizer": lambda limit: gpu_measure.sanitize(limit, bench.dry),
        **{name: partial(in_child, name, options=options) for name in CHILDREN},
    }
    begin, record = time.time(), {}
    for name, (most, kept) in STAGES.items():
        start = time.time()
        limit = min(most, begin + (1 - kept) * options.seconds - start)
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        try:
            result = stages[name](limit) if limit > 0 else {"skipped": {name: "no time left"}}
        except Exception:
            result = {"error": traceback.format_exc()}
        record[name] = {**result, "seconds": time.time() - start}
        gpu_measure.write_json(options.out / "gpu.json", record)
    print(f"\n{digest(record)}", flush=True)
    if any("error" in result for result in record.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
