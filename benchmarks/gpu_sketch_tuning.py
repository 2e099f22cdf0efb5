"""The sweeps behind the sketch's numbers in kernels/plan.py: warps, cuts, network or library."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_cases import Rates
from benchmarks.gpu_measure import Bench, Stage
from benchmarks.gpu_sketch import sort_call
from benchmarks.gpu_sketch_cases import FULL as SUITE
from benchmarks.gpu_sketch_cases import TINY as SMALL
from benchmarks.gpu_sketch_cases import Case, loss_of
from benchmarks.gpu_tuning import matrix_product, rank, timed
from vicreg_losses.kernels import epps_pulley, launch, plan

ORDERS = {"steps": 1, "exact": 2}


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        lengths: of sorted rows.
        elements: sorted.
        cases: whose projections in flight and gradients are swept.
        harmonic: whose warps are.
        projections: in flight.
        warps: of a program of the Epps-Pulley kernel.
        blocks: elements of each of them at a time.
        tiles: of the gradient: rows, columns, warps.
    """

    lengths: tuple[int, ...]
    elements: int
    cases: tuple[Case, ...]
    harmonic: tuple[Case, ...]
    projections: tuple[int, ...]
    warps: tuple[int, ...]
    blocks: tuple[int, ...]
    tiles: tuple[tuple[int, int, int], ...]


FULL = Sizes(
    lengths=(1024, 4096, 2048, 512, 8192, 16384),
    elements=1 << 24,
    cases=(SUITE.visreg, SUITE.sigreg, SUITE.cost[1]),
    harmonic=(SUITE.sigreg, SUITE.sigreg._replace(samples=1024, slices=256)),
    projections=tuple(1 << bits for bits in (20, 21, 23, 24, 26)),
    warps=(1, 2, 4, 8),
    blocks=(64, 32, 128),
    tiles=((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 128, 4), (64, 64, 4)),
)
TINY = Sizes((40,), 40, (SMALL.visreg,), (SMALL.sigreg,), (64,), (2,), (64,), ((64, 64, 4),))


def tuning(stage: Stage, rates: Rates) -> None:
    """All of them, the ones that decide most first."""
    del rates
    bench = stage.bench
    sizes = TINY if bench.dry else FULL
    for network in (True, False):
        for length in sizes.lengths:
            for order in ORDERS:
                name = f"sort {length} {order} {'current' if network else 'library'}"
                row = partial(timed, partial(sort_us, bench, sizes, length, order, network))
                stage.row(name, row)
    for case in sizes.cases:
        _projections(stage, case, sizes)
    for case in sizes.harmonic:
        _harmonics(stage, case, sizes)
    for case in sizes.cases:
        _gradients(stage, case, sizes)
    for length in sizes.lengths:
        for order in ORDERS:
            for warps in other_warps(bench, length, order):
                measure = partial(sort_us, bench, sizes, length, order, True, warps)
                stage.row(f"sort {length} {order} w{warps}", partial(timed, measure))
    groups = [(f"sort {length}", order) for length in sizes.lengths for order in ORDERS]
    groups += [(case.name, which) for case in sizes.cases for which in ("in flight", "gradient")]
    groups += [(case.name, "warps") for case in sizes.harmonic]
    rank(stage, groups)


def network_of(bench: Bench, length: int, order: str, warps: int | None = None) -> Any:
    """The network of `plan.network`, or one with other warps."""
    exact = ORDERS[order] == 2
    bits = max(6, (length - 1).bit_length())
    change: AbstractContextManager[Any] = nullcontext()
    if warps:
        change = mock.patch.dict(plan._NETWORK_WARPS[exact], {bits: warps})
    with change:
        return plan.network(launch.target(bench.device), length, exact)


