"""``python -m benchmarks``: print the ratios to the published formulas as a table."""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.cases import CASES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short table, under two minutes")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=None, help="time for each case")
    parser.add_argument("--threads", type=int, default=None, help="PyTorch's CPU threads")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    seconds = options.seconds or (2.0 if options.quick else 8.0)
    chosen = [c for c in CASES if (c.quick or not options.quick) and options.only in c.name]
    if not chosen:
        parser.error(f"--only: no case has {options.only!r} in its name")

    console = Console()
    table = Table(title="forward + backward, medians; ratio = published / ours")
    for column in ("case", "published ms", "ours ms", "ratio", "ours GFLOP/s"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    results = []
    with console.status("measuring") as status:
        for case in chosen:
            status.update(case.name)
            result = measure.compare(case, seconds)
            results.append(result)
            rate = f"{result.ours_gflops:.0f}" if result.ours_gflops else ""
            table.add_row(
                result.name,
                f"{result.published_ms:.3g}",
                f"{result.ours_ms:.3g}",
                f"{result.ratio:.2f}x",
                rate,
            )
        sketch = next((c for c in chosen if c.name == "sigreg-v1-n2048-d256-k256"), None)
        memory = {}
        if sketch is not None:
            status.update("peak memory")
            memory = {which: measure.peak_mib(sketch, which) for which in ("published", "ours")}
    console.print(table)
    if memory:
        console.print(
            f"peak memory of {sketch.name}: published {memory['published']:.0f} MiB, "
            f"ours {memory['ours']:.1f} MiB"
        )
    machine = measure.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if options.json:
        rows = [dataclasses.asdict(result) for result in results]
        record = {"machine": machine, "results": rows, "peak_mib": memory}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
