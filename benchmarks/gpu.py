"""``python -m benchmarks.gpu --out DIR``: tests, suite, tuning and thresholds on a CUDA device.

Writes DIR/gpu.json after every stage and prints tables; ends soon after ``--seconds``.
``--dry-run`` takes the same paths on a CPU, at tiny sizes, in Triton's interpreter.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = str(int("--dry-run" in sys.argv))  # before Triton is imported

import torch

from benchmarks import gpu_cases, gpu_checks, gpu_sketch, gpu_sketch_tuning, gpu_tuning
from benchmarks.gpu_cases import Rates
from benchmarks.gpu_measure import BROKEN, Bench, Row, Stage, run_process, write_json
from benchmarks.gpu_thresholds import thresholds
from vicreg_losses.kernels import launch

# Stages, the most seconds of each, and the share of all time that is kept for those after it.
STAGES = {
    "machine": (20, 0.0),
    "ceilings": (30, 0.0),
    "tests": (180, 0.45),
    "sanitizer": (180, 0.45),
    "suite": (250, 0.2),
    "tuning": (150, 0.06),
    "thresholds": (60, 0.0),
}
# What stages do in a process of their own; and up to which share of the time.
CHILDREN: dict[str, dict[Callable[[Stage, Rates], None], float]] = {
    "suite": {gpu_sketch.suite: 0.65, gpu_cases.suite: 1.0},
    "tuning": {gpu_sketch_tuning.tuning: 0.55, gpu_tuning.tuning: 1.0},
    "thresholds": {thresholds: 1.0},
}
COMMAND = (sys.executable, "-m", "benchmarks.gpu")


def in_child(name: str, limit: float, options: argparse.Namespace) -> Row:
    """Run a stage in a process: what breaks the CUDA context, or hangs, ends no other stage."""
    part, end = options.out / f"{name}.json", time.time() + limit
    part.unlink(missing_ok=True)
    command = [*COMMAND, "--out", str(options.out)]
    command += ["--stage", name, "--deadline", str(end), *["--dry-run"] * options.dry_run]
    for _ in range(4):  # resumes after the row in which it died
        code, _ = run_process(command, end + 15 - time.time(), show=True)
        if code is None or 0 <= code != BROKEN or time.time() > end:
            break
    result: Row = json.loads(part.read_text()) if part.exists() else {}
    part.unlink(missing_ok=True)
    if code != 0:
        result.setdefault("error", "ended by force" if code is None else f"exit {code}")
    return result


def run_stage(options: argparse.Namespace, bench: Bench) -> None:
    """What the child of :func:`in_child` does."""
    stage = Stage(bench, options.out / f"{options.stage}.json", options.deadline)
    known = json.loads((options.out / "gpu.json").read_text())["ceilings"]
    rates = Rates(*(known.get(key, usual) for key, usual in Rates()._asdict().items()))
    try:
        for part, share in CHILDREN[options.stage].items():
            now = time.time()
            stage.deadline = now + share * (options.deadline - now)
            part(stage, rates)
    except Exception:
        stage.record["error"] = traceback.format_exc()
        raise
    finally:
        stage.save()


def compilations(bench: Bench) -> list[list[str]]:
    """Commands that compile, on other cores than the tests, what later stages run."""
    if bench.dry:
        return []
    networks = [["--compile", str(length)] for length in gpu_sketch_tuning.FULL.lengths]
    return [[*COMMAND, *flags] for flags in (["--sanitize-target"], *networks)]


def digest(record: Row) -> str:
    """What the end of a log shall carry, in less than 12000 characters."""
    lines = []
    for name, result in record.items():
        rows, skipped = result.get("rows", {}), result.get("skipped", {})
        failed = {row: found["error"] for row, found in rows.items() if "error" in found}
        counts = f"{len(rows)} rows, {len(failed)} failed, skipped {len(skipped)}"
        lines.append(f"== {name}: {result['seconds']:.0f} s, {counts}")
        failures = {"stage": result["error"], **failed} if "error" in result else failed
        for row, error in list(failures.items())[:3]:
            said = [line for line in error.strip().splitlines() if "Error" in line] or [error]
            lines.append(f"failed: {row}: {said[-1][:150]}")
        lines += result.get("summary", [])
    return "\n".join(line[:700] for line in lines)[:11500]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.json")
    parser.add_argument("--seconds", type=float, default=450.0, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="all of it, tiny, on the CPU")
    parser.add_argument("--sanitize-target", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=int, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA device; --dry-run needs none")
    bench = Bench(options.dry_run)
    if options.sanitize_target:
        return gpu_checks.sanitize_target(bench)
    if options.compile:
        return gpu_sketch_tuning.compile_networks(bench, options.compile)
    if options.stage:
        return run_stage(options, bench)
    options.out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[float], Row]] = {
        "machine": lambda _: gpu_checks.machine(bench, launch.target(bench.device).arch),
        "ceilings": lambda _: gpu_cases.ceilings(bench),
        "tests": lambda limit: gpu_checks.run_tests(limit, bench.dry, compilations(bench)),
        "sanitizer": lambda limit: gpu_checks.sanitize(limit, bench.dry),
        **{name: partial(in_child, name, options=options) for name in CHILDREN},
    }
    begin, record = time.time(), {}
    for name, (most, kept) in STAGES.items():
        start = time.time()
        limit = min(most, begin + (1 - kept) * options.seconds - start)
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        try:
            result = stages[name](limit) if limit > 0 else {"skipped": {name: "no time left"}}
        except Exception:
            result = {"error": traceback.format_exc()}
        record[name] = {**result, "seconds": time.time() - start}
        write_json(options.out / "gpu.json", record)
    print(f"\n{digest(record)}", flush=True)
    if any("error" in result for result in record.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
