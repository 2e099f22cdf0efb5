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

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # `pytest` alone does not

from benchmarks.gpu_cases import FULL, TINY, Rates, floor_us
from benchmarks.gpu_measure import Bench, Stage, count_tests, run_process, time_limit

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
    assert len(record["suite"]["rows"]) == 10 * 2 + 3
    # Nothing is left out but what needs CUDA.
    skipped = [name for stage in record.values() for name in stage.get("skipped", ())]
    assert skipped == ["graph 1x16x40 triton bf16"]
    assert {question.split()[0] for question in record["thresholds"]["answers"]} == set("12345678")
    summary = done.stdout[done.stdout.rindex("== machine: ") :]
    assert len(summary) < 6000 and all(f"== {stage}: " in summary for stage in STAGES)  # noqa: PT018
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
