"""The reference trainer, as its users run it: its losses and options, what it writes, bad input."""

import json
import math
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from image_folders import make_folder

# Not importorskip, which would make collecting any test wait for these imports.
PACKAGES = (
    *("torchvision", "timm", "lightning_fabric", "torchmetrics", "tensorboard"),
    *("mlxtend", "rich", "sklearn", "matplotlib"),
)
pytestmark = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")
    for name in PACKAGES
]
LOSSES = ("vicreg", "visreg", "lejepa", "simsiam", "byol", "simclr", "barlow", "invariance")
TINY = ("--device", "cpu", "--limit", "100", "--expander", "8-8", "--batch-size", "40")
SHORT = (*TINY, "--epochs", "1", "--log-every", "1")  # two steps
Capture = pytest.CaptureFixture[str]
Run = Callable[..., int]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pretrain() -> ModuleType:
    return import_module("pretrain")


@pytest.fixture
def run(pretrain: ModuleType, tmp_path: Path) -> Run:
    """Runs the script with arguments, into ``tmp_path / "out"``, and gives back its exit status."""

    def main(*arguments: object) -> int:
        return pretrain.main(["--out", str(tmp_path / "out"), *map(str, arguments)])

    return main


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def refused(run: Run, capsys: Capture, *arguments: object) -> str:
    """The one line with which the script refuses arguments, without writing anything."""
    capsys.readouterr()
    assert run(*arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("pretrain.py: error: ")
    assert line.count("\n") == 1, line
    return line


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


@pytest.mark.parametrize(("junk", "status"), [(1, 0), (2, 2)], ids=["one", "above-1-percent"])
def test_unreadable_images_of_a_folder(
    run: Run, tmp_path: Path, capsys: Capture, junk: int, status: int
) -> None:
    folder = make_folder(tmp_path / "pets", per_class=60)
    for index in range(junk):
        (folder / "dogs" / f"{index:04}.png").write_bytes(b"no image")
    shape = ("--preset", "small", "--image-size", 16, "--workers", 0, "--local-views", 1)
    arguments = (*TINY[:2], *TINY[4:], "--epochs", 1, "--data", folder, *shape)
    assert run(*arguments) == status
    if status:
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"2 of 120 images (1.7%) cannot be read, more than 1%; the first: {folder}" in line
    else:
        assert results(tmp_path / "out")["unreadable_images"] == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--data", "no/where"), "no/where: no such folder"),
        (("--data", "NoSuchSet"), "CIFAR10"),
        (("--batch-size", 1), "--batch-size: expected 2 images or more, got 1"),
        (("--arch", "resnet19"), "--arch: expected one of resnet-tiny, "),
        (("--global-views", 1), "expected 2 views or more"),
        (("--ema", 1.0), "--ema: expected a decay in [0, 1), got 1.0"),
        (("--epochs", 2, "--warmup-epochs", 2), "--warmup-epochs: expected fewer than the 2"),
        (("--accumulate", 99), "--accumulate: expected no more than"),
        (("--resume", "no/where"), "no/where: not a checkpoint of this script"),
        (("--eval", "no/where"), "no/where: not a checkpoint of this script"),
    ],
)
def test_bad_settings_are_one_line(
    run: Run, tmp_path: Path, capsys: Capture, arguments: tuple[object, ...], named: str
) -> None:
    given = arguments if arguments[0] in ("--resume", "--eval") else (*TINY, *arguments)
    assert named in refused(run, capsys, *given)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made_is_named(
    pretrain: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    assert pretrain.main([*SHORT, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "error: --out: expected a folder to write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--loss", "moco"), "'vicreg', 'visreg', 'lejepa', 'simsiam', 'byol', 'simclr', 'barlow'"),
        (("--add", "entropy"), "expected one of variance, covariance, sketch, got 'entropy'"),
        (("--add", "variance=-1"), "expected a finite number above 0, got -1"),
        (("--expander", "8192,8192"), "expected widths such as 8192-8192-8192, got '8192,8192'"),
        (("--lr", "nan"), "expected a finite number above 0, got nan"),
        (("--device", "tpu"), "'auto', 'cpu', 'cuda', 'mps'"),
    ],
)
def test_unknown_names_list_the_valid_ones(
    run: Run, capsys: Capture, arguments: tuple[str, ...], named: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.replace("choose from ", "")


def test_checkpoint_of_another_configuration_says_what_differs(
    run: Run, tmp_path: Path, capsys: Capture
) -> None:
    assert run(*SHORT) == 0
    out = tmp_path / "out"
    line = refused(
        run, capsys, "--resume", out, "--loss", "visreg", "--seed", 3, "--batch-size", 40
    )
    assert "--loss 'vicreg' (now 'visreg'), --seed 0 (now 3)" in line
    assert "batch" not in line
    before = (out / "checkpoint.pt").read_bytes()
    assert run("--resume", out, "--epochs", 2) == 0  # a longer run of the same kind
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 4
    assert before != (out / "checkpoint.pt").read_bytes()


def test_earlier_run_in_the_folder_is_kept(run: Run, tmp_path: Path, capsys: Capture) -> None:
    assert run(*SHORT) == 0
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    assert run(*SHORT, "--seed", 1) == 0
    aside = tmp_path / "out" / "checkpoint-previous.pt"
    assert aside.read_bytes() == before
    assert f"is now {aside}" in capsys.readouterr().out.replace("\n", "")


class Stranger:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["STRANGER"],)


