"""A MODEL, not a measurement: what the losses cost each rank, published and ours.

Ours are the bytes, operations and memory of :func:`vicreg_losses.distributed.plan`; the published
implementations have the formulas below. Time is network plus arithmetic, nothing hidden behind
anything: ``NETWORK`` bytes a second each way, ``STEP`` seconds for each step of a tree over the
ranks (an all-gather or a reduce-scatter goes through it once, an all-reduce twice), ``PEER``
seconds for each message of an all-to-all, products at ``GEMM``, sorts at ``SORT`` (assumed). Not
in it: element-wise passes, sines and cosines, a faster network inside a node, congestion.

Embeddings are float32, and so is what is sent; products are TF32 ("high"), of both sides. With M
samples in all, M = W N_l, and V views, each rank of

- VICReg (FullGatherLayer) gathers 4 M D bytes a view, redoes the loss of all samples, 6 M D^2, and
  adds the gradients of all samples up over ranks, 8 M D bytes;
- VISReg's trainer gathers 4 M D, projects and sorts everything on K slices of its own, 4 M D K and
  M K keys, and scatters the gradients back, 4 M D;
- LeJEPA adds means of cosines and of sines up, 2 x 8 K T bytes, and their gradients once more.

Bytes are times (W - 1) / W. Memory beyond the embeddings: peaks of autograd on the published
formulas, 4 (3 V M D + D^2), 4 (6.8 M K + 1.7 M D) and 4 x 6 N_l K T; more for VICReg if M < D.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from vicreg_losses.distributed import plan

RANKS = (8, 64, 512, 4096)
DIMENSIONS = (256, 2048, 8192)
SAMPLES, SLICES, KNOTS = 256, 4096, 17
NETWORK, STEP, PEER = 50e9, 5e-6, 0.3e-6
GEMM, SORT = 0.6 * 494e12, 8e9
GPU_MEMORY = 80e9
# Times through the tree.
PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
# What plan calls it, views, and what the tables do.
TERMS = {
    "VICReg": ("vicreg", 2),
    "Wasserstein": ("wasserstein", 1),
    "Epps-Pulley": ("epps_pulley", 1),
}


class Cost(NamedTuple):
    """Of one call, forward and backward, for each rank.

    Attributes:
        by: how the ranks share the work.
        sent: bytes that a rank sends.
        seconds: of network and arithmetic.
        memory: bytes at the peak beside the embeddings.
        flops: of matrix products.
        keys: numbers sorted.
    """

    by: str
    sent: float
    seconds: float
    memory: float
    flops: float
    keys: float


class Row(NamedTuple):
    """One line of the tables."""

    term: str
    ranks: int
    dimensions: int
    published: Cost
    ours: Cost


def _cost(
    by: str, ranks: int, sent: float, messages: list[str], work: tuple[float, float], memory: float
) -> Cost:
    """Price ``work``, operations of products and keys to sort, and messages."""
    steps = math.ceil(math.log2(ranks))
    latency = sum(
        PEER * (ranks - 1) if name == "all_to_all" else STEP * steps * PASSES[name]
        for name in messages
    )
    flops, keys = work
    seconds = sent / NETWORK + latency + flops / GEMM + keys / SORT
    return Cost(by, sent, seconds, memory, flops, keys)


def published(term: str, ranks: int, dimensions: int) -> Cost:
    """The published implementation, by the formulas above."""
    views, everything, share = TERMS[term][1], ranks * SAMPLES, (ranks - 1) / ranks
    samples = everything * dimensions  # numbers in one view of the global batch
    projections = everything * SLICES
    if term == "VICReg":
        messages = ["all_gather", "all_reduce"] * views
        memory = 4 * (3 * views * samples + dimensions**2)
        work = 6.0 * views * samples * dimensions, 0.0
        return _cost("gather", ranks, 12 * share * views * samples, messages, work, memory)
    if term == "Wasserstein":
        messages = ["all_gather", "reduce_scatter"]
        memory = 4 * (6.8 * projections + 1.7 * samples)
        work = 4.0 * samples * SLICES, float(projections)
        return _cost("gather", ranks, 8 * share * samples, messages, work, memory)
    knots = SLICES * KNOTS
    work = 4.0 * SAMPLES * dimensions * SLICES, 0.0
    memory = 24 * SAMPLES * knots
    return _cost("sums", ranks, 32 * share * knots, ["all_reduce"] * 4, work, memory)


def ours(term: str, ranks: int, dimensions: int) -> Cost:
    """This library, by its own plan."""
    name, views = TERMS[term]
    p = plan(name, SAMPLES, dimensions, slices=SLICES, views=views, ranks=ranks, knots=KNOTS)
    keys = 0
    if term == "Wasserstein":
        keys = views * ranks * SAMPLES * -(-SLICES // ranks)
    messages = [m.collective for m in p.messages]
    return _cost(p.strategy, ranks, p.sent, messages, (float(p.flops), float(keys)), p.memory)


def rows() -> list[Row]:
    return [
        Row(term, ranks, dimensions, published(term, ranks, dimensions), ours(*which))
        for dimensions in DIMENSIONS
        for term in TERMS
        for ranks in RANKS
        for which in [(term, ranks, dimensions)]
    ]


def flat() -> list[dict[str, str | float]]:
    """The rows for a file, each marked as modelled."""
    out = []
    for row in rows():
        line: dict[str, str | float] = {"kind": "MODEL, not measured", "term": row.term}
        line |= {"ranks": row.ranks, "dimensions": row.dimensions}
        line |= {"samples": SAMPLES, "slices": SLICES, "views": TERMS[row.term][1]}
        for side in ("published", "ours"):
            cost = getattr(row, side)._asdict()
            line |= {f"{side}_{name}": value for name, value in cost.items()}
        out.append(line)
    return out


ASSUMPTIONS = (
    f"MODEL, not a measurement: {SAMPLES} samples of a view on a rank, {SLICES} slices, float32; "
    f"{NETWORK / 1e9:.0f} GB/s each way, {STEP * 1e6:.0f} us a step of a tree, {PEER * 1e6:.1f} us "
    f"a message of an all-to-all, products at 60 % of {GEMM / 0.6e12:.0f} TF/s, "
    f"{SORT / 1e9:.0f} G keys/s sorted (assumed). * more than {GPU_MEMORY / 1e9:.0f} GB."
)


def row_of(line: dict[str, Any]) -> Row:
    """A row from its line in a file of ``flat``."""
    costs = (
        Cost(**{name: line[f"{side}_{name}"] for name in Cost._fields})
        for side in ("published", "ours")
    )
    return Row(line["term"], line["ranks"], line["dimensions"], *costs)


def tables() -> list[Table]:
    """One for each D."""
    found = rows()
    return [table([row for row in found if row.dimensions == d]) for d in DIMENSIONS]


def table(chosen: Sequence[Row]) -> Table:
    """In Markdown, so that what is printed can be shown as it is."""
    out = Table(box=box.MARKDOWN, pad_edge=True)
    for column in ("loss", "W", "published sends", "takes", "holds"):
        out.add_column(column, no_wrap=True, justify="left" if column == "loss" else "right")
    for column in ("ours by", "sends", "takes", "holds", "MODEL ratio"):
        out.add_column(column, no_wrap=True, justify="left" if "by" in column else "right")
    for row in chosen:
        a, b = row.published, row.ours
        out.add_row(
            row.term, str(row.ranks), *_cells(a), b.by, *_cells(b),
            f"{_digits(a.seconds / b.seconds)}x",
        )  # fmt: skip
    return out


def _cells(cost: Cost) -> list[str]:
    full = "*" if cost.memory > GPU_MEMORY else ""
    return [
        f"{_scaled(cost.sent)}B",
        f"{_scaled(cost.seconds)}s",
        f"{_scaled(cost.memory)}B{full}",
    ]


def _scaled(x: float) -> str:
    for power, unit in ((9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "u")):
        if x >= 10**power:
            return f"{_digits(x / 10**power)} {unit}"
    return f"{x:.1e} "


def _digits(x: float) -> str:
    """Two digits, or all those before the point: a model is worth no more."""
    return f"{x:.0f}" if x >= 9.95 else f"{x:.1f}"


def plot(path: str) -> None:
    """Draw the modelled times, a panel for each D."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(DIMENSIONS), figsize=(13, 4.6), sharey=True)
    everything = rows()
    for panel, dimensions in zip(panels, DIMENSIONS, strict=True):
        for colour, term in enumerate(TERMS):
            lines = [r for r in everything if (r.term, r.dimensions) == (term, dimensions)]
            for side, style in (("published", "--"), ("ours", "-")):
                costs = [getattr(row, side) for row in lines]
                times = [1e3 * cost.seconds for cost in costs]
                fits = [cost.memory <= GPU_MEMORY for cost in costs]
                panel.loglog(
                    RANKS, times, style, color=f"C{colour}", label=f"{term}, {side}",
                    marker="o", markevery=[i for i, fit in enumerate(fits) if fit] or None,
                )  # fmt: skip
                over = [(w, t) for w, t, fit in zip(RANKS, times, fits, strict=True) if not fit]
                if over:
                    panel.plot(*zip(*over, strict=True), "x", color=f"C{colour}", markersize=9)
        panel.set_title(f"D = {dimensions}")
        panel.set_xlabel("ranks (x: does not fit into 80 GB)")
        panel.set_xticks(RANKS, [str(w) for w in RANKS])
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("ms, forward + backward")
    panels[-1].legend(fontsize=8)
    figure.suptitle(f"MODEL, not a measurement: {SAMPLES} samples a rank, {SLICES} slices")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
