"""Evaluation over two ranks is that of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_example_evaluation as toys
from torch import nn

pytestmark = toys.pytestmark


def rows_of(evaluation: ModuleType, fabric: Any) -> list[dict[str, float]]:
    """What a rank finds: by both linear evaluations, and by the online probe."""
    import ranks

    options = {"epochs": 1, "batch_size": 32, "lr": 0.005}
    rows = [
        evaluation.linear_evaluation(
            nn.Flatten(), toys.toy_images(), fabric, cached=cached, **options
        )
        for cached in (True, False)
    ]
    probe = evaluation.OnlineProbe(fabric, 16, toys.CLASSES)
    x, labels = toys.clusters(64, 1.0, 1)
    for _ in range(5):
        probe.step(x[ranks.part(64)], labels[ranks.part(64)])
    return [*rows, {"top1": probe.top1(), "weight": probe.head.weight.norm().item()}]


RANK = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import evaluation, torch
from lightning_fabric import Fabric
from test_example_evaluation_ranks import rows_of

torch.set_num_threads(1)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
rows = rows_of(evaluation, fabric)
fabric.print(json.dumps(rows), flush=True)
fabric.barrier()
torch.distributed.destroy_process_group()  # or its threads may end the process by abort()
"""


def test_two_ranks_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "rank_of_evaluation.py"
    script.write_text(RANK)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(script), toys.EXAMPLES, str(toys.ROOT / "tests")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(toys.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(toys.EXAMPLES)
    import evaluation
    from lightning_fabric import Fabric

    alone = rows_of(evaluation, Fabric(accelerator="cpu", devices=1))
    assert all(0.2 < row["top1"] < 0.95 for row in alone)
    together = json.loads(done.stdout.strip().splitlines()[-1])
    for row, expected in zip(together, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
