"""What the scripts share: the command line, the data, the worker processes and the result files."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import verdicts
from rich.console import Console
from rich.progress import track
from trainer import SCALES, DataError, Scale, load

HERE = Path(__file__).resolve().parent
DATA = ("digits", "fashion-mnist")
PACKAGES = ("torch", "torchvision", "lightly", "scikit-learn", "numpy")
Metrics = dict[str, float]
Runs = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One network to train.

    Attributes:
        variant: what is varied.
        data: name of the data set.
        seed: of the weights, the order and the views.
        scale: name of an entry of ``SCALES``.
    """

    variant: str
    data: str
    seed: int
    scale: str

    @property
    def size(self) -> Scale:
        """How large the run is."""
        return SCALES[self.scale]


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line that all scripts have.

    Returns:
        argparse.Namespace: ``data`` (a tuple of names), ``seeds``, ``scale``, ``out``, ``command``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", choices=[*DATA, "both"], default="both")
    parser.add_argument("--seeds", type=int, default=3, help="how many, 2 or more (default 3)")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--scale", choices=["cores", "full"], default="cores", help="full: a GPU")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    settings = parser.parse_args(argv)
    for name, least in (("seeds", 2), ("workers", 1)):
        if getattr(settings, name) < least:
            got = getattr(settings, name)
            parser.error(f"argument --{name}: expected {least} or more, got {got}")
    if settings.quick and settings.scale == "full":
        parser.error("argument --quick: expected without --scale full")
    if settings.scale == "full" and not torch.cuda.is_available():
        parser.error("argument --scale: full expects a CUDA device, found none")
    settings.scale = "quick" if settings.quick else settings.scale
    settings.data = DATA if settings.data == "both" else (settings.data,)
    words = sys.argv[1:] if argv is None else argv
    settings.command = " ".join(["python", f"examples/claims/{Path(sys.argv[0]).name}", *words])
    return settings


def run(
    function: Callable[[Job], Metrics], jobs: Sequence[Job], workers: int
) -> list[dict[str, Any]]:
    """``function`` of every job, in their order, by ``workers`` processes of one thread each.

    Quick jobs and those of a GPU run in this process.

    Returns:
        Records: the job's variant, data and seed, and the metrics.
    """
    if jobs[0].scale != "cores":
        metrics = [function(job) for job in track(jobs, "Training", disable=jobs[0].size.steps < 9)]
        return [_record(job, found) for job, found in zip(jobs, metrics, strict=True)]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures: list[Future[Metrics]] = [pool.submit(function, job) for job in jobs]
        try:
            for done in track(as_completed(futures), "Training", len(futures)):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [_record(job, done.result()) for job, done in zip(jobs, futures, strict=True)]


def _record(job: Job, metrics: Metrics) -> dict[str, Any]:
    rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
    return {"data": job.data, "variant": job.variant, "seed": job.seed, **rounded}


class Study:
    """One script's run: what it trains, what it found, and the files that say so.

    Args:
        name: of the result files.
        title: of the tables.
        settings: of :func:`arguments`.
    """

    def __init__(self, name: str, title: str, settings: argparse.Namespace) -> None:
        self.name, self.title, self.settings = name, title, settings
        self.load_before, self.start = os.getloadavg()[0], time.perf_counter()

    def conduct(
        self,
        function: Callable[[Job], Metrics],
        variants: Sequence[str],
        columns: dict[str, str],
        claims: Callable[[Runs], list[dict[str, str]]],
        draw: Callable[[verdicts.Summary, Path], None],
    ) -> None:
        """Train every variant on every data set and seed, and :meth:`finish`."""
        runs = run(function, self.jobs(variants), self.settings.workers)
        self.finish(runs, columns, claims(runs))
        draw(verdicts.summarise(runs), self.settings.out / f"{self.name}.png")

    def jobs(self, variants: Sequence[str], first_seed: int = 0) -> list[Job]:
        """A job for every data set, variant and seed; without such data the script ends."""
        try:
            for data in self.settings.data:
                load(data, SCALES[self.settings.scale])
        except DataError as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        seeds = range(first_seed, first_seed + self.settings.seeds)
        sets, scale = self.settings.data, self.settings.scale
        return [Job(v, data, seed, scale) for data in sets for v in variants for seed in seeds]

    def finish(self, runs: Runs, columns: dict[str, str], claims: list[dict[str, str]]) -> None:
        """Print the tables, and write NAME.json and, of the runs, NAME.csv.

        Args:
            runs: records with the data, the variant, the seed and metrics.
            columns: the metrics of the table, and their headings.
            claims: the verdicts.
        """
        result = {
            "title": self.title,
            "columns": columns,
            "claims": claims,
            "summary": verdicts.summarise(runs),
            **self._circumstances(),
            "runs": list(runs),
        }
        out = self.settings.out
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        with (out / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for one in runs for key in one)))
            writer.writeheader()
            writer.writerows(runs)
        console = Console() if sys.stdout.isatty() else Console(width=170)
        console.print(*verdicts.tables(result), sep="\n")

    def _circumstances(self) -> dict[str, Any]:
        return {
            "command": self.settings.command,
            "commit": _commit(),
            "machine": _machine(),
            "versions": {name: version(name) for name in PACKAGES},
            "scale": asdict(SCALES[self.settings.scale]),
            "seeds": self.settings.seeds,
            "seconds": round(time.perf_counter() - self.start),
            "load_before": round(self.load_before, 2),
        }


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _machine() -> dict[str, str | int]:
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"kind": kind, "processor": platform.machine(), "cores": os.cpu_count() or 1}
