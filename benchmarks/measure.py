"""Time, peak memory and error of the contenders at a point, on this machine's CPU.

Every point is measured in processes of its own, which are forked from one that has imported all
contenders and computed nothing. One contender after the other takes its steps, in turns, so that
a machine whose speed drifts is slow for all: ratios within a round hold, absolute times do not.
"""

import ctypes
import gc
import multiprocessing
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import truth
from benchmarks.contenders import ALL_OURS, FIELD, PUBLISHED, Contender, Loss
from benchmarks.points import Point

MEMORY_SHARE = 0.6  # of what is available: what needs more is left out by name
SLOWEST_SECONDS = 6.0  # of a step, likewise: it has been seen to be slow
SHORTEST_SECONDS = 2e-3  # of a turn: several calls where one is too short to time
LONG_SECONDS = 3.0  # of a step; beyond it the peak is of the first one, and no second is made


@dataclass
class Row:
    """One contender at one point; ``None`` where something could not be measured.

    Attributes:
        point: name of the point.
        loss, views, samples, dimensions, slices: the point.
        contender: who.
        forward_ms, both_ms: medians of the value alone (no gradient asked for), and of value and
            gradient.
        forward_ratio, both_ratio: time of the published formula over this one's, medians of the
            rounds' ratios.
        forward_low, forward_high, both_low, both_high: quartiles of the same.
        forward_lead, both_lead: of ours, the time of the best other contender with the same loss
            over ours.
        peak_mib: most memory that a step with gradient holds over what the process holds beside.
        value_error, gradient_error: relative, against float64.
        rounds: how many times each took its turn.
        absent: why it was not measured, or nothing.
    """

    point: str
    loss: str
    views: int
    samples: int
    dimensions: int
    slices: int
    contender: str
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_ratio: float | None = None
    both_ratio: float | None = None
    forward_low: float | None = None
    forward_high: float | None = None
    both_low: float | None = None
    both_high: float | None = None
    forward_lead: float | None = None
    both_lead: float | None = None
    peak_mib: float | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    rounds: int = 0
    absent: str = ""


def step(loss: Loss, views: Sequence[Tensor]) -> None:
    """One forward and backward."""
    for view in views:
        view.grad = None
    loss(*views).backward()


def forward(loss: Loss, views: Sequence[Tensor]) -> None:
    """The value alone."""
    with torch.no_grad():
        loss(*views)


def measure(point: Point, seconds: float, left_out: dict[str, str]) -> list[Row]:
    """All contenders at a point, for about ``seconds`` of turns.

    Args:
        point: where.
        seconds: for the turns of all; three rounds, unless one takes more than that.
        left_out: contenders that are not to be measured, and why.
    """
    rows = {c.name: Row(point.name, **asdict(point), contender=c.name) for c in FIELD[point.loss]}
    threads = torch.get_num_threads()
    for contender in FIELD[point.loss]:
        row = rows[contender.name]
        row.absent = left_out.get(contender.name, "") or contender.absence(point)
        if not row.absent:
            row.peak_mib, row.absent = _apart(_peak_mib_here, point, contender.name, threads)
    present = [name for name, row in rows.items() if not row.absent]
    figures, trouble = _apart(_turns_here, point, present, seconds, threads)
    for name in present:
        for key, value in (figures or {}).get(name, {}).items():
            setattr(rows[name], key, value)
        rows[name].absent = trouble
    return list(rows.values())


