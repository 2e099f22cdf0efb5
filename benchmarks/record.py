"""A run's figures as files: JSON and CSV, fitted exponents, and the comparison of two runs."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import ALL_OURS, COMPILED, OURS, PUBLISHED
from benchmarks.measure import Row
from benchmarks.points import BASES, SWEEPS, along

FITTED = 3  # largest points of a sweep, where work outweighs the cost of a call
WRONG = 1e-3  # a relative error above this is no rounding of float32
REGRESSION = 1.10
SCATTER_MIB = 1.0  # of a peak, from run to run
METRICS = ("forward_ms", "both_ms", "peak_mib")


@dataclass(frozen=True)
class Exponent:
    """Slope of a curve between the logarithms of a size and of a cost."""

    loss: str
    axis: str
    contender: str
    metric: str
    exponent: float
    smallest: int
    largest: int


@dataclass(frozen=True)
class Change:
    """Ours at one point in two runs.

    Attributes:
        point: where.
        metric: "forward" or "both", as times faster than the published formula, or "peak", in MiB.
        before, after: the two.
        loss: the second over the first, or the other way round, above 1 where the second is worse.
        beyond_scatter: whether the quartiles of the rounds' ratios do not overlap.
    """

    point: str
    metric: str
    before: float
    after: float
    loss: float
    beyond_scatter: bool

    @property
    def is_regression(self) -> bool:
        """Worse by more than the limit, and by more than the rounds of a run differ."""
        return self.loss > REGRESSION and self.beyond_scatter


def curve(rows: Iterable[Row], loss: str, axis: str, contender: str) -> list[Row]:
    """A contender's rows along a sweep, in the order of the sweep, without those absent."""
    base = next(b for b in BASES if b.loss == loss)
    named = {(row.point, row.contender): row for row in rows}
    found = [named.get((point.name, contender)) for point in along(base, axis)]
    return [row for row in found if row is not None and not row.absent]


def exponents(rows: Sequence[Row]) -> list[Exponent]:
    """Of every curve with enough points, over the largest ones."""
    found = []
    for loss, sweep in SWEEPS.items():
        contenders = dict.fromkeys(row.contender for row in rows if row.loss == loss)
        for axis in sweep:
            for contender in contenders:
                points = curve(rows, loss, axis, contender)[-FITTED:]
                if len(points) < FITTED:
                    continue
                sizes = [getattr(row, axis) for row in points]
                for metric in METRICS:
                    costs = [getattr(row, metric) for row in points]
                    if all(cost and cost > 0 for cost in costs):
                        slope = float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
                        found.append(
                            Exponent(loss, axis, contender, metric, slope, sizes[0], sizes[-1])
                        )
    return found


def write(folder: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """``results.json`` and ``results.csv``; ``about`` has the machine, the versions, the commit."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **about,
        "exponents": [_rounded(asdict(e)) for e in exponents(rows)],
        "rows": [_rounded(asdict(row)) for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        names = [f.name for f in fields(Row)]
        table = csv.DictWriter(file, [*names, *about.get("versions", {}), "cpu"])
        table.writeheader()
        common = {**about.get("versions", {}), "cpu": about.get("machine", {}).get("cpu", "")}
        table.writerows({**_rounded(asdict(row)), **common} for row in rows)


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and the rest, of a folder of results or its JSON file.

    Raises:
        ValueError: if it is not one.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text())
        rows = [Row(**row) for row in record.pop("rows")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected results of python -m benchmarks, got {path}: {error}") from None
    return rows, record


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Ours in two runs, relative to the published formula of the same run, worst change first.

    The formula is the clock: a machine that is slower, or busy, is so for both. Where it could not
    be run there is none, and only memory is compared.
    """
    earlier = {row.point: row for row in before if row.contender == OURS}
    found = []
    for new in after:
        old = earlier.get(new.point)
        if new.contender != OURS or old is None:
            continue
        for metric in ("forward", "both"):
            a, b = (getattr(row, f"{metric}_ratio") for row in (old, new))
            if a and b:
                apart = getattr(old, f"{metric}_low") > getattr(new, f"{metric}_high")
                found.append(Change(new.point, metric, a, b, a / b, apart))
        if old.peak_mib and new.peak_mib:
            more = new.peak_mib - old.peak_mib > SCATTER_MIB
            ratio = new.peak_mib / old.peak_mib
            found.append(Change(new.point, "peak", old.peak_mib, new.peak_mib, ratio, more))
    return sorted(found, key=lambda change: (not change.is_regression, -change.loss))


def failures(rows: Sequence[Row]) -> list[str]:
    """Where ours are not right: errors beyond what float32 owes at that point.

    Allowed is twice the error of the published formula in float32, or 1e-6 (eight roundings)
    where that is exact by luck; where the formula could not be run, 1e-4.
    """
    formula = {row.point: row for row in rows if row.contender == PUBLISHED and not row.absent}
    compiles = {row.point for row in rows if row.contender == COMPILED and not row.absent}
    found = []
    for row in rows:
        if row.contender not in ALL_OURS:
            continue
        if row.absent:  # compiled code needs a compiler, which the formula misses as well
            if row.contender == OURS or row.point in compiles:
                found.append(f"{row.point}: {row.contender} did not run: {row.absent}")
            continue
        for name in ("value_error", "gradient_error"):
            mine = getattr(row, name)
            other = formula.get(row.point)
            limit = max(1e-6, 2 * getattr(other, name)) if other is not None else 1e-4
            if not mine <= limit:
                whose = f"{row.point}: {name} of {row.contender}"
                found.append(f"{whose} {mine:.2g}, expected at most {limit:.2g}")
    return found


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
