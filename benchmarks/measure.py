"""Paired timing and peak memory of forward and backward on this machine's CPU."""

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case, Loss


@dataclass(frozen=True)
class Result:
    """Medians of one case; the ratio is taken within each pair of runs."""

    name: str
    published_ms: float
    ours_ms: float
    ratio: float
    ours_gflops: float


def step(loss: Loss, z: Tensor) -> None:
    """One forward and backward."""
    z.grad = None
    loss(z).backward()


def compare(case: Case, seconds: float) -> Result:
    """Run both in turns, A B A B, for about ``seconds``; at least three pairs after a warm-up.

    Medians and ratios within a pair hold on a machine whose speed drifts.
    """
    z, published, ours = case.embeddings(), case.published(), case.ours()
    begin = time.perf_counter()
    _timed(published, z), _timed(ours, z)
    pair = time.perf_counter() - begin
    inner = max(1, int(2e-3 / pair))  # several calls a turn where one is too short to time
    pairs = min(200, max(3, int(seconds / (pair * inner))))
    runs = [(_timed(published, z, inner), _timed(ours, z, inner)) for _ in range(pairs)]
    ours_seconds = statistics.median(b for _, b in runs)
    return Result(
        case.name,
        published_ms=1e3 * statistics.median(a for a, _ in runs),
        ours_ms=1e3 * ours_seconds,
        ratio=statistics.median(a / b for a, b in runs),
        ours_gflops=1e-9 * case.flops / ours_seconds,
    )


def _timed(loss: Loss, z: Tensor, count: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        step(loss, z)
    return (time.perf_counter() - begin) / count


def peak_mib(case: Case, which: str) -> float:
    """Peak memory of the first step in a fresh process, over what it held before, in MiB."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_mib_here, case.name, which).result()


def _peak_mib_here(name: str, which: str) -> float:
    case = next(c for c in CASES if c.name == name)
    loss = getattr(case, which)()
    small = case.embeddings()[:, :4].detach().requires_grad_()
    step(loss, small)  # libraries and thread pools, which are no part of the loss
    z = case.embeddings()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
    before = _status_kib("VmRSS")
    step(loss, z)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    import platform

    import numpy as np

    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
