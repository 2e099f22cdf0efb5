"""``python -m benchmarks.publish``: write the figures of committed results into README and docs.

A page names a block, ``<!-- figures: NAME -->`` to ``<!-- /figures -->``; what lies between comes
from ``benchmarks/results`` by one of ``BLOCKS``. ``--check`` writes nothing, and fails if a page
is not what it would write.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import distributed_model, monitor_cost, record
from benchmarks.contenders import ALL_OURS, FIELD, OURS, OURS_COMPILED, PUBLISHED
from benchmarks.measure import Row
from benchmarks.points import AXES, BASES, SHAPES, SWEEPS, Point, every

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/**/*.md")
BLOCK = re.compile(
    r"(?P<begin>^ *<!-- figures: (?P<name>[\w-]+) -->\n).*?(?P<end>^ *<!-- /figures -->$)",
    re.MULTILINE | re.DOTALL,
)


def pages() -> list[Path]:
    """All that may have figures."""
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


def rendered(text: str) -> str:
    """A page with its blocks made anew.

    Raises:
        KeyError: for a block of an unknown name.
    """
    return BLOCK.sub(
        lambda found: found["begin"] + BLOCKS[found["name"]]().strip("\n") + "\n" + found["end"],
        text,
    )


@cache
def _json(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return record


@cache
def _sweeps() -> tuple[list[Row], dict[str, Any]]:
    return record.read(RESULTS / "cpu")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows_at(point: Point) -> dict[str, Row]:
    return {row.contender: row for row in _sweeps()[0] if row.point == point.name}


def _shape(row: Row) -> str:
    return f"({row.views}, {row.samples}, {row.dimensions})" + (
        f", {row.slices}" if row.slices else ""
    )


def _size(value: int) -> str:
    return f"{value:,}"


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    text = f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"
    return text + unit


def _others(loss: str) -> set[str]:
    return {c.name for c in FIELD[loss] if c.same_loss} - set(ALL_OURS)


def _least(point: Point, metric: str, names: Iterable[str]) -> Row | None:
    """The row with the least time or memory among some contenders that ran."""
    rows = [r for r in _rows_at(point).values() if r.contender in names and not r.absent]
    return min(rows, key=lambda r: getattr(r, metric), default=None)


def _best_other(point: Point, metric: str, unit: str = "") -> str:
    """The least of the others, whose it is, and, of times, how often the better of ours fits in.

    That is the median of ratios within rounds, which hold where absolute times drift.
    """
    row = _least(point, metric, _others(point.loss))
    if row is None:
        return "none runs"
    better = _least(point, metric, ALL_OURS)
    lead = getattr(better, metric.replace("_ms", "_lead"), None) if "_ms" in metric else None
    times = f", {_number(lead, 'x')}" if lead else ""
    return f"{_number(getattr(row, metric), unit)} ({row.contender}{times})"


def readme_speed() -> str:
    """Published formula, fastest other and ours at shapes of trainings."""
    lines = []
    for point in SHAPES:
        rows = _rows_at(point)
        if not rows:  # of a run that was ended early
            continue
        ours, compiled, formula = rows[OURS], rows[OURS_COMPILED], rows[PUBLISHED]
        lines.append(
            (
                {"sigreg": "SIGReg", "visreg": "VISReg", "vicreg": "VICReg"}.get(
                    point.loss, point.loss
                ),
                _shape(ours),
                f"{_number(formula.both_ms)} ms",
                f"{_number(ours.both_ms)} ms",
                _number(ours.both_ratio, "x"),
                "" if compiled.absent else f"{_number(compiled.both_ms)} ms",
                _best_other(point, "both_ms", " ms"),
                f"{_number(formula.peak_mib)} / {_number(ours.peak_mib)} MiB",
            )
        )
    columns = ("loss", "(V, N, D), slices", "published", "ours", "ratio", "ours, compiled",
               "best other", "peak")  # fmt: skip
    return _table(columns, lines)


def machine() -> str:
    """What the sweeps ran on."""
    about = _sweeps()[1]
    found = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{found['cpu']}, {found['threads']} threads, Python {found['python']}, torch "
        f"{found['torch']}, numpy {found['numpy']}; {versions}."
    )


def _sweep_table(loss: str) -> str:
    base = next(b for b in BASES if b.loss == loss)
    parts = []
    for axis in SWEEPS[loss]:
        points = record.curve(_sweeps()[0], loss, axis, OURS)
        lines = []
        for row in points:
            point = Point(row.loss, row.views, row.samples, row.dimensions, row.slices)
            compiled = _rows_at(point)[OURS_COMPILED]
            cells = [_size(getattr(row, axis))]
            for metric in record.METRICS:
                cells += [
                    _number(getattr(row, metric)),
                    "" if compiled.absent else _number(getattr(compiled, metric)),
                    _best_other(point, metric),
                ]
            lines.append((*cells, f"{row.gradient_error:.0e}"))
        whose = ("compiled", "best other")
        columns = (AXES[axis], "forward ms", *whose, "and backward ms", *whose, "peak MiB", *whose,
                   "gradient error")  # fmt: skip
        parts.append(_table(columns, lines))
    slices = f", K = {base.slices}" if base.slices else ""
    fixed = f"Elsewhere V = {base.views}, N = {base.samples}, D = {base.dimensions}{slices}."
    return fixed + "\n\n" + "\n\n".join(parts)


def exponents() -> str:
    """Slopes of ours and of the published formula."""
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    about = _sweeps()[1]
    for e in about["exponents"]:
        found.setdefault((e["loss"], e["axis"]), {})[e["contender"], e["metric"]] = e["exponent"]
    lines = []
    for (loss, axis), slopes in found.items():
        cells = [
            f"{slopes[who, metric]:.2f}" if (who, metric) in slopes else ""
            for metric in ("both_ms", "peak_mib")
            for who in (OURS, PUBLISHED)
        ]
        lines.append((loss, AXES[axis], *cells))
    columns = ("loss", "in", "time, ours", "time, published", "memory, ours", "memory, published")
    return _table(columns, lines)


def standing() -> str:
    """At how many points of each loss ours lead, or are within 5 %."""
    lines = []
    measured = {row.point for row in _sweeps()[0]}
    for loss in FIELD:
        others = _others(loss)
        eager = {c.name for c in FIELD[loss] if not c.compiled}
        matches = (  # who of ours, against whom
            ({OURS}, others & eager),
            ({OURS_COMPILED}, others - eager),
            (set(ALL_OURS), others),
            ({OURS}, others),
        )
        points = [p for p in every() if p.loss == loss and p.samples * p.dimensions >= 4096]
        points = [p for p in points if p.name in measured]
        for metric, what in zip(
            record.METRICS, ("forward", "forward and backward", "peak memory"), strict=True
        ):
            counts = (sum(_leads(p, metric, *match) for p in points) for match in matches)
            lines.append((loss, what, *(f"{count} / {len(points)}" for count in counts)))
    return _table(("loss", "in", "eager", "compiled", "both", "ours eager, others both"), lines)


def absent() -> str:
    """What was not measured, and why."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in _sweeps()[0]:
        if row.absent:
            place = row.point.partition("-")[2]
            found.setdefault((row.loss, row.contender, row.absent), []).append(place)
    lines = [
        (loss, who, why, ", ".join(places) if len(places) < 4 else f"{len(places)} points")
        for (loss, who, why), places in found.items()
    ]
    return _table(("loss", "contender", "why", "where"), lines)


