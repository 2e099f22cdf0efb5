"""The GPU benchmark on a CPU: its floors, its shapes, and all of its stages at tiny sizes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # `pytest` alone does not

from benchmarks import gpu_sketch_cases as sketch
from benchmarks import gpu_sketch_tuning as sketch_tuning
from benchmarks import published
from benchmarks.gpu_cases import FULL, TINY, Rates, floor_us
from benchmarks.gpu_checks import count_tests
from benchmarks.gpu_measure import Bench, Skip, Stage, run_process, time_limit
from benchmarks.gpu_sketch import straightness
from benchmarks.gpu_sketch_cases import Case

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["machine", "ceilings", "tests", "sanitizer", "suite", "tuning", "thresholds"]


def test_floor_of_the_headline_shape() -> None:
    shape = (1, 2048, 8192)
    assert floor_us(shape, 4, 1, True) == pytest.approx(66.9, abs=0.1)
    assert floor_us(shape, 4, 1, False) == pytest.approx(153.9, abs=0.1)


def test_floor_is_bound_by_work_or_by_memory() -> None:
    shape = (2, 300, 500)
    elements, side = 2 * 300 * 500, 2 * 300 * 300
    work = Rates(flops=1.0, bytes=1e30)
    assert floor_us(shape, 2, 1, False, work) == pytest.approx(3e6 * elements * 300)
    assert floor_us(shape, 4, 2, False, work) == pytest.approx(9e6 * elements * 300)
    memory = Rates(flops=1e30, bytes=1.0)
    forward = 8 * elements + 4 * elements + 4 * side
    assert floor_us(shape, 4, 2, True, memory) == pytest.approx(1e6 * forward)
    backward = 4 * side + 4 * elements + 4 * elements
    assert floor_us(shape, 4, 2, False, memory) == pytest.approx(1e6 * (forward + backward))
    doubled = Rates(2 * Rates().flops, 2 * Rates().bytes)
    assert floor_us(shape, 2, 1, False, doubled) == pytest.approx(floor_us(shape, 2, 1, False) / 2)


def test_shapes() -> None:
    named = [
        (1, 256, 8192),
        (1, 4096, 256),
        (1, 2048, 8192),
        (1, 4096, 2048),
        (1, 16384, 2048),
        (1, 65536, 512),
        (1, 2048, 65536),
        (2, 1024, 2048),
    ]
    assert sorted(FULL.named) == sorted(named)
    assert {d for _, n, d in FULL.sweep if n == 1024} >= {256, 1024, 4096, 16384, 65536}
    assert {n for _, n, d in FULL.sweep if d == 1024} == {256, 1024, 4096, 16384, 65536}
    assert len(set(FULL.named) | set(FULL.sweep)) == len(FULL.named) + len(FULL.sweep)
    for sizes in (FULL, TINY):
        assert set(sizes.targets) <= set(sizes.named)
        assert next(iter(sizes.targets)) == sizes.tuned[0] == sizes.stripped[0]


# (N, D), K, and by hand the microseconds of an H200, forward and backward of 16-bit embeddings.
SKETCH_FLOORS = [
    ("wasserstein", 2048, 8192, 256, 56),
    ("wasserstein", 256, 8192, 2048, 43),
    ("wasserstein", 4096, 256, 4096, 154),
    ("wasserstein", 4096, 2048, 2048, 165),
    ("wasserstein", 16384, 2048, 2048, 736),
    ("wasserstein", 65536, 512, 4096, 4453),
    ("wasserstein", 2048, 65536, 256, 426),
    ("epps_pulley", 4096, 256, 4096, 102),
    ("epps_pulley", 4096, 2048, 4096, 254),
    ("epps_pulley", 16384, 2048, 2048, 508),
    ("epps_pulley", 65536, 512, 2048, 986),
]


@pytest.mark.parametrize(("loss", "samples", "dimensions", "slices", "by_hand"), SKETCH_FLOORS)
def test_floor_of_the_sketch(
    loss: str, samples: int, dimensions: int, slices: int, by_hand: float
) -> None:
    case = Case(loss, 1, samples, dimensions, slices)
    assert sketch.floor_us(case, 2, 1, False) == pytest.approx(by_hand, rel=0.15)


def test_floor_of_the_sort() -> None:
    training = sketch.FULL.visreg
    assert training == Case("wasserstein", 10, 1024, 256, 4096, torch.bfloat16)
    elements = 10 * 1024 * 4096
    once = sketch.sort_floor_us(elements, 1024, 1, Rates())
    assert once == pytest.approx(228, rel=0.01)
    assert sketch.sort_floor_us(elements, 1024, 2, Rates()) == 2 * once
    assert sketch.sort_floor_us(elements, 1000, 1, Rates()) == once
    assert sketch.sort_floor_us(elements, 1025, 1, Rates()) > once


def test_floor_of_the_sketch_is_bound_by_work_or_by_memory() -> None:
    n, d, k = 300, 70, 500
    for views, loss in ((1, "wasserstein"), (3, "epps_pulley")):
        case = Case(loss, views, n, d, k)
        elements, projections, weights = views * n * d, views * n * k, d * k
        work = Rates(flops=1.0, bytes=1e30, clocks=1e30)
        assert sketch.floor_us(case, 2, 1, True, work) == pytest.approx(2e6 * elements * k)
        assert sketch.floor_us(case, 4, 2, False, work) == pytest.approx(12e6 * elements * k)
        each = {"wasserstein": 2 * 1.08, "epps_pulley": 140 / 128}[loss]
        clocks = Rates(flops=1e30, bytes=1e30, clocks=1.0)
        found = sketch.floor_us(case, 4, 2, True, clocks)
        assert found == pytest.approx(1e6 * each * projections)
        memory = Rates(flops=1e30, bytes=1.0, clocks=1e30)
        passes = (4 + 4 + 4) * elements + 4 * weights
        forward = passes + 4 * (elements + weights) + 4 * projections
        assert sketch.floor_us(case, 4, 2, True, memory) == pytest.approx(1e6 * forward)
        both = forward + 4 * projections + 4 * weights + 4 * elements
        assert sketch.floor_us(case, 4, 2, False, memory) == pytest.approx(1e6 * both)


def test_sketch_cases() -> None:
    full = sketch.FULL
    assert [(c.views, c.dimensions, c.slices) for c in full.cost] == [(8, 10000, 2500)] * 6
    assert [c.samples for c in full.cost] == [1000, 2000, 5000, 10000, 20000, 50000]
    assert {c.half for c in full.cost} == {torch.float16}
    assert (full.sigreg.shape, full.sigreg.slices) == ((1, 4096, 256), 4096)
    for sizes in (full, sketch.TINY):
        assert len(set(sizes.others)) == len(sizes.others)
        for axis, cases in sizes.axes.items():
            values = [getattr(case, axis) for case in cases]
            assert values == sorted(set(values))
            assert len({case._replace(**{axis: 0}) for case in cases}) == 1
            assert set(cases) & set(sizes.cost)  # where the sweeps meet


def test_what_does_not_fit_is_left_out() -> None:
    last = sketch.FULL.cost[-1]
    needed = sketch.needed_bytes(last, last.competitor("published", "half"))
    assert 80e9 < needed < 120e9
    assert sketch.needed_bytes(last, last.competitor("triton", "half")) < 0.3 * needed
    row = last, last.competitor("published", "half"), Rates(), int(needed)
    with pytest.raises(Skip, match="MiB are free"):
        sketch.row_of(Bench(dry=True), *row)


FORMULAS = {
    "wasserstein": oracles.sliced_wasserstein,
    "epps_pulley": oracles.epps_pulley,
    "visreg": oracles.visreg,
}


@pytest.mark.parametrize("loss", FORMULAS)
@pytest.mark.parametrize("kind", ["published", "torch", "triton"])
def test_competitors_evaluate_the_same(loss: str, kind: str) -> None:
    bench, case = Bench(dry=True), Case(loss, 2, 9, 5, 2)
    z = oracles.embeddings(2, 9, 5, dtype=torch.float32)
    torch.manual_seed(1)
    found = sketch.loss_of(case, case.competitor(kind, "highest"), bench)
    torch.manual_seed(1)
    w = sketch.unit_columns(bench, 5, 2)
    true = oracles.truth(lambda x: FORMULAS[loss](x, w), z)
    assert max(map(oracles.error, oracles.value_and_grad(found, z), true)) <= 1e-5


def test_published_formulas_with_drawn_and_with_given_slices() -> None:
    z = oracles.embeddings(2, 9, 5, dtype=torch.float32)
    pairs = (published.visreg_terms, published.visreg), (published.sigreg, published.epps_pulley)
    for drawing, given in pairs:
        torch.manual_seed(2)
        drawn = drawing(z, 4)
        torch.manual_seed(2)
        assert torch.equal(drawn, given(z, published.unit_directions(5, 4)))


def test_straightness() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert straightness(sizes, [3 * x for x in sizes], False) == pytest.approx((1, 0))
    # 1 to 8 for each, 3.5 from the middle of 4.5.
    assert straightness(sizes, [x * x for x in sizes], False) == pytest.approx((2, 7 / 9))
    exponent, distance = straightness(sizes, [3 * x + 5 for x in sizes], True)
    assert exponent < 1
    assert distance == pytest.approx(0, abs=1e-12)
    assert straightness(sizes, [x * x for x in sizes], True)[1] > 0.15


def test_networks_of_the_tuning() -> None:
    bench, lengths = Bench(dry=True), sketch_tuning.FULL.lengths
    current = {
        (length, order): sketch_tuning.network_of(bench, length, order)
        for length in lengths
        for order in sketch_tuning.ORDERS
    }
    for (length, order), planned in current.items():
        for warps in sketch_tuning.other_warps(bench, length, order):
            other = sketch_tuning.network_of(bench, length, order, warps)
            assert (1 << other.bits, other.warps) == (length, warps)
            assert other != planned
        assert sketch_tuning.network_of(bench, length, order) == planned


def test_a_stage_survives_errors_resumes_and_ends(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("on purpose")

    path = tmp_path / "stage.json"
    stage = Stage(Bench(dry=True), path, time.time() + 60)
    stage.row("first", lambda: {"us": 1.0})
    stage.row("second", fail)
    stage.row("third", lambda: {"us": 3.0})
    rows = json.loads(path.read_text())["rows"]
    assert rows["first"] == {"us": 1.0} and rows["third"] == {"us": 3.0}  # noqa: PT018
    assert "on purpose" in rows["second"]["error"]

    resumed = Stage(Bench(dry=True), path, time.time() - 1)
    resumed.row("first", fail)
    resumed.row("fourth", fail)
    assert resumed.rows == rows
    assert resumed.record["skipped"] == {"fourth": "no time left"}


def test_time_limits() -> None:
    def catch_and_go_on() -> None:
        with suppress(TimeoutError):
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(TimeoutError), time_limit(0.05):
        catch_and_go_on()
    begin = time.perf_counter()
    code, output = run_process(["sh", "-c", "echo started; sleep 30 & sleep 30"], 1.0)
    assert (code, output) == (None, "started\n")
    assert time.perf_counter() - begin < 10
    assert run_process(["sh", "-c", "exit 7"], 10.0) == (7, "")


def test_counts_of_pytest() -> None:
    line = "== 2 failed, 131 passed, 7 skipped, 40 deselected, 1 error in 61.00s (0:01:01) =="
    found = count_tests(f"FAILED tests/x.py::y - 9 passed\n{line}\n")
    assert found == {"passed": 131, "failed": 2, "skipped": 7, "errors": 1}
    assert set(count_tests("").values()) == {0}


def keys(record: Any) -> Iterator[str]:
    if isinstance(record, dict):
        yield from record
        for value in record.values():
            yield from keys(value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is for the run itself")
def test_dry_run(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record) == STAGES
    assert "error" not in set(keys(record)), done.stdout[-6000:]
    assert record["machine"]["arch"] == "interpreter"
    assert record["tests"]["green"] is False
    rows = record["suite"]["rows"]
    assert sum(name[0].isdigit() for name in rows) == 10 * 2
    for kind in ("triton", "torch", "published", "compiled"):
        for case in (sketch.TINY.visreg, sketch.TINY.sigreg, *sketch.TINY.others):
            row = rows[f"{case.name} {kind} half"]
            assert row["step_us"] > 0
            assert row["step_floor_us"] > row["forward_floor_us"] > 0
    judged = record["suite"]["sketch_targets"]
    assert sum(entry["met"] is None for entry in judged) == 1  # there is no memory to measure
    # Nothing is left out but what needs CUDA.
    skipped = [name for stage in record.values() for name in stage.get("skipped", ())]
    assert len(skipped) == 4
    assert all(name.startswith("graph ") for name in skipped)
    assert {question.split()[0] for question in record["thresholds"]["answers"]} == set("12345678")
    summary = done.stdout[done.stdout.rindex("== machine: ") :]
    assert len(summary) < 12000 and all(f"== {stage}: " in summary for stage in STAGES)  # noqa: PT018
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
