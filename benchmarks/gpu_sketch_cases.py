"""The sliced sketch on a GPU: cases, floors and competitors."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import vicreg_losses as vl
from benchmarks import published
from benchmarks.gpu_cases import (
    OURS,
    Competitor,
    Loss,
    Rates,
    as_trained,
    label,
    measured,
    require,
)
from benchmarks.gpu_measure import Bench, Row

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """A loss and a batch.

    Attributes:
        loss: "wasserstein", the shape term of VISReg; "visreg", all of VISReg's loss;
            "epps_pulley", SIGReg.
        views, samples, dimensions: V, N, D.
        slices: K.
        half: the dtype of 16 bits.
    """

    loss: str
    views: int
    samples: int
    dimensions: int
    slices: int
    half: torch.dtype = BF16

    @property
    def shape(self) -> tuple[int, int, int]:
        """(V, N, D)."""
        return self[1:4]

    @property
    def name(self) -> str:
        """What rows of it begin with."""
        return f"{self.loss} {label(self.shape)} k{self.slices}"

    def competitor(self, kind: str, products: str) -> Competitor:
        """Who evaluates it how.

        Args:
            kind: as of :class:`Competitor`.
            products: "half" for embeddings of 16 bits, else the precision of float32 products.
        """
        half = products == "half"
        setting = "highest" if half else products
        parts = 2 if products == "highest" else 1
        return Competitor(f"{kind} {products}", kind, self.half if half else F32, setting, parts)


Cases = tuple[Case, ...]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        visreg, sigreg: the named cases.
        cost: the published cost sweep, by increasing N.
        axes: sweeps of one size each from a member of the cost sweep, by what they sweep.
        others: more cases.
    """

    visreg: Case
    sigreg: Case
    cost: Cases
    axes: dict[str, Cases]
    others: Cases


def sweep(base: Case, **values: Iterable[int]) -> Cases:
    """A case at other sizes, one of them at a time."""
    return tuple(base._replace(**{name: v}) for name, some in values.items() for v in some)


TRAINING = Case("wasserstein", 10, 1024, 256, 4096)
SIGREG = Case("epps_pulley", 1, 4096, 256, 4096)
COST = Case("wasserstein", 8, 2000, 10000, 2500, F16)
TALL = Case("wasserstein", 1, 4096, 256, 4096)
FULL = Sizes(
    TRAINING,
    SIGREG,
    sweep(COST, samples=(1000, 2000, 5000, 10000, 20000, 50000)),
    {
        "dimensions": sweep(COST, dimensions=(1250, 2500, 5000, 10000, 20000)),
        "slices": sweep(COST, slices=(625, 1250, 2500, 5000, 10000)),
        "views": sweep(COST, views=(1, 2, 4, 8, 16)),
    },
    (
        *sweep(SIGREG, samples=(256, 1024, 16384, 65536), slices=(256, 1024)),
        *sweep(SIGREG, dimensions=(2048,), views=(8,)),
        *sweep(TALL, samples=(256, 512, 2048, 4096, 8192, 16384), slices=(256, 1024)),
        *(Case(loss, 1, 2048, 8192, 2048) for loss in ("wasserstein", "epps_pulley")),
        *(Case(loss, 1, 16384, 2048, 2048) for loss in ("wasserstein", "epps_pulley")),
        *(Case(loss, 1, 65536, 512, 2048) for loss in ("wasserstein", "epps_pulley")),
    ),
)
SMALL = Case("wasserstein", 1, 20, 12, 1)
TINY = Sizes(
    SMALL,
    SMALL._replace(loss="epps_pulley"),
    sweep(SMALL._replace(half=F16), samples=(20, 24)),
    {"slices": sweep(SMALL._replace(half=F16), slices=(1, 2))},
    (SMALL._replace(loss="epps_pulley", views=2),),
)

# Clocks of a processor for each sorted element with its residual, by the bits of the row's length:
# counted in the machine code of a bitonic network for sm_90, one row a program; beyond, of rows of
# 2^14 that are merged.
SORT_CLOCKS = {8: 1.02, 9: 1.08, 10: 1.26, 11: 1.45, 12: 1.71, 13: 1.97, 14: 2.33}
MERGE_CLOCKS = 3.2
HARMONIC_OPERATIONS = 70  # of a fused multiply-add's unit: one element, all knots, one direction
LANES = 128  # of such operations, a processor and clock


