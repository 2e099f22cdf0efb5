"""The benchmark of training steps, tiny: what it writes, what it refuses, how it counts."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from needed import needs

import vicreg_losses as vl

pytestmark = needs("torchvision")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # `pytest` alone does not
TINY = ["--device", "cpu", "--batch-size", "4", "--width", "16", "--slices", "8"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def training() -> ModuleType:
    from benchmarks import training

    return training


def test_quick_run_writes_every_figure(
    training: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    training.main([*TINY, "--quick", "--seconds", "0.1", "--out", str(tmp_path / "new")])
    record = json.loads((tmp_path / "new" / "training.json").read_text())
    assert record["setup"] == {
        **{"device": "cpu", "arch": "resnet-tiny", "batch_size": 4, "image_size": 32},
        **{"width": 16, "slices": 8, "impl": "auto", "seconds": 0.1},
    }
    versions = {"cpu", "threads", "python", "torch", "numpy", "torchvision", "vicreg_losses"}
    assert record["machine"].keys() >= versions | {"commit", "dirty", "date", "precision"}
    rows = record["rows"]
    assert [(row["objective"], row["loss"]) for row in rows] == [
        ("floor", ""),
        ("VICReg", "published"),
        ("VICReg", "ours"),
        ("VISReg", "published"),
        ("VISReg", "ours"),
        ("floor", ""),
        ("SimSiam", "published"),
        ("SimSiam + variance", "published"),
        ("SimSiam + variance", "ours"),
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["images_per_second"] == pytest.approx(4e3 / row["step_ms"])
        assert row["peak_mib"] is None  # of a GPU
        assert row["runs"] >= 3
        assert row["objective"] in printed or row["objective"] == "floor"
        if row["loss"]:
            assert row["share_of_step"] < 1
            assert row["alone_share"] == pytest.approx(row["alone_ms"] / row["step_ms"])
            assert row["value_error"] < 1e-5
            assert row["gradient_error"] < 1e-2
        assert ("ratio" in row) == (row["loss"] == "ours")
    assert [row["on_top_of"] for row in rows if row["loss"] == "ours"] == [
        *("floor", "floor", "SimSiam")
    ]


@pytest.mark.parametrize(
    ("name", "title", "wrong"),
    [
        ("VICRegLoss", "VICReg", {"variance": 25.1}),
        ("VISRegLoss", "VISReg", {"quantiles": "exact"}),
        ("VarianceLoss", "SimSiam + variance", {"gamma": 1.01}),
        ("VarianceLoss", "SimSiam + variance", {"form": "squared"}),
    ],
)
def test_wrong_loss_is_not_reported(
    training: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Capture,
    name: str,
    title: str,
    wrong: dict[str, Any],
) -> None:
    right = getattr(vl, name)
    monkeypatch.setattr(vl, name, lambda **options: right(**options, **wrong))
    monkeypatch.setattr(training, "in_turns", lambda calls, *_: {name: [1.0] for name in calls})
    refusal = re.escape(f"refusing to report {title}: ours differs from the published formula")
    with pytest.raises(SystemExit, match=f"^{refusal}"):
        training.main([*TINY, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_not_a_number_is_not_reported(training: ModuleType) -> None:
    from benchmarks import training_cases as cases

    setup = cases.Setup("cpu", cases.TINY, 4, 32, 16, 8, "auto", 1.0)
    vicreg, _ = cases.objectives(setup)[False]
    with pytest.raises(SystemExit, match="value_error nan, expected 1e-04"):
        cases.check(vicreg, cases.Outputs(torch.full((2, 4, 16), torch.nan)), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1"], "--batch-size: expected 2 or more, got 1"),
        (["--image-size", "16"], "--image-size: expected 32 or more, got 16"),
        (["--slices", "0"], "--slices: expected 1 or more, got 0"),
        (["--impl", "triton"], "--impl: expected auto or torch on a CPU, got triton"),
        (["--arch", "vgg"], "argument --arch: invalid choice: 'vgg'"),
    ],
)
def test_bad_arguments_are_named(
    training: ModuleType, capsys: Capture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        training.main([*TINY, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_out_of_memory_is_named(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "measure_network", exhausted)
    with pytest.raises(SystemExit) as stop:
        training.main(TINY)
    assert stop.value.code == 2
    assert "--batch-size: expected one that fits in memory, got 4" in capsys.readouterr().err


def test_calls_take_turns(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock that only the calls advance: 4 ms and 20 ms."""
    now, log = [0.0], []
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            log.append(name)
            now[0] += seconds

        return run

    calls = {"a": call("a", 0.004), "b": call("b", 0.02)}
    found = training.in_turns(calls, 0.14, lambda: log.append("|"))
    assert found == {"a": [pytest.approx(4)] * 5, "b": [pytest.approx(20)] * 5}
    assert "".join(log).replace("|", "") == "ab" + "ab" + "aab" * 5  # a is short: twice a turn
    assert "||" + "b" + "||aa||b" in "".join(log)
    assert len(training.in_turns(calls, 0.0, lambda: None)["a"]) == 3


def test_costs_are_medians_within_a_turn(training: ModuleType) -> None:
    """On a machine whose speed drifts."""
    found = training.costs([100.0, 200.0, 400.0], [75.0, 150.0, 300.0], [10.0, 20.0, 30.0])
    assert found == {"share_of_step": 0.25, "alone_ms": 20.0, "alone_share": 0.1}


def test_step_trains_the_whole_network_and_repeats(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import training_cases as cases

    setup = cases.Setup("cpu", cases.TINY, 4, 32, 16, 8, "auto", 1.0)
    trainer = training.Trainer(setup, predicts=True)
    before, seen = trainer.outputs(), []
    step, parameters = trainer.optimiser.step, list(trainer.network.parameters())

    def watched() -> None:
        seen.extend(float(parameter.grad.abs().sum()) for parameter in parameters)
        step()

    monkeypatch.setattr(trainer.optimiser, "step", watched)
    training.stepping(trainer, [cases.simsiam, cases.floor])()
    assert len(seen) == len(parameters)
    assert all(total > 0 for total in seen)
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(x, y) for x, y in zip(before, trainer.outputs(), strict=True))
    assert before.z.shape == before.p.shape == (2, 4, 16)
