"""The benchmark's own correctness: its truth, its gate, its records."""

import dataclasses
import math
from pathlib import Path

import oracles
import pytest
import torch
from needed import needs
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import measure, record, truth
from benchmarks.contenders import (
    COMPILED,
    FIELD,
    OURS,
    OURS_COMPILED,
    PUBLISHED,
    Contender,
)
from benchmarks.measure import Row
from benchmarks.points import BASES, QUICK, SWEEPS, Point, along, every

SMALL = {
    "variance": Point("variance", 2, 12, 9),
    "covariance": Point("covariance", 2, 9, 12),
    "vicreg": Point("vicreg", 2, 12, 9),
    "visreg": Point("visreg", 3, 12, 9, 7),
    "sigreg": Point("sigreg", 2, 12, 9, 7),
}
ORACLES = {
    "variance": lambda z, w: oracles.variance(z),
    "covariance": lambda z, w: oracles.covariance(z),
    "vicreg": lambda z, w: oracles.vicreg(z),
    "visreg": lambda z, w: oracles.visreg(z, w, num_global=1),
    "sigreg": lambda z, w: oracles.epps_pulley(z, w),
}


@pytest.mark.parametrize("chunk", [truth._ELEMENTS, 24])
@pytest.mark.parametrize("point", [*SMALL.values(), Point("covariance", 1, 12, 9)], ids=str)
def test_truth_is_the_oracle(point: Point, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "_ELEMENTS", chunk)
    views, w = point.embeddings(), point.directions()
    value, gradients = truth.value_and_gradients(point, views, w, {})
    z = torch.stack([view.detach() for view in views]).double()
    wide = w.double() if w is not None else None
    expected, slope = oracles.value_and_grad(lambda x: ORACLES[point.loss](x, wide), z)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert truth.error(gradients, list(slope)) < 1e-12


CONTENDERS = [(loss, c) for loss, field in FIELD.items() for c in field if not c.compiled]


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize(
    ("loss", "contender"), CONTENDERS, ids=[f"{loss}-{c.name}" for loss, c in CONTENDERS]
)
def test_contenders_are_what_they_claim(loss: str, contender: Contender) -> None:
    point = SMALL[loss]
    point = dataclasses.replace(point, views=max(contender.views, 0) or point.views)
    if contender.absence(point):
        pytest.skip(f"{contender.name}: {contender.absence(point)}")
    found = measure.errors(point, {contender.name: contender.build(point)})[contender.name]
    assert found["value_error"] < 1e-5
    assert found["gradient_error"] < 1e-4


def test_every_axis_is_swept_over_its_range() -> None:
    ranges = {"dimensions": (64, 65536), "samples": (64, 65536), "slices": (64, 8192)}
    for base in BASES:
        sweep = SWEEPS[base.loss]
        assert set(sweep) >= {"dimensions", "samples"}
        assert ("slices" in sweep) == bool(base.slices)
        for axis, (low, high) in ranges.items():
            if axis in sweep:
                assert (min(sweep[axis]), max(sweep[axis])) == (low, high)
        assert all(base in along(base, axis) for axis in sweep)
    assert max(SWEEPS["sigreg"]["views"]) == 10
    points = every()
    assert len(points) == len(set(points))
    assert {p.name for p in QUICK} <= {p.name for p in points}


def row(contender: str, point: Point = SMALL["covariance"], **figures: object) -> Row:
    known = {"forward_ms": 1.0, "both_ms": 2.0, "forward_ratio": 1.0, "both_ratio": 1.0}
    errors = {"peak_mib": 1.0, "value_error": 1e-7, "gradient_error": 1e-7}
    place = dataclasses.asdict(point)
    return Row(point.name, **place, contender=contender, **(known | errors | figures))


@pytest.mark.parametrize("name", ["value_error", "gradient_error"])
@pytest.mark.parametrize("error", [5e-6, math.nan])
def test_gate(name: str, error: float) -> None:
    formula = row(PUBLISHED)
    assert not record.failures([formula, row(OURS)])
    assert len(record.failures([formula, row(OURS, **{name: error})])) == 1
    assert record.failures([row(OURS, **{name: 1e-3})])
    assert not record.failures([row(OURS, **{name: 5e-6}), row(PUBLISHED, **{name: 4e-6})])


def test_gate_sees_a_wrong_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SMALL["covariance"]
    ours = FIELD["covariance"][0]
    rows = {name: Row(point.name, **dataclasses.asdict(point), contender=name) for name in (OURS,)}

    def failures() -> list[str]:
        for name, figures in measure.errors(
            point, {OURS: FIELD["covariance"][0].build(point)}
        ).items():
            rows[name] = dataclasses.replace(rows[name], **figures)
        return record.failures(list(rows.values()))

    assert not failures()
    wrong = dataclasses.replace(ours, build=lambda p: lambda *z: 1.01 * ours.build(p)(*z))
    monkeypatch.setitem(FIELD, "covariance", (wrong,))
    assert len(failures()) == 2


