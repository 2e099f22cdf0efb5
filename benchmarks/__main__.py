"""``python -m benchmarks``: ours beside everything a user could pick instead.

Forward, forward and backward, peak memory and errors against float64, in one run and on the same
tensors, of ours, the published formulas (eager and compiled) and the losses of other packages
(``pip install 'vicreg-losses[peers]'``; those absent are named). Along sweeps of the views, the
batch, the dimensions and the slices. Nothing is reported where ours are wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import measure, record
from benchmarks.contenders import ALL_OURS, FIELD
from benchmarks.measure import Row
from benchmarks.points import QUICK, every


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    if options.compare:
        return _compare(console, parser, *options.compare)
    _prepare(parser, options)
    points = [p for p in (QUICK if options.quick else every()) if options.only in p.name]
    if not points:
        parser.error(f"--only: no point has {options.only!r} in its name")
    about = {"machine": measure.machine(), "versions": measure.versions()}
    for package, found in about["versions"].items():
        if found == "not installed":
            console.print(f"{package} is not installed: left out", highlight=False)
    compiled = {c.name for contenders in FIELD.values() for c in contenders if c.compiled}
    left_out = dict.fromkeys(compiled if options.quick else (), "left out by --quick")
    seconds = options.seconds or (1.0 if options.quick else 2.0)
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(points))
        for point in points:
            progress.update(task, description=point.name)
            rows += measure.measure(point, seconds, left_out)
            wrong = record.failures(rows)
            if wrong:
                console.print("nothing is reported, as ours are wrong:", *wrong, sep="\n")
                return 1
            if options.out:
                record.write(options.out, rows, about)  # what is measured is not lost
            progress.advance(task)
    _report(console, rows, about)
    if options.out:
        from benchmarks import charts

        drawn = charts.draw(options.out, rows, about)
        console.print(f"wrote {2 + len(drawn)} files to {options.out}", highlight=False)
    return 0


def _prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse before the work what would fail after it."""
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.out:
        if find_spec("matplotlib") is None:
            parser.error("--out: expected matplotlib to be installed, for the plots")
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: expected a folder to write to, got {options.out}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few shapes, under two minutes")
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--seconds", type=float, default=None, help="of turns at each point")
    parser.add_argument("--threads", type=int, default=None, help="PyTorch's CPU threads")
    parser.add_argument("--out", type=Path, default=None, help="folder for JSON, CSV and plots")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="two results: exit with 1 if ours lost over 10 %% against the published formula",
    )
    return parser


def _report(console: Console, rows: Sequence[Row], about: dict[str, Any]) -> None:
    for loss in FIELD:
        chosen = [row for row in rows if row.loss == loss]
        if chosen:
            console.print(_table(loss, chosen))
    slopes = record.exponents(rows)
    if slopes:
        table = Table(
            box=box.SIMPLE_HEAD, title=f"exponents over the {record.FITTED} largest sizes"
        )
        for column in ("loss", "axis", "contender", *record.METRICS):
            table.add_column(column)
        lines: dict[tuple[str, str, str], dict[str, float]] = {}
        for e in slopes:
            lines.setdefault((e.loss, e.axis, e.contender), {})[e.metric] = e.exponent
        for key, found in lines.items():
            table.add_row(*key, *(f"{found[m]:.2f}" if m in found else "" for m in record.METRICS))
        console.print(table)
    described = (about["machine"] | about["versions"]).items()
    console.print(", ".join(f"{key} {value}" for key, value in described), highlight=False)


def _table(loss: str, rows: Sequence[Row]) -> Table:
    title = f"{loss}: medians; x = published / this; errors of value, gradient"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in ("", "forward\nms", "\nx", "and back\nms", "\nx", "peak\nMiB", "errors"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for point in dict.fromkeys(row.point for row in rows):
        table.add_section()
        here = [row for row in rows if row.point == point]
        table.add_row(f"[bold]{point.partition('-')[2]}")
        for row in here:
            if not row.absent:
                table.add_row(*_cells(row))
        for row in here:
            leads = _times(row.forward_lead), _times(row.both_lead)
            if row.contender in ALL_OURS and all(leads):
                name = f" best other / {row.contender}"
                table.add_row(name, "", leads[0], "", leads[1], style="dim")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.absent:
            reasons.setdefault(f"{row.contender}: {row.absent}", []).append(row.point)
    points = len({row.point for row in rows})
    table.caption = "\n".join(
        reason + ("" if len(where) == points else f" at {', '.join(where)}")
        for reason, where in reasons.items()
    )
    return table


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f" {row.contender}",
        _number(row.forward_ms),
        _times(row.forward_ratio),
        _number(row.both_ms),
        _times(row.both_ratio),
        _number(row.peak_mib),
        f"{_error(row.value_error)} {_error(row.gradient_error)}",
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{_number(value)}x"


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0e}" if value <= record.WRONG else f"[bold red]{value:.0e}![/]"


def _compare(console: Console, parser: argparse.ArgumentParser, before: Path, after: Path) -> int:
    try:
        (old, one), (new, other) = (record.read(path) for path in (before, after))
    except ValueError as error:
        parser.error(f"--compare: {error}")
    for name in ("cpu", "threads"):
        pair = [about.get("machine", {}).get(name) for about in (one, other)]
        if pair[0] != pair[1]:
            parser.error(f"--compare: expected the same {name}, got {pair[0]} and {pair[1]}")
    changes = record.compare(old, new)
    if not changes:
        parser.error("--compare: the two have no point in common")
    table = Table(
        title="ours: published / ours, or MiB, in two runs", box=box.SIMPLE_HEAD, padding=0
    )
    for column in ("point", "of", "before", "after", "worse by"):
        table.add_column(column, no_wrap=True)
    for change in changes:
        table.add_row(
            change.point,
            change.metric,
            _number(change.before),
            _number(change.after),
            f"{100 * (change.loss - 1):+.0f} %",
            style="bold red" if change.is_regression else "",
        )
    console.print(table)
    count = sum(change.is_regression for change in changes)
    limit = round(100 * (record.REGRESSION - 1))
    console.print(f"{count} of {len(changes)} worse by over {limit} % and beyond their scatter")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
