"""The reference trainer and bad input: one line that says what was expected, and nothing lost."""

import os
import pickle
import resource
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from image_folders import make_folder, make_official
from trainer_runs import NEEDED, SHORT, TINY, Capture, Run, refused, results

pytestmark = NEEDED


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
        (("--precision", "bf16", "--local-views", 1), "expected views of more than 16 pixels"),
        (("--optimizer", "lars", "--weight-decay", 0), "--weight-decay: LARS adapts what decays"),
        (("--device", "mps"), "--device: expected one that this machine has, got mps"),
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


def test_too_few_images_are_refused_before_the_training(
    run: Run, tmp_path: Path, capsys: Capture
) -> None:
    folder = make_official(tmp_path / "pets")
    arguments = ("--data", folder, "--preset", "small", "--image-size", 16, "--limit", 6)
    assert "expected two or more to hold out" in refused(run, capsys, *TINY[:2], *arguments)
    (folder / "val").rename(folder / "test")
    arguments = (*arguments[:-2], "--limit", 20)
    assert "expected train and val, or a folder per class, got test, train" in refused(
        run, capsys, *TINY[:2], *arguments
    )


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
        (("--seed", "-1"), "expected 0 to 2**40 - 1, got -1"),
        (("--quick", "--resume", "x"), "not allowed with argument"),
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
    assert "--epochs: expected the 2 already done" in refused(
        run, capsys, "--resume", out, "--epochs", 1
    )


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda saved: saved.pop("step"), "it has no step"),
        (lambda saved: saved.pop("optimizer"), "does not fit this run: 'optimizer'"),
        (lambda saved: saved["settings"].update(batch_size="x"), "not values of batch_size"),
        (lambda saved: saved["settings"].update(loss="moco"), "--loss: expected one of vicreg"),
        (lambda saved: saved["settings"].update(expander="4-4"), "does not fit this run"),
        (lambda saved: saved["settings"].pop("seed"), "those of another version: seed"),
    ],
)
def test_checkpoint_that_was_changed_is_one_line(
    run: Run, tmp_path: Path, capsys: Capture, spoil: Callable[[Any], None], named: str
) -> None:
    assert run(*SHORT) == 0
    path = tmp_path / "out" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    spoil(saved)
    torch.save(saved, path)
    assert named in refused(run, capsys, "--resume", path)
    if "optimizer" not in named:
        assert named.split(":")[0] in refused(run, capsys, "--eval", path)


def test_earlier_runs_in_the_folder_are_kept(run: Run, tmp_path: Path, capsys: Capture) -> None:
    out, kept = tmp_path / "out", []
    for seed in range(3):
        assert run(*SHORT, "--seed", seed) == 0
        kept.append((out / "checkpoint.pt").read_bytes())
    for number, before in enumerate(kept[:2], 1):
        aside = out / f"previous-{number}"
        assert (aside / "checkpoint.pt").read_bytes() == before
        assert results(aside)["settings"]["seed"] == number - 1
        assert any((aside / "tensorboard").iterdir())
    assert f"an earlier run is now in {aside}" in capsys.readouterr().out.replace("\n", "")


class Stranger:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["STRANGER"],)


@pytest.mark.parametrize("content", ["stranger", "junk", "weights", "empty", "flipped"])
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
    elif content == "flipped":
        torch.save({"settings": "setting"}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"settings", b"\xffettings"))
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