def _leads(point: Point, metric: str, ours: set[str], others: set[str]) -> bool:
    """Whether the least of ours is the least of all, or at most 5 % more."""
    mine, least = _least(point, metric, ours), _least(point, metric, others)
    if mine is None:
        return False
    return least is None or getattr(mine, metric) <= 1.05 * getattr(least, metric)


def readme_floors() -> str:
    """The same in a sentence of the README."""
    rows = {row[0]: row[1:] for row in _json("numerics.json")["tables"]["floors"]["rows"]}
    return (
        "- SIGReg stays near 1 for perfect embeddings at every N. VISReg's shape term is "
        f"{rows['16'][1]} for them at\n  N = 16, {rows['4096'][1]} at 4096.\n"
        '- `quantiles="paper"` pulls a small batch below unit variance (its targets have '
        f'{rows["16"][0]} at N = 16,\n  {rows["256"][0]} at 256); `quantiles="exact"` is the W2 '
        "distance to N(0, 1) and hardly does."
    )


def hinge_behind_batch_norm() -> str:
    """The variance loss of what comes out of a BatchNorm."""
    found = _json("numerics.json")["tables"]["hinge_behind_batch_norm"]["rows"]
    columns, values = zip(*found, strict=True)
    head = ("standard deviation before BatchNorm", *columns)
    return _table(head, [("hinge of what comes out, 256 samples of 128 dimensions", *values)])


def recipes() -> str:
    """What the small trainers end at."""
    rows = _json("recipes.json")["rows"]
    lines = [(f"`{r['command']}`", r["line"], f"{r['std']:.2f}", f"{r['rank']:.0f}") for r in rows]
    return _table(("", "the line", "std of `z`", "effective rank"), lines)


def distributed_measured() -> str:
    """Ours and gather-everything over ranks of one machine."""
    lines = []
    for row in _json("distributed/distributed.json")["measured"]:
        shape = "({views}, {samples}, {dimensions})".format(**row)
        shape += f", {row['slices']}" if row["slices"] else ""
        times = (_number(row["published_ms"]), _number(row["ours_ms"]), f"{row['ratio']:.1f}x")
        lines.append((row["loss"], str(row["ranks"]), shape, row["by"], *times))
    columns = ("loss", "ranks", "(V, N, D), slices", "ours by", "published ms", "ours ms", "ratio")
    return _table(columns, lines)


def distributed_model_tables() -> str:
    """The MODEL of the communication, one table for each D."""
    rows = _json("distributed/distributed.json")["model"]
    parts = [_json("distributed/distributed.json")["assumptions"]]
    for dimensions in dict.fromkeys(row["dimensions"] for row in rows):
        chosen = [distributed_model.row_of(row) for row in rows if row["dimensions"] == dimensions]
        table = distributed_model.table(chosen)
        lines = zip(*(list(column.cells) for column in table.columns), strict=True)
        names = [str(column.header) for column in table.columns]
        parts += [f"D = {dimensions}:", _table(names, [[str(cell) for cell in x] for x in lines])]
    return "\n\n".join(parts)


BLOCKS = {
    "readme-speed": readme_speed,
    "readme-floors": readme_floors,
    "machine": machine,
    "standing": standing,
    "absent": absent,
    "exponents": exponents,
    "hinge-behind-batch-norm": hinge_behind_batch_norm,
    "recipes": recipes,
    "monitor-cost": lambda: monitor_cost.table(_json("monitor_cost.json")),
    "distributed-measured": distributed_measured,
    "distributed-model": distributed_model_tables,
    **{f"sweep-{loss}": lambda loss=loss: _sweep_table(loss) for loss in SWEEPS},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if pages differ")
    options = parser.parse_args(arguments)
    stale = [path for path in pages() if rendered(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{'stale' if options.check else 'wrote'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(rendered(path.read_text()))
    if not options.check:
        from benchmarks import charts

        charts.draw(ROOT / "docs" / "assets" / "benchmarks", *_sweeps(), suffixes=("svg",))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
