"""``python -m benchmarks.distributed``: losses over ranks on this machine, and a MODEL of many.

Measured: forward and backward over 2 and 4 ranks, in turns with the published implementations that
gather everything, after both have agreed with float64 on the concatenated batch. Modelled, and
marked so: 8 to 4,096 ranks of GPUs (``distributed_model``).
"""

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import distributed_model, measure
from benchmarks.distributed_cases import (
    CASES,
    EXACT,
    Case,
    Loss,
    checked,
    our_loss,
    published_loss,
    samples_of,
)
from vicreg_losses.distributed import plan

NOT_MEASURED = "not yet measured on a GPU"


def timed(loss: Loss, z: Tensor, count: int = 1) -> float:
    """Seconds of a forward and backward on this rank, all having begun together."""
    dist.barrier()
    _wait(z)
    begin = time.perf_counter()
    for _ in range(count):
        z.grad = None
        loss(z, None).backward()
    _wait(z)
    return (time.perf_counter() - begin) / count


def _wait(z: Tensor) -> None:
    if z.is_cuda:
        torch.cuda.synchronize(z.device)


def compare(case: Case, seconds: float, device: torch.device) -> dict[str, Any]:
    """Check both, then run them in turns, A B A B; a run takes as long as on the slowest rank."""
    sides = {"published": published_loss(case, device), "ours": our_loss(case)}
    errors = checked(case, sides, device)
    z = samples_of(case, dist.get_rank()).to(device).requires_grad_()
    for loss in sides.values():
        timed(loss, z)
    pair = torch.tensor(sum(timed(loss, z) for loss in sides.values()), device=device)
    dist.all_reduce(pair, dist.ReduceOp.MAX)  # all ranks make as many runs
    count = max(1, int(2e-3 / float(pair)))
    pairs = min(200, max(3, int(seconds / (float(pair) * count))))
    runs = [[timed(loss, z, count) for loss in sides.values()] for _ in range(pairs)]
    slowest = torch.tensor(runs, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    theirs, ours = slowest.T.tolist()
    chosen = plan(
        case.loss, case.samples, case.dimensions, slices=case.slices or 1, views=case.views,
        per_rank=case.own_slices,
    )  # fmt: skip
    return {
        "loss": case.loss + ", own slices" * case.own_slices,
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        **{"views": case.views, "samples": case.samples, "dimensions": case.dimensions},
        "slices": case.slices,
        "by": chosen.strategy,
        "published_ms": 1e3 * statistics.median(theirs),
        "ours_ms": 1e3 * statistics.median(ours),
        "ratio": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
        "runs": pairs,
        "published_error": errors["published"],
        "ours_error": errors["ours"],
    }


def one_rank(
    rank: int, ranks: int, backend: str, cases: Sequence[Case], seconds: float, folder: str
) -> None:
    """The process of a rank; the first one leaves the rows in the folder."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    rows = [compare(case, seconds, device) for case in cases]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, backend: str, cases: Sequence[Case], seconds: float) -> list[dict[str, Any]]:
    """Measure over ranks of this machine, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_rank, (ranks, backend, cases, seconds, folder), ranks, daemon=True)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """In Markdown, so that what is printed can be shown as it is."""
    out = Table(box=box.MARKDOWN)
    columns = ("loss", "ranks", "(V, N, D), slices", "ours by", "published ms", "ours ms", "ratio")
    for column in columns:
        out.add_column(column, no_wrap=True, justify="right" if "ms" in column else "left")
    for row in rows:
        shape = "({views}, {samples}, {dimensions})".format(**row)
        out.add_row(
            row["loss"],
            str(row["ranks"]),
            shape + (f", {row['slices']}" if row["slices"] else ""),
            row["by"],
            f"{row['published_ms']:.3g}",
            f"{row['ours_ms']:.3g}",
            f"{row['ratio']:.1f}x",
        )
    return out


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write distributed.json, measured.csv, model.csv and model.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "distributed.json").write_text(json.dumps(record, indent=2) + "\n")
    for name in ("measured", "model"):
        if rows := record[name]:
            with (folder / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    distributed_model.plot(str(folder / "model.png"))


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[2, 4], help="none: the MODEL alone"
    )
    parser.add_argument("--quick", action="store_true", help="the short table")
    parser.add_argument("--seconds", type=float, default=None, help="time for each case")
    parser.add_argument("--out", type=Path, default=None, help="write CSV, JSON and a plot here")
    parser.add_argument(
        "--backend", choices=("gloo", "nccl"), default=None,
        help="by default NCCL where there are as many GPUs as ranks",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    seconds = options.seconds or (2.0 if options.quick else 8.0)
    gpus = torch.cuda.device_count()
    if any(ranks < 2 for ranks in options.ranks):
        parser.error("--ranks: expected at least 2")
    if options.backend == "nccl" and gpus < max(options.ranks, default=0):
        parser.error(f"--backend nccl: expected a GPU for each rank, found {gpus}")
    rows: list[dict[str, Any]] = []
    chosen = [case for case in cases if case.quick or not options.quick]
    for ranks in options.ranks:
        backend = options.backend or ("nccl" if gpus >= ranks else "gloo")
        rows += run(ranks, backend, chosen, seconds)

    console = Console(width=160)
    machine = {**measure.machine(), "threads": "1 a rank", "cores": os.cpu_count()}
    on_gpu = [row for row in rows if row["backend"] == "nccl"]
    if rows:
        backends = ", ".join(sorted({row["backend"] for row in rows}))
        console.print(
            f"MEASURED over {backends}: forward + backward, medians of runs in turns; both within "
            f"{EXACT:g} of one process in float64, and worst "
            f"{max(r['ours_error'] for r in rows):.0e} (ours), "
            f"{max(r['published_error'] for r in rows):.0e} (published) in float32"
        )
        console.print(table(rows))
        console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if not on_gpu:
        console.print(NOT_MEASURED)
    console.print(distributed_model.ASSUMPTIONS)
    for dimensions, each in zip(
        distributed_model.DIMENSIONS, distributed_model.tables(), strict=True
    ):
        console.print(f"MODEL, D = {dimensions}")
        console.print(each)
    if options.out:
        record = {
            "machine": machine,
            "gpu": "measured" if on_gpu else NOT_MEASURED,
            "measured": rows,
            "assumptions": distributed_model.ASSUMPTIONS,
            "model": distributed_model.flat(),
        }
        write(options.out, record)


if __name__ == "__main__":
    main()