def test_wrong_results_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [row(PUBLISHED), row(OURS, value_error=0.01)]
    monkeypatch.setattr(measure, "measure", lambda *_: rows)
    arguments = ["--quick", "--only", "covariance-v1-n64-d64", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "nothing is reported" in shown
    assert "value_error of ours 0.01" in shown
    assert not list((tmp_path / "out").iterdir())


def sweep_rows(power: float) -> list[Row]:
    base = next(b for b in BASES if b.loss == "covariance")
    return [
        row(name, point, both_ms=factor * point.dimensions**power)
        for point in along(base, "dimensions")
        for name, factor in ((OURS, 1.0), (PUBLISHED, 3.0))
    ]


def test_exponents() -> None:
    found = record.exponents(sweep_rows(1.5))
    chosen = [e for e in found if (e.contender, e.metric) == (OURS, "both_ms")]
    assert [(e.axis, e.exponent) for e in chosen] == [("dimensions", pytest.approx(1.5))]
    assert (chosen[0].smallest, chosen[0].largest) == (4096, 65536)


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ours(ratio: float, ms: float = 1.0, scatter: float = 0.05, peak: float = 20.0) -> Row:
        low, high = ratio - scatter, ratio + scatter
        more = {"both_low": low, "both_high": high, "peak_mib": peak}
        return row(OURS, both_ratio=ratio, both_ms=ms, forward_low=1.0, forward_high=1.0, **more)

    runs = {
        "fast": ours(4.4),
        "slow": ours(4.1, ms=9.0),  # 7 %, though its milliseconds are nine times as many
        "slower": ours(3.9),
        "scattered": ours(3.9, scatter=1.0),
        "larger": ours(4.4, peak=23.0),
    }
    for name, one in runs.items():
        record.write(tmp_path / name, [one, row(PUBLISHED)], {"machine": {}, "versions": {}})
    machine = {"cpu": "another", "threads": 2}
    record.write(tmp_path / "other", [runs["fast"]], {"machine": machine, "versions": {}})

    def compare(*names: str) -> int:
        return command.main(["--compare", *(str(tmp_path / name) for name in names)])

    for better, worse, regressions in (
        ("fast", "slow", 0),
        ("slower", "fast", 0),
        ("fast", "scattered", 0),
        ("fast", str(Path("slower") / "results.json"), 1),
        ("fast", "larger", 1),
    ):
        assert compare(better, worse) == regressions
        assert f"{regressions} of 3 worse by over 10 %" in capsys.readouterr().out
    for name, words in (
        ("missing", "expected results of python -m benchmarks"),
        ("other", "expected the same cpu, got None and another"),
    ):
        with pytest.raises(SystemExit, match="2"):
            compare("fast", name)
        assert words in capsys.readouterr().err


def test_ours_compiled_that_did_not_run_is_a_failure_where_the_formula_did() -> None:
    ended = row(OURS_COMPILED, absent="no")
    here = [row(OURS), row(PUBLISHED), ended]
    assert record.failures([*here, row(COMPILED)]) == [
        f"{ended.point}: {OURS_COMPILED} did not run: no"
    ]
    assert not record.failures([*here, row(COMPILED, absent="no compiler")])
    assert record.failures([row(OURS), row(PUBLISHED), row(OURS_COMPILED, value_error=0.1)])


def test_ours_that_did_not_run_is_a_failure() -> None:
    assert record.failures([row(PUBLISHED), row(OURS, absent="ended")]) == [
        "covariance-v2-n9-d12: ours did not run: ended"
    ]


@needs("matplotlib")[0]
@pytest.mark.parametrize("option", ["--out", "--threads"])
def test_bad_values(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    value = {"--out": str(tmp_path / "file"), "--threads": "0"}[option]
    with pytest.raises(SystemExit, match="2"):
        command.main([option, value])
    assert f"{option}: expected" in capsys.readouterr().err


def test_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert measure.versions()["vicreg-losses"]


def test_records_come_back(tmp_path: Path) -> None:
    rows = [row(OURS), row(PUBLISHED, absent="needs over 9 GiB", both_ms=None)]
    record.write(tmp_path, rows, {"machine": {"cpu": "a"}, "versions": {"lightly": "1"}})
    again, about = record.read(tmp_path)
    assert again == rows
    assert about["machine"] == {"cpu": "a"}
    table = (tmp_path / "results.csv").read_text().splitlines()
    assert len(table) == 3
    assert table[0].startswith("point,loss,views,samples")


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--compare", "a"], ["--wrong"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)


@needs("matplotlib")[0]
def test_charts(tmp_path: Path) -> None:
    from benchmarks import charts

    drawn = charts.draw(tmp_path, sweep_rows(1.0), {})
    assert [path.name for path in drawn] == ["covariance.png", "covariance.svg"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_absent_contenders_are_named() -> None:
    absent = Contender("other", lambda point: Tensor.sum, package="no-such-package")
    assert absent.absence(SMALL["vicreg"]) == "no-such-package is not installed"
    two = Contender("two", lambda point: Tensor.sum, views=2)
    assert two.absence(SMALL["visreg"]) == "takes 2 views"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_one_point_in_processes_of_its_own() -> None:
    point = Point("covariance", 1, 64, 64)
    left_out = {c.name: "not here" for c in FIELD["covariance"] if c.name not in (OURS, PUBLISHED)}
    found = {r.contender: r for r in measure.measure(point, 0.05, left_out)}
    ours, formula = found[OURS], found[PUBLISHED]
    assert not ours.absent
    assert formula.both_ratio == formula.forward_ratio == 1
    assert ours.both_ratio > 0
    assert ours.both_lead == ours.both_ratio
    assert formula.both_lead is None
    assert ours.both_ms > 0
    assert ours.rounds >= 3
    assert formula.peak_mib >= 0
    assert found[COMPILED].absent == "not here"
    assert not record.failures(list(found.values()))
