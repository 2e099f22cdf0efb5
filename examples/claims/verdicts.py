"""Means and spreads over seeds, the rule by which a difference counts, and tables of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

SPREADS = 2.0
SMALLEST = 0.005
NO_DIFFERENCE = "no difference shown"
Cell = tuple[float, float]
Summary = dict[str, dict[str, dict[str, Cell]]]


def difference(a: Sequence[float], b: Sequence[float], smallest: float = SMALLEST) -> str:
    """Whether ``a`` is "higher" or "lower" than ``b``, or "no difference shown".

    The means must differ by more than ``SPREADS`` times ``(sd_a^2 + sd_b^2)^1/2``, the standard
    deviation (N - 1) over seeds, and by more than ``smallest``.

    Raises:
        ValueError: fewer than two seeds.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"difference: expected two seeds or more, got {len(a)} and {len(b)}")
    change = statistics.fmean(a) - statistics.fmean(b)
    spread = math.hypot(statistics.stdev(a), statistics.stdev(b))
    if not abs(change) > max(SPREADS * spread, smallest):
        return NO_DIFFERENCE
    return "higher" if change > 0 else "lower"


def summarise(runs: Sequence[dict[str, Any]]) -> Summary:
    """Mean and standard deviation over seeds of every metric: [data][variant][metric]."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        metrics = found.setdefault(run["data"], {}).setdefault(run["variant"], {})
        for name in run.keys() - {"data", "variant", "seed"}:
            metrics.setdefault(name, []).append(run[name])
    return {
        data: {
            variant: {name: _cell(values) for name, values in sorted(metrics.items())}
            for variant, metrics in variants.items()
        }
        for data, variants in found.items()
    }


def _cell(values: Sequence[float]) -> Cell:
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return float(f"{mean:.6g}"), float(f"{spread:.6g}")


def values(runs: Sequence[dict[str, Any]], data: str, variant: str, metric: str) -> list[float]:
    """One metric of a variant, by seed."""
    chosen = [run for run in runs if (run["data"], run["variant"]) == (data, variant)]
    return [run[metric] for run in sorted(chosen, key=lambda run: run["seed"])]


def claim(text: str, data: str, verdict: str, detail: str) -> dict[str, str]:
    """One verdict: what the paper says, on which data, whether it shows here, and by what."""
    return {"claim": text, "data": data, "verdict": verdict, "detail": detail}


def compared(
    runs: Sequence[dict[str, Any]], data: str, metric: str, pair: tuple[str, str], text: str
) -> dict[str, str]:
    """A claim that the first variant of ``pair`` has more of ``metric`` than the second."""
    first, second = (values(runs, data, variant, metric) for variant in pair)
    word = difference(first, second)
    verdict = {"higher": "holds here", "lower": "the opposite here"}.get(word, word)
    (a, da), (b, db) = _cell(first), _cell(second)
    detail = f"{metric}: {pair[0]} {a:.3f} ± {da:.3f}, {pair[1]} {b:.3f} ± {db:.3f}"
    return claim(text, data, verdict, detail)


def rows(result: dict[str, Any], data: str) -> list[list[str]]:
    """Heading and rows of the table of one data set: variants by the metrics of ``columns``."""
    columns: dict[str, str] = result["columns"]
    variants = result["summary"][data]
    body = [
        [name, *(_shown(metrics.get(column), result["seeds"]) for column in columns)]
        for name, metrics in variants.items()
    ]
    return [["", *columns.values()], *body]


def _shown(cell: Sequence[float] | None, seeds: int) -> str:
    if cell is None:
        return "-"
    mean, spread = cell
    if seeds == 1:
        return f"{mean:.3f}"
    if mean != 0 and not 1e-2 <= abs(mean) < 1e3:
        return f"{mean:.1e} ± {spread:.0e}"
    digits = 3 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables for a terminal: one of each data set, and the verdicts."""
    found = []
    for data in result["summary"]:
        heading, *body = rows(result, data)
        table = Table(title=f"{result['title']}: {data}, {_statistic(result)}")
        table.add_column(heading[0], no_wrap=True)
        for name in heading[1:]:
            table.add_column(name, justify="right")
        for row in body:
            table.add_row(*row)
        found.append(table)
    table = Table("claim", "data", "verdict", "measured", title="Verdicts")
    for verdict in result["claims"]:
        table.add_row(*verdict.values())
    return [*found, table]


def _statistic(result: dict[str, Any]) -> str:
    return "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds, mean ± sd"


def markdown(result: dict[str, Any]) -> str:
    """The same tables for README.md."""
    parts = []
    for data in result["summary"]:
        heading, *body = rows(result, data)
        caption = f"{data[0].upper()}{data[1:]}, {_statistic(result)}:"
        parts += [caption, _pipes(heading, body)]
    body = [list(verdict.values()) for verdict in result["claims"]]
    parts.append(_pipes(["claim", "data", "verdict", "measured"], body))
    return "\n\n".join(parts)


def _pipes(heading: list[str], body: list[list[str]]) -> str:
    line = ["---"] + ["---:"] * (len(heading) - 1) if heading[0] == "" else ["---"] * len(heading)
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in (heading, line, *body))
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