def _apart(work: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Result of ``work`` in a process of its own, or why there is none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(work, *arguments).result(), ""
        except BrokenProcessPool:
            return None, "its process was ended, by the system or by a fault"
        except TimeoutError as error:
            return None, str(error)
        except Exception as error:  # of whatever a contender may raise
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                return None, f"needs over {_limit_bytes() / 2**30:.0f} GiB"
            return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _limit_bytes() -> int:
    kib = _field("/proc/meminfo", "MemAvailable")
    return int(MEMORY_SHARE * 1024 * kib)


def _contender(point: Point, name: str) -> Contender:
    return next(c for c in FIELD[point.loss] if c.name == name)


def _peak_mib_here(point: Point, name: str, threads: int) -> float:
    """Of the second step: the first one loads, compiles and fills caches that are kept."""
    torch.set_num_threads(threads)
    limit = _field("/proc/self/status", "VmData") * 1024 + _limit_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    loss = _contender(point, name).build(point)
    views = point.embeddings()
    peak, seconds = _peak_mib(loss, views)
    if _contender(point, name).compiled or seconds <= LONG_SECONDS:
        peak, seconds = _peak_mib(loss, views)
    if seconds > SLOWEST_SECONDS:
        raise TimeoutError(f"a step takes {seconds:.0f} s")
    return peak


def _peak_mib(loss: Loss, views: Sequence[Tensor]) -> tuple[float, float]:
    """Of one step, and its seconds."""
    for view in views:
        view.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
    before = _field("/proc/self/status", "VmRSS")
    seconds = _timed(step, loss, views)
    return max(0, _field("/proc/self/status", "VmHWM") - before) / 1024, seconds


def _turns_here(
    point: Point, names: Sequence[str], seconds: float, threads: int
) -> dict[str, dict[str, float | None]]:
    torch.set_num_threads(threads)
    losses = {name: _contender(point, name).build(point) for name in names}
    found = errors(point, losses)
    views = point.embeddings()
    for kind, call in (("forward", forward), ("both", step)):
        times = _turns(point, call, losses, views, seconds / 2)
        for name in names:
            figures = _summary(point, name, times)
            found[name] |= {f"{kind}_{key}": value for key, value in figures.items()}
            found[name]["rounds"] = len(times[name])
    return found


def _turns(
    point: Point,
    call: Callable[[Loss, Sequence[Tensor]], None],
    losses: dict[str, Loss],
    views: Sequence[Tensor],
    seconds: float,
) -> dict[str, list[float]]:
    names = list(losses)
    for name in names:
        if _contender(point, name).compiled:
            call(losses[name], views)  # compiles; the others are warm from the errors
    once = {name: _timed(call, losses[name], views) for name in names}
    if sum(once.values()) > 2 * seconds:
        return {name: [once[name]] for name in names}
    inner = {name: max(1, int(SHORTEST_SECONDS / once[name])) for name in names}
    rounds = int(seconds / sum(once[name] * inner[name] for name in names))
    rounds = min(200, max(3, rounds))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)  # who follows whom changes, as do the caches that one leaves
        for name in names[first:] + names[:first]:
            times[name].append(_timed(call, losses[name], views, inner[name]))
    return times


def _summary(point: Point, name: str, times: dict[str, list[float]]) -> dict[str, float | None]:
    others = [c.name for c in FIELD[point.loss] if c.same_loss and c.name in times]
    others = [other for other in others if other not in ALL_OURS]
    lead = min((_ratios(times[other], times[name])[1] for other in others), default=None)
    low, ratio, high = None, None, None
    if PUBLISHED in times:
        low, ratio, high = _ratios(times[PUBLISHED], times[name])
    return {
        "ms": 1e3 * statistics.median(times[name]),
        "low": low,
        "ratio": ratio,
        "high": high,
        "lead": lead if name in ALL_OURS else None,
    }


def _ratios(times: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the rounds' ratios."""
    ratios = [a / b for a, b in zip(times, other, strict=True)]
    low, median, high = statistics.quantiles(ratios * (1 + (len(ratios) == 1)), method="inclusive")
    return low, median, high


def _timed(
    call: Callable[[Loss, Sequence[Tensor]], None],
    loss: Loss,
    views: Sequence[Tensor],
    count: int = 1,
) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call(loss, views)
    return (time.perf_counter() - begin) / count


def errors(point: Point, losses: dict[str, Loss]) -> dict[str, dict[str, float | None]]:
    """Relative errors of value and gradient in float32, all along the same directions."""
    views, directions = point.embeddings(), point.directions()
    truths: dict[str, tuple[float, list[Tensor]]] = {}
    found: dict[str, dict[str, float | None]] = {}
    for name, loss in losses.items():
        contender = _contender(point, name)
        key = str(contender.definition)
        if key not in truths:
            truths[key] = truth.value_and_gradients(point, views, directions, contender.definition)
        given = contender.takes_directions
        value, gradients = value_and_gradients(loss, views, directions, given)
        true_value, true_gradients = truths[key]
        found[name] = {
            "value_error": abs(value - true_value) / abs(true_value) if true_value else value,
            "gradient_error": truth.error(gradients, true_gradients),
        }
    return found


def value_and_gradients(
    loss: Loss, views: Sequence[Tensor], directions: Tensor | None, takes_directions: bool
) -> tuple[float, list[Tensor]]:
    """Of a loss, along given directions, which it takes as an argument or draws."""
    leaves = [view.detach().requires_grad_() for view in views]
    if directions is not None and takes_directions:
        value = loss(*leaves, directions=directions)
    elif directions is not None:
        with mock.patch.object(torch, "randn", return_value=directions.clone()):
            value = loss(*leaves)
    else:
        value = loss(*leaves)
    value.backward()
    return value.item(), [leaf.grad if leaf.grad is not None else leaf * 0 for leaf in leaves]


def _field(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"no {name} in {path}")


def machine() -> dict[str, str | int]:
    """What the figures depend on."""
    import platform

    import numpy as np

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def versions() -> dict[str, str]:
    """Of the contenders' packages, and the commit of ours."""
    found = {"vicreg-losses": _commit()}
    for package in sorted({c.package for contenders in FIELD.values() for c in contenders} - {""}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    import vicreg_losses

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return vicreg_losses.__version__
    return f"{vicreg_losses.__version__} {done.stdout.strip()}".strip()