def other_warps(bench: Bench, length: int, order: str) -> list[int]:
    """Half and twice as many as now; where there is no network so far, as many as programs have."""
    current = network_of(bench, length, order)
    if current is None:
        return [8, 16]
    return [warps for warps in (current.warps // 2, 2 * current.warps) if warps]


def sort_us(
    bench: Bench,
    sizes: Sizes,
    length: int,
    order: str,
    network: bool,
    warps: int | None = None,
) -> float:
    """Time of sorting and of the residuals, as it is planned, with other warps, by the library."""
    chosen = network_of(bench, length, order, warps) if network else None
    shape = max(1, sizes.elements // length), 1, length
    return bench.time_us([sort_call(bench, shape, ORDERS[order], chosen)], 10.0)


def compile_networks(bench: Bench, length: int) -> None:
    """Compile the networks of a length, all warps, into Triton's cache."""
    for order, parts in ORDERS.items():
        for warps in (None, *other_warps(bench, length, order)):
            sort_call(bench, (16, 1, length), parts, network_of(bench, length, order, warps))()
    bench.sync()


def _projections(stage: Stage, case: Case, sizes: Sizes) -> None:
    """Forward and backward with fewer and more projections at a time."""
    forward = partial(_step_us, stage.bench, case)
    stage.row(f"{case.name} in flight current", partial(timed, forward))
    for count in sizes.projections:
        change = partial(mock.patch.object, plan, "_PROJECTIONS", {False: count, True: count})
        row = partial(timed, forward, change)
        stage.row(f"{case.name} in flight {count >> 20} Mi", row)


def _harmonics(stage: Stage, case: Case, sizes: Sizes) -> None:
    """Forward and backward with other programs of the Epps-Pulley kernel."""
    measure = partial(_step_us, stage.bench, case)
    stage.row(f"{case.name} warps current", partial(timed, measure))
    for block in sizes.blocks:
        for warps in sizes.warps:
            options = {"num_warps": warps, "BLOCK": block * warps}
            change = partial(_launched_with, epps_pulley._epps_pulley_kernel, **options)
            row = partial(timed, measure, change)
            stage.row(f"{case.name} warps {warps} of {block}", row)


def _gradients(stage: Stage, case: Case, sizes: Sizes) -> None:
    """The second product with other tiles; the library's, of all views at once."""
    bench = stage.bench
    measure = partial(_backward_us, bench, case)
    stage.row(f"{case.name} gradient current", partial(timed, measure))

    def library_us(wide: bool) -> float:
        residual = bench.randn(case.slices, case.views * case.samples, dtype=torch.float16)
        w = bench.randn(case.slices, case.dimensions, dtype=torch.float16)
        return bench.time_us([matrix_product(bench, residual.T, w, wide)], 10.0)

    for wide in (False, True):
        row = partial(timed, library_us, wide)
        stage.row(f"{case.name} gradient library{' float32' * wide}", row)
    target = launch.target(bench.device)
    for tile in sizes.tiles:
        blocks = plan.shaped(target, 1, *tile)
        for stages in {blocks.stages, max(2, blocks.stages - 1)}:
            tried = blocks._replace(stages=stages)
            change = partial(mock.patch.object, plan, "gradient_blocks", return_value=tried)
            name = "{}x{}x{} w{} s{}".format(*tried)
            stage.row(f"{case.name} gradient {name}", partial(timed, measure, change))


Change = Callable[[], AbstractContextManager[Any]]


def _step_us(bench: Bench, case: Case, change: Change = nullcontext) -> float:
    """Forward and backward."""
    z = bench.randn(*case.shape, dtype=case.half).requires_grad_()
    loss = loss_of(case, case.competitor("triton", "half"), bench)
    with change():
        return bench.time_us([lambda: torch.autograd.grad(loss(z), z)], 10.0)


def _backward_us(bench: Bench, case: Case, change: Change = nullcontext) -> float:
    """Backward alone."""
    z = bench.randn(*case.shape, dtype=case.half).requires_grad_()
    with change():
        value = loss_of(case, case.competitor("triton", "half"), bench)(z)
        call = partial(torch.autograd.grad, value, z, retain_graph=True)
        return bench.time_us([call], 10.0)


@contextmanager
def _launched_with(kernel: Any, **options: Any) -> Iterator[None]:
    """Launch a kernel with other options."""
    call = launch.call

    def changed(which: Any, *arguments: Any, **given: Any) -> None:
        call(which, *arguments, **(given | options if which is kernel else given))

    with mock.patch.object(launch, "call", changed):
        yield