@pytest.mark.parametrize("content", ["stranger", "junk", "weights", "empty", "truncated"])
def test_strange_checkpoint_is_refused_and_runs_no_code(
    run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("STRANGER", str(tmp_path / "made"))
    path = tmp_path / "checkpoint.pt"
    if content == "stranger":
        torch.save({"settings": Stranger()}, path)
        assert b"mkdir" in path.read_bytes()
    elif content == "weights":
        torch.save({"weight": torch.zeros(2)}, path)
    elif content == "truncated":
        torch.save({"settings": torch.zeros(99)}, path)
        path.write_bytes(path.read_bytes()[:-99])
    else:
        path.write_bytes(pickle.dumps(None, protocol=2) if content == "junk" else b"")
    assert f"{path}: not a checkpoint of this script" in refused(run, capsys, "--resume", path)
    assert not (tmp_path / "made").exists()


def test_full_disk_leaves_the_previous_checkpoint(
    pretrain: ModuleType, run: Run, tmp_path: Path, capsys: Capture
) -> None:
    assert run(*SHORT) == 0
    path = tmp_path / "out" / "checkpoint.pt"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = refused(run, capsys, "--resume", path.parent, "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{path}: cannot be written" in line
    assert "the previous one is as it was" in line
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))
    assert run("--resume", path.parent, "--epochs", 2) == 0


@pytest.mark.parametrize(
    ("log_every", "message"),
    [(1, "error: the loss of step 2 is nan"), (99, "error: the weights of step 2 are not finite")],
)
def test_training_that_diverges_keeps_a_checkpoint_that_is_finite(
    run: Run, tmp_path: Path, capsys: Capture, log_every: int, message: str
) -> None:
    steps = ("--epochs", 2, "--save-every", 1, "--log-every", log_every)
    assert run(*TINY, *steps, "--lr", 1e30, "--warmup-epochs", 0) == 1
    assert message in capsys.readouterr().err
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 1
    assert all(value.isfinite().all() for value in saved["network"].values())


def test_probe_sees_all_classes_of_a_sorted_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = import_module("report")
    seen = []
    monkeypatch.setattr(report, "PROBE_IMAGES", 10)
    monkeypatch.setattr(
        report, "knn_accuracy", lambda x, y, *rest, **more: seen.append(y.unique().tolist()) or 0.5
    )
    for part in ("train", "val"):
        make_folder(tmp_path / "pets" / part, per_class=20)
    shape = ("--preset", "small", "--image-size", 16, "--workers", 0, "--data", tmp_path / "pets")
    assert run(*TINY[:2], *TINY[4:], "--epochs", 1, *shape) == 0
    assert seen[-1] == [0, 1]


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
