"""The page on diagnostics: its blocks run, and its thresholds are those of the code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from needed import needs

from vicreg_losses import _report

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "diagnostics.md"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # of those packages
@pytest.mark.parametrize(
    "marked",
    [pytest.param(None, marks=needs("tensorboard", "matplotlib", "pytorch_lightning"))],
    ids=[""],
)
def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marked: None) -> None:
    """As one program; and TensorBoard's files have what they say."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    namespace = run_blocks(tmp_path, monkeypatch)
    assert (tmp_path / "embeddings.png").stat().st_size > 1000
    all_of_them = {"histograms": 0, "scalars": 0}
    events = EventAccumulator(str(tmp_path / "runs" / "embeddings"), all_of_them)
    events.Reload()
    tags = events.Tags()
    ranks = events.Scalars("embeddings/effective_rank")
    assert [event.step for event in ranks] == [50, 100]
    last = namespace["monitor"].report
    assert ranks[-1].value == pytest.approx(last.effective_rank, rel=1e-6)
    assert {f"embeddings/{name}" for name in last.as_dict()} == set(tags["scalars"])
    assert [event.step for event in events.Histograms("embeddings/std")] == [50, 100]
    assert tags["images"] == ["embeddings/report"]
    assert namespace["watch"] in namespace["trainer"].callbacks


def run_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    text = PAGE.read_text()
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in BLOCK.finditer(text):
            first_line = text.count("\n", 0, block.start(1))
            code = "\n" * first_line + block[1]  # so that a traceback names the page's line
            exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    "name", ["COLLAPSED_STD", "DEAD_STD", "UNIT_NORM", "LOW_RANK", "HIGH_CORRELATION"]
)
def test_thresholds_are_those_of_the_code(name: str) -> None:
    assert f"`{name} = {getattr(_report, name):g}`" in PAGE.read_text()
