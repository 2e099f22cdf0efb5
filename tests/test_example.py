"""The reference trainer, as its users run it: its losses, its options, and what it writes."""

import json
import math
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from trainer_runs import NEEDED, SHORT, TINY, Capture, Run, refused, results

pytestmark = NEEDED
LOSSES = ("vicreg", "visreg", "lejepa", "simsiam", "byol", "simclr", "barlow", "invariance")


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(run: Run, tmp_path: Path, loss: str) -> None:
    if loss in ("simclr", "barlow") and find_spec("lightly") is None:
        pytest.skip("lightly is not installed")
    assert run(*SHORT, "--loss", loss, "--lr", 1e-3) == 0
    found = results(tmp_path / "out")
    history = found["outcome"]["history"]
    assert [at["epoch"] for at in history] == [0.5, 1]
    assert all(math.isfinite(value) for at in history for value in at.values())
    assert 0 <= found["outcome"]["accuracy"] <= 1
    assert found["images_per_second"] > 0
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2
    assert ("teacher" in saved) == (loss == "byol")
    assert any((tmp_path / "out" / "tensorboard").iterdir())


@pytest.mark.parametrize("loss", ["visreg", "vicreg", "simsiam", "byol"])
def test_local_views_and_added_terms(run: Run, tmp_path: Path, loss: str) -> None:
    more = ("--local-views", 2, "--add", "variance", "covariance=0.5", "sketch")
    assert run(*SHORT, "--loss", loss, *more) == 0
    first = results(tmp_path / "out")["outcome"]["history"][0]
    weights = {"variance": 1.0, "covariance": 0.5, "sketch": 1.0}
    sum_added = sum(weight * first[f"added {name}"] for name, weight in weights.items())
    assert sum_added > 0
    (tmp_path / "plain").mkdir()
    assert run(*SHORT, "--loss", loss, "--local-views", 2, "--out", tmp_path / "plain") == 0
    alone = results(tmp_path / "plain")["outcome"]["history"][0]
    # Of the same weights, images and views, so the added terms are all of the difference.
    assert first["loss"] - alone["loss"] == pytest.approx(sum_added, rel=1e-5)


def test_options_change_what_they_say(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    options = ("--precision", "bf16", "--clip", 1e-3, "--ema", 0.5, "--optimizer", "lars")
    assert run(*SHORT, *options, "--compile", "--accumulate", 2, "--eval-every", 1) == 0
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 1  # two passes in one step
    assert len(compiled) == 1
    assert run(*SHORT, "--epochs", 4, *options[:-2], "--eval-every", 2) == 0
    evaluations = results(tmp_path / "out")["evaluations"]
    assert [at["epoch"] for at in evaluations] == [2]  # the last is judged as the run
    assert 0 <= evaluations[0]["knn"] <= 1
    teacher = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["teacher"]
    assert teacher.keys() >= {"module.backbone.conv1.weight"}


def test_clipping_bounds_the_step(run: Run, tmp_path: Path) -> None:
    """Of one step of SGD without momentum's history, the weights move by lr times the clip."""
    common = (*TINY, "--epochs", 1, "--accumulate", 2, "--optimizer", "sgd", "--weight-decay", 0)
    step = (*common, "--warmup-epochs", 0, "--clip", 1e-2, "--lr", 100)
    assert run(*step) == 0
    moved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert run(*step, "--lr", 1e-9) == 0
    start = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    trained = [name for name in start["network"] if "running" not in name and "num_" not in name]
    squares = [
        (moved["network"][name] - start["network"][name]).double().square().sum()
        for name in trained
    ]
    rate = moved["optimizer"]["param_groups"][0]["lr"]  # one step, so it is the schedule's last
    distance = math.sqrt(sum(squares))
    assert distance == pytest.approx(rate * 1e-2, rel=1e-2)


def test_exported_backbone_is_torchvisions(pretrain: ModuleType, run: Run, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    assert run(*SHORT, "--arch", "resnet18") == 0
    exported = torch.load(tmp_path / "out" / "backbone.pt", weights_only=True)
    model = resnet18(weights=None)
    missing = model.load_state_dict(exported, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert missing.unexpected_keys == []
    model.fc = torch.nn.Identity()
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    network = pretrain.networks.build(pretrain.Settings(**saved["settings"]))
    network.load_state_dict(saved["network"])
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval().features(images)
        found = model.eval()(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_linear_evaluation_of_a_checkpoint(
    pretrain: ModuleType, run: Run, tmp_path: Path, capsys: Capture
) -> None:
    assert run(*SHORT) == 0
    out = tmp_path / "out"
    arguments = ["--eval", str(out), "--epochs", "3", "--device", "cpu", "--lr", "0.1"]
    assert pretrain.main(arguments) == 0
    assert "top1" in capsys.readouterr().out
    found = json.loads((out / "linear.json").read_text())
    assert found["epochs"] == 3
    assert 0 <= found["top1"] <= found["top5"] <= 1
    line = refused(run, capsys, "--eval", out, "--loss", "byol")
    assert "--loss" in line


def test_presets_are_the_papers(pretrain: ModuleType) -> None:
    def chosen(**given: object) -> Any:
        return pretrain.Settings(**pretrain.options.defaults(given))

    vicreg = chosen(data="imagenet")
    assert (vicreg.arch, vicreg.expander) == ("resnet50", "8192-8192-8192")
    assert (vicreg.optimizer, vicreg.lr, vicreg.weight_decay) == ("lars", 0.2, 1e-6)
    assert (vicreg.batch_size, vicreg.warmup_epochs, vicreg.image_size) == (2048, 10, 224)
    assert (vicreg.local_size, vicreg.preset, vicreg.predictor) == (96, "paper", 0)
    simsiam = chosen(data="imagenet", loss="simsiam")
    assert (simsiam.optimizer, simsiam.lr, simsiam.predictor) == ("sgd", 0.05, 512)
    assert chosen(data="imagenet", loss="byol").ema == 0.996
    assert chosen(data="fashion-mnist").preset == "small"
    assert chosen(data="fashion-mnist", preset="paper").arch == "resnet50"
    assert chosen(loss="byol", add={"variance": 1.0}).out == "runs/byol-variance-digits"


def test_verdict_names_what_did_not_win() -> None:
    report = import_module("report")

    def verdict(**accuracies: float) -> str | None:
        rows = [report.Outcome(name, value, 1, 1, 1) for name, value in accuracies.items()]
        return report.complaint(rows)

    assert verdict(untrained=0.9, invariance=0.8, vicreg=0.97, visreg=0.96) is None
    assert "VISReg" in verdict(untrained=0.9, invariance=0.8, vicreg=0.97, visreg=0.9)
    assert "invariance alone" in verdict(untrained=0.1, invariance=0.96, vicreg=0.97)


def test_demo_compares_three_losses(tmp_path: Path, capsys: Capture) -> None:
    demo = import_module("demo")
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert [row["name"] for row in outcomes] == ["untrained", "invariance", "vicreg", "visreg"]
    printed = capsys.readouterr().out
    for title in ("untrained", "invariance alone", "VICReg", "VISReg"):
        assert title in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