def sort_floor_us(elements: int, length: int, parts: int, rates: Rates) -> float:
    """The time of sorting rows of a length in registers, in microseconds.

    The clocks of :data:`SORT_CLOCKS`; with two parts, whose order is that of float32, two sorts.
    """
    clocks = SORT_CLOCKS.get(max(8, (length - 1).bit_length()), MERGE_CLOCKS)
    return 1e6 * parts * clocks * elements / rates.clocks


def floor_us(
    case: Case, input_bytes: int, parts: int, forward_only: bool, rates: Rates | None = None
) -> float:
    """The time below which a sketch cannot be evaluated this way, in microseconds.

    The forward reads the input twice and writes a centred copy of ``parts`` 16-bit numbers for each
    element; reads the directions, float32; multiplies the two, 1 or (of two parts) 3 times 2 V N D
    K operations, whose float32 result a cache holds; and evaluates the slices with their
    derivatives, by the clocks of :func:`sort_floor_us` or by 70 operations of the multiply-add unit
    for each projection and each way, or as fast as the residual of ``parts`` 16-bit numbers is
    written. The backward is a second product, which reads the residual and the directions and
    writes the gradient. Each product is bound by operations or by memory. For all of VISReg: the
    floor of its sketch.

    Args:
        case: what.
        input_bytes: of an element.
        parts: 2 for products of float32 quality.
        forward_only: without the backward.
        rates: of the chip.
    """
    rates = rates or Rates()
    elements = case.views * case.samples * case.dimensions
    projections, weights = case.views * case.samples * case.slices, case.dimensions * case.slices
    product = 2 * (1 if parts == 1 else 3) * elements * case.slices / rates.flops
    copy, operand, residual = (2 * parts * count for count in (elements, weights, projections))
    passes = (2 * input_bytes * elements + copy + 4 * weights) / rates.bytes
    project = max(product, (copy + operand) / rates.bytes)
    if case.loss == "epps_pulley":
        clocks = 2 * HARMONIC_OPERATIONS * projections / (LANES * rates.clocks)
    else:
        clocks = 1e-6 * sort_floor_us(projections, case.samples, parts, rates)
    forward = passes + project + max(clocks, residual / rates.bytes)
    moved = residual + operand + input_bytes * elements
    backward = max(product, moved / rates.bytes)
    return 1e6 * (forward if forward_only else forward + backward)


def needed_bytes(case: Case, competitor: Competitor) -> float:
    """Peak memory of forward and backward with the embeddings, as it is expected.

    Eager code keeps float32 copies of the embeddings; of 16-bit projections the sort holds values
    and 64-bit indices twice; SIGReg has three float32 numbers for each of 17 knots.
    """
    elements = case.views * case.samples * case.dimensions
    projections = case.views * case.samples * case.slices
    half = competitor.dtype.itemsize == 2
    if competitor.kind == "triton":
        return elements * (6 if half else 20) + projections * (2 if half else 4) + 2**30
    if competitor.kind == "torch":
        return elements * 24 + 2**31
    each = 17 * 12 if case.loss == "epps_pulley" else (32 if half else 40)
    return elements * ((16 if half else 24) + 12 * (case.loss == "visreg")) + projections * each


def unit_columns(bench: Bench, dimensions: int, slices: int) -> Tensor:
    """Directions, (D, K), float32."""
    return torch.nn.functional.normalize(bench.randn(slices, dimensions), dim=1).T


def loss_of(case: Case, competitor: Competitor, bench: Bench) -> Loss:
    """What maps embeddings to the loss, along fixed directions."""
    w, kind = unit_columns(bench, case.dimensions, case.slices), competitor.kind
    if kind in OURS and case.loss == "visreg":
        return partial(vl.VISRegLoss(impl=kind), directions=w)
    if kind in OURS:
        sketch = vl.functional.sliced_sketch_loss
        return partial(sketch, directions=w, statistic=case.loss, impl=kind)
    formula = {
        "wasserstein": published.sliced_wasserstein,
        "epps_pulley": published.epps_pulley,
        "visreg": published.visreg_loss,
    }[case.loss]

    def along(z: Tensor) -> Tensor:
        return formula(z, w)

    return as_trained(along, competitor, bench)


def row_of(bench: Bench, case: Case, competitor: Competitor, rates: Rates, free: int) -> Row:
    """One competitor at one case."""
    require(needed_bytes(case, competitor), 0.9 * free)
    floor = partial(floor_us, case, competitor.dtype.itemsize, competitor.parts, rates=rates)
    make = partial(loss_of, case, competitor, bench)
    return measured(bench, case.shape, competitor, make, floor)
