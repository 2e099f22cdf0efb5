"""Tools of the GPU benchmark: timing, stages that survive errors, processes, tables."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
BROKEN = 3  # exit status of a process whose CUDA context no longer works
L2_BYTES = 128 * MIB  # inputs are rotated until they have more than any L2 cache

Call = Callable[[], Any]
Row = dict[str, Any]


class Skip(Exception):
    """Raised in a row to leave it out, with the reason."""


class Bench:
    """A device and its clock; the CPU and `time.perf_counter` in a dry run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        torch.manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Correlated, off-centre random numbers."""
        z = torch.randn(shape, device=self.device)
        return z.mul_(0.8).add_(z.roll(1, -1), alpha=0.3).add_(0.1).to(dtype)

    def copies(self, *shape: int, dtype: torch.dtype) -> list[Tensor]:
        """Inputs that together exceed the L2 cache, at most 64 of them; leaves of a graph."""
        first = self.randn(*shape, dtype=dtype)
        size = first.numel() * first.element_size()
        count = 1 if self.dry else min(64, -(-L2_BYTES // size))
        return [z.requires_grad_() for z in (first, *(first.clone() for _ in range(count - 1)))]

    def sync(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def time_us(
        self, calls: Sequence[Call], budget_ms: float = 40.0, prepare: Call | None = None
    ) -> float:
        """Median time of a call on the device, in microseconds.

        Calls are taken in turns for about ``budget_ms``; ``prepare`` runs before each, outside of
        the time. The device sleeps until the host has queued a group of calls, so that its own time
        is measured and not that of the launches.
        """
        turns = itertools.cycle(calls)
        if self.dry:
            if prepare:
                prepare()
            begin = time.perf_counter()
            next(turns)()
            return 1e6 * (time.perf_counter() - begin)
        self._group(turns, 2, 0.0, prepare)  # compiles
        host, times = self._group(turns, 3, 0.0, prepare)
        wanted = 1e3 * budget_ms / max(1.0, statistics.median(times))
        count = int(max(3, min(20, wanted)))
        groups = range(int(max(1, min(5, wanted / count))))
        runs = [self._group(turns, count, 1.3 * host * count, prepare)[1] for _ in groups]
        return statistics.median(itertools.chain(*runs))

    def _group(
        self, turns: Iterator[Call], count: int, lead: float, prepare: Call | None
    ) -> tuple[float, list[float]]:
        """Seconds of the host for each call; microseconds of the device, ``lead`` seconds later."""
        marks = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(count)]
        torch.cuda.synchronize()
        if lead:
            torch.cuda._sleep(int(2e9 * min(lead, 0.04)))  # cycles, at about 2 GHz
        begin = time.perf_counter()
        for start, stop in marks:
            if prepare:
                prepare()
            start.record()
            next(turns)()
            stop.record()
        host = (time.perf_counter() - begin) / count
        torch.cuda.synchronize()
        return host, [1e3 * start.elapsed_time(stop) for start, stop in marks]

    def host(self, call: Call) -> Row:
        """Microseconds of one of 20 calls: of the host alone, and until the device is done."""
        count = 1 if self.dry else 20
        if not self.dry:
            call(), call()
        self.sync()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        host = time.perf_counter() - begin
        self.sync()
        wall = time.perf_counter() - begin
        return {"host_us": 1e6 * host / count, "wall_us": 1e6 * wall / count}

    def peak_mib(self, call: Call) -> float | None:
        """Peak memory of a call over what was allocated before it; none in a dry run."""
        if self.dry:
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def replay(self, call: Call) -> Row:
        """Time of a CUDA graph of the call; its input stays in the cache."""
        if self.dry:
            raise Skip("a CUDA graph needs CUDA")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return {"step_us": self.time_us([graph.replay], 10.0)}


class Stage:
    """Rows of a stage by name, in a file that is rewritten after each of them.

    A row that raises is recorded and the next one runs; past the deadline rows are skipped by name.
    A second process resumes after the row in which the first one died.
    """

    def __init__(self, bench: Bench, path: Path, deadline: float) -> None:
        self.bench, self.path, self.deadline = bench, path, deadline
        empty: Row = {"rows": {}, "skipped": {}, "summary": []}
        self.record: Row = json.loads(path.read_text()) if path.exists() else empty
        self.rows: dict[str, Row] = self.record["rows"]
        self.asked: list[str] = []  # names of rows, measured or not, by this process or before

    def say(self, line: str) -> None:
        """Add a line to the summary, once."""
        if line not in self.record["summary"]:
            self.record["summary"].append(line)

    def row(self, name: str, measure: Callable[[], Row]) -> None:
        """Measure and record, unless that has been done or it is too late."""
        self.asked.append(name)
        if name in self.rows or name in self.record["skipped"]:
            return
        if time.time() > self.deadline:
            self.record["skipped"][name] = "no time left"
            return
        self.rows[name] = {"error": "the process ended in this row"}
        self.save()
        try:
            self.rows[name] = measure()
        except Skip as reason:
            del self.rows[name]
            self.record["skipped"][name] = str(reason)
        except Exception:
            self.rows[name] = {"error": traceback.format_exc()[-4000:]}
            self._recover()
        self.save()

    def _recover(self) -> None:
        if self.bench.dry:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            self.save()
            raise SystemExit(BROKEN) from None

    def save(self) -> None:
        """Replace the file."""
        write_json(self.path, self.record)


def write_json(path: Path, record: Row) -> None:
    """Replace a file at once: who is killed here leaves the old or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Precision of float32 matrix products inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so long, and again if that was caught inside."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_process(
    command: Sequence[str], timeout: float, env: dict[str, str] | None = None, show: bool = False
) -> tuple[int | None, str]:
    """Run a command in the repository, and end all that it started.

    Returns the exit status, ``None`` past the timeout, and the output unless it is shown.
    """
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=None if show else file,
            stderr=None if show else subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(1.0, timeout))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        return code, file.read().decode(errors="replace")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: with rich where that is installed, else as aligned text."""
    table = [list(columns), *([figure(cell) for cell in row] for row in rows)]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(f"\n{title}")
        for first, *rest in table:
            cells = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
            print("  ".join([f"{first:<{widths[0]}}", *cells]), flush=True)
        return
    styled = Table(title=title)
    for i, column in enumerate(columns):
        styled.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in table[1:]:
        styled.add_row(*row)
    Console(width=200).print(styled)


def figure(value: object) -> str:
    """A number in few digits; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
