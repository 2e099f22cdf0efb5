"""Checks of the GPU benchmark: the machine, the tests, a sanitizer."""

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.gpu_measure import MIB, Bench, Row, run_process
from vicreg_losses import CovarianceLoss, SlicedSketchLoss, VarianceLoss, VISRegLoss
from vicreg_losses.kernels import plan

TESTS = ("gpu", "gpu_sketch", "kernels", "sketch_kernels", "sketch_kernels_in_losses", "plan")


def machine(bench: Bench, arch: str) -> Row:
    """What the figures depend on."""

    def output(*command: str) -> str | None:
        code, text = run_process(command, 10) if shutil.which(command[0]) else (None, "")
        return text.strip() if code == 0 else None

    changes = output("git", "status", "--porcelain")
    row: Row = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "arch": arch,
    }
    if not bench.dry:
        chip = torch.cuda.get_device_properties(0)
        row |= {"gpu": chip.name, "capability": f"{chip.major}.{chip.minor}"}
        row |= {"processors": chip.multi_processor_count, "memory_mib": chip.total_memory // MIB}
    return {**row, "summary": [", ".join(f"{key} {value}" for key, value in row.items())]}


def run_tests(seconds: float, dry: bool, beside: Sequence[Sequence[str]] = ()) -> Row:
    """The tests of the kernels; in a dry run pytest's version instead.

    Args:
        seconds: for all of them, at the same time: most of it is the compilation of kernels.
        dry: whether it is a dry run.
        beside: commands to run beside the tests.
    """

    def run(name: str) -> tuple[int | None, str]:
        flags = ["-q", "-W", "default", "-k", "not without_a_device and not gate"]
        what = ["--version"] if dry else [f"tests/test_{name}.py", *flags]
        return run_process([sys.executable, "-m", "pytest", *what], seconds)

    result: Row = {"summary": []}
    with ThreadPoolExecutor(len(TESTS) + len(beside)) as pool:
        found = pool.map(run, TESTS)
        others = list(pool.map(partial(run_process, timeout=seconds), beside))
        for name, (code, output) in zip(TESTS, found, strict=True):
            counts = count_tests(output := output[-4000:])
            green = code == 0 and counts["passed"] > 0
            result[name] = {"green": green, "exit": code, "counts": counts, "tail": output}
            result["summary"].append(f"{name}: green {green}, exit {code}, {counts}")
    result["beside"] = [{"exit": code, "tail": output[-1000:]} for code, output in others]
    return {"green": all(result[name]["green"] for name in TESTS), **result}


def count_tests(output: str) -> dict[str, int]:
    """Numbers in the last line of pytest."""
    line = output.strip().rpartition("\n")[2]
    words = {"passed": "passed", "failed": "failed", "skipped": "skipped", "errors": "errors?"}
    return {k: sum(map(int, re.findall(rf"(\d+) {word}\b", line))) for k, word in words.items()}


def sanitize(seconds: float, dry: bool) -> Row:
    """The tools of compute-sanitizer over a small forward and backward."""
    deadline = time.time() + seconds
    command = [sys.executable, "-m", "benchmarks.gpu", "--sanitize-target"]
    command += ["--dry-run"] * dry
    code, output = run_process(command, min(60.0, seconds))  # also compiles, for the next ones
    result: Row = {"alone": {"exit": code, "tail": output[-1000:]}, "summary": [f"alone {code}"]}
    folders = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    tool = shutil.which("compute-sanitizer", path=folders)
    if tool is None:
        return {**result, "missing": "compute-sanitizer", "summary": [f"alone {code}, no tool"]}
    for check in ("memcheck", "racecheck", "initcheck"):
        left = deadline - time.time()
        env = {} if check == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        flags = ["--tool", check, "--error-exitcode", "1"]
        flags += ["--report-api-errors", "no"] * (check == "memcheck")  # failed queries are normal
        code, output = run_process([tool, *flags, *command], min(60.0, left), env)  # 1 s at least
        lines = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", output)
        result[check] = {"exit": code, "errors": lines, "tail": output[-1500:]}
        result["summary"].append(f"{check}: exit {code}, {', '.join(lines) or 'no summary'}")
    return result


def sanitize_target(bench: Bench) -> None:
    """Small forward and backward passes of all kernels, for a sanitizer to watch."""
    for shape in ((2, 40, 70), (2, 70, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            z = bench.randn(*shape, dtype=dtype).requires_grad_()
            loss = VarianceLoss(impl="triton")(z) + CovarianceLoss(impl="triton")(z)
            assert bool(torch.autograd.grad(loss, z)[0].isfinite().all())
    sketches: list[Callable[[Tensor], Tensor]] = [
        VISRegLoss(num_slices=2, impl="triton"),  # all terms of the gradient
        SlicedSketchLoss(2, "epps_pulley", impl="triton"),
        SlicedSketchLoss(2, "epps_pulley", knots=34, impl="triton"),  # knots in groups
    ]
    for dtype in (torch.float32, torch.bfloat16):
        z = bench.randn(2, 37, 19, dtype=dtype).requires_grad_()
        for sketch in sketches:
            _watch(sketch, z)
        with mock.patch.dict(plan._NETWORK_WARPS, {False: {0: 1}, True: {0: 1}}):  # no network
            _watch(SlicedSketchLoss(3, impl="triton"), z)


def _watch(loss: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """With a gradient, and without."""
    assert bool(torch.autograd.grad(loss(z), z)[0].isfinite().all())
    assert bool(loss(z.detach()).isfinite())
