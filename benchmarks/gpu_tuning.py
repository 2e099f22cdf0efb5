"""The sweeps behind the block table of kernels/plan.py, for the covariance term."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.gpu_cases import FULL, TINY, Rates, Shape, Sizes, label
from benchmarks.gpu_measure import Bench, Call, Row, Skip, Stage, figure, print_table
from vicreg_losses.kernels import centering, gradient, inner, launch, moments, plan


def matrix_product(bench: Bench, a: Tensor, b: Tensor, wide: bool) -> Call:
    """A call of `torch.mm`; CPUs have none with a float32 result."""
    options = {"out_dtype": torch.float32} if wide and not bench.dry else {}
    return partial(torch.mm, a, b, **options)


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


def tuning(stage: Stage, rates: Rates) -> None:
    """All cuts of the products and of the passes, the likely candidates first."""
    del rates
    sizes = TINY if stage.bench.dry else FULL
    cases = [(shape, 1) for shape in sizes.tuned] + [(sizes.tuned[0], 2)]
    problems = [Problem(stage.bench, shape, parts) for shape, parts in cases]
    for p in problems:
        stage.row(f"{p.name} inner current", partial(timed, p.inner_us, p.current))
        stage.row(f"{p.name} gradient current", partial(timed, p.gradient_us, p.current))
        for which, wide in itertools.product(("inner", "gradient"), (False, True)):
            if p.parts == 1:
                row = partial(timed, p.library_us, which, wide)
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
    rank(stage, [(p.name, which) for p in problems for which in ("inner", "gradient")])
    rank(stage, [(f"{label(shape)} p1", "strips") for shape in sizes.stripped])


def timed(measure: Callable[..., float], *arguments: Any) -> Row:
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
    row = partial(timed, p.gradient_us, p.cut(product=blocks))
    stage.row(f"{p.name} gradient {name}", row)
    whole = p.cut(blocks)
    even = -(-p.shape[0] * whole.tiles * whole.steps // p.target.processors)
    for kind, span in {"whole": whole.steps, "even": even, "half": -(-even // 2)}.items():
        row = partial(timed, p.inner_us, p.cut(blocks, span=span))
        stage.row(f"{p.name} inner {name} {kind}", row)


def _strips(stage: Stage, p: Problem, sizes: Sizes) -> None:
    """The two elementwise passes under other strips, with splits as in `plan.strips`."""

    def both_us(strips: Any) -> float:
        with mock.patch.object(moments, "strips", return_value=strips):
            return p.bench.time_us([partial(p.passes, p.current)], 10.0)

    views, samples, dimensions = p.shape
    current = plan.strips(p.target, *p.shape)
    stage.row(f"{p.name} strips current", partial(timed, both_us, current))
    for rows, columns, warps in sizes.strips:
        count = -(-dimensions // columns)
        wanted = -(-8 * p.target.processors // (views * count))
        splits = max(1, min(128, wanted, -(-samples // (2 * rows))))
        split_rows = rows * -(-samples // (rows * splits))
        strips = plan.Strips(columns, rows, count, -(-samples // split_rows), split_rows, warps)
        name = f"{p.name} strips {rows}x{columns} w{warps}"
        stage.row(name, partial(timed, both_us, strips))


def rank(stage: Stage, groups: list[tuple[str, str]]) -> None:
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
            f"library {', '.join(map(figure, library))}"
        )
    columns = ("", "current us", "place", "of", "library", "float32", "best", "2nd", "3rd")
    print_table("tuning: microseconds", columns, table)
