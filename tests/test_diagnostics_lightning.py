"""The callback in real Trainers of both packages: what it logs, when it warns, how it resumes."""

import csv
import importlib
import re
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vicreg_losses import VICRegLoss
from vicreg_losses.diagnostics import EmbeddingMonitor

PACKAGES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(find_spec(name.split(".")[0]) is None, reason=f"{name} is absent"),
    )
    for name in ("lightning.pytorch", "pytorch_lightning")
]
# Lightning's own: few workers, deprecated names in its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4  # of an epoch


def callback(*arguments: Any, **options: Any) -> Any:
    module = importlib.import_module("vicreg_losses.lightning")
    return module.EmbeddingMonitorCallback(*arguments, **options)


def model(package: Any, projector: nn.Module | None = None, times: int = 2) -> Any:
    """Calls its projector so often in a step; ``given`` has what that returned, by batches."""

    class Model(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.projector = projector or nn.Linear(8, 16)
            self.loss = VICRegLoss()
            self.given: list[list[Tensor]] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            h = self.backbone(batch)
            outputs = [self.projector(h + 0.1 * view) for view in range(times)]
            views = [z if isinstance(z, Tensor) else z[0] for z in outputs] or [h]
            self.given.append([z.detach().clone() for z in views])
            return sum(views).square().mean()

        def validation_step(self, batch: Tensor, index: int) -> None:
            self.projector(self.backbone(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    return Model()


def fit(
    package: Any, module: Any, callbacks: Any, folder: Path, resume: Any = None, **options: Any
) -> Any:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(8 * STEPS, 6, generator=generator)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    logs = importlib.import_module(f"{package.__name__}.loggers")
    trainer = package.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=logs.CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 1000, **options},
    )
    trainer.fit(module, loader, loader, ckpt_path=resume)
    return trainer


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture
def one_package() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if find_spec(name.split(".")[0]) is not None:
            return importlib.import_module(name)
    pytest.skip("neither lightning nor pytorch_lightning is installed")


def test_logs_what_a_monitor_says(package: Any, tmp_path: Path) -> None:
    """In a Trainer that is given the callback alone, which it knows by its class."""
    watch = callback("projector", every=2, samples=16)
    module = model(package)
    trainer = fit(package, module, watch, tmp_path)
    monitor = EmbeddingMonitor(every=2, samples=16)
    expected = [monitor.update(*views) for views in module.given]
    assert [scalars is None for scalars in expected] == [True, False, True, False]
    with open(Path(trainer.logger.log_dir, "metrics.csv")) as file:
        logged = list(csv.DictReader(file))
    assert [row["step"] for row in logged] == ["2", "4"]
    for row, scalars in zip(logged, expected[1::2], strict=True):
        assert scalars is not None
        for name, value in scalars.items():
            assert float(row[f"embeddings/{name}"]) == pytest.approx(value, rel=1e-9), name
    last = expected[-1]
    assert last is not None
    found = trainer.callback_metrics["embeddings/effective_rank"]
    assert found.item() == pytest.approx(last["effective_rank"])


def test_early_stopping_finds_the_numbers(package: Any, tmp_path: Path) -> None:
    callbacks = importlib.import_module(f"{package.__name__}.callbacks")
    stop = callbacks.EarlyStopping(
        "embeddings/effective_rank", 1e9, patience=1, mode="max", check_on_train_epoch_end=True
    )
    watch = callback("projector", every=2, samples=16)
    trainer = fit(package, model(package), [watch, stop], tmp_path, max_epochs=5)
    assert trainer.current_epoch == 2


def test_hook_is_gone_after_training(one_package: Any, tmp_path: Path) -> None:
    module = model(one_package)
    watch = callback("projector", every=1, samples=8)
    fit(one_package, module, [watch], tmp_path)
    assert not module.projector._forward_hooks
    updates = watch.monitor.state_dict()["step"]
    assert updates == STEPS  # none of validation's
    module.projector(torch.zeros(4, 8))
    assert watch.monitor.state_dict()["step"] == updates


def test_hook_is_gone_after_an_error(one_package: Any, tmp_path: Path) -> None:
    class Failing(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            raise ArithmeticError("on purpose")

    module = model(one_package, Failing(8, 16))
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(one_package, module, [callback("projector")], tmp_path, num_sanity_val_steps=0)
    assert not module.projector._forward_hooks


def narrow() -> nn.Module:
    """A projector whose dimensions repeat each other."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 16))


def test_resume_goes_on(package: Any, tmp_path: Path) -> None:
    """As one run would, in the middle of a buffer; nothing is warned of twice."""

    def watched(epochs: int, resume: Path | None = None) -> tuple[Any, Any, list[str]]:
        watch, module = callback("projector", every=3, samples=20), model(package, narrow())
        options = {"resume": resume, "max_epochs": epochs}
        trainers = []
        told = warned(lambda: trainers.append(fit(package, module, [watch], tmp_path, **options)))
        return watch, trainers[0], told

    whole, _, told = watched(3)
    assert any("at step 3: dimensions repeat each other" in line for line in told)
    _, trainer, told_first = watched(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, _, told_second = watched(3, tmp_path / "half.ckpt")
    assert told_first + told_second == told
    assert len(told) == len({line.split(": ")[1] for line in told})
    assert second.monitor.report.as_dict() == pytest.approx(whole.monitor.report.as_dict())


def warned(run: Callable[[], Any]) -> list[str]:
    """What the callback warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if str(w.message).startswith("embeddings of")]


@pytest.mark.parametrize("name", ["proj", "", "backbone.7"])
def test_wrong_name_lists_what_there_is(one_package: Any, tmp_path: Path, name: str) -> None:
    words = (
        "module: expected one of 'backbone', 'projector', 'loss', 'backbone.0', 'backbone.1', "
        f"got {name!r}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        fit(one_package, model(one_package), [callback(name)], tmp_path)


def test_many_names_are_cut(one_package: Any, tmp_path: Path) -> None:
    many = nn.Sequential(*(nn.Identity() for _ in range(30)), nn.Linear(8, 16))
    with pytest.raises(ValueError, match=r"'projector\.\d+' and 16 more below them, got 'x'\."):
        fit(one_package, model(one_package, many), [callback("x")], tmp_path)


def test_other_results_are_refused(one_package: Any, tmp_path: Path) -> None:
    class Pair(nn.Linear):
        def forward(self, h: Tensor) -> Any:
            return super().forward(h), None

    words = "module 'projector': expected its forward to return a tensor of embeddings, got tuple"
    with pytest.raises(TypeError, match=words):
        fit(one_package, model(one_package, Pair(8, 16)), [callback("projector")], tmp_path)


def test_each_problem_is_warned_of_once(one_package: Any, tmp_path: Path) -> None:
    class Collapsed(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            return 1 + 1e-6 * super().forward(h)

    module = model(one_package, Collapsed(8, 16))
    watch = callback("projector", every=1, samples=8)
    found = warned(lambda: fit(one_package, module, [watch], tmp_path))
    assert len([line for line in found if "collapse: no dimension" in line]) == 1
    assert found[0].startswith("embeddings of 'projector' at step 1: ")
    assert len(found) == len(watch.state_dict()["told"])


def test_submodule_that_is_not_called_is_warned_of(one_package: Any, tmp_path: Path) -> None:
    module = model(one_package, times=0)
    found = warned(lambda: fit(one_package, module, [callback("projector")], tmp_path))
    assert found == ["embeddings of 'projector' at step 1: the training step did not call it"]


def test_what_follows_in_place_is_not_seen(one_package: Any, tmp_path: Path) -> None:
    module = model(one_package, nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True)))
    watch = callback("projector.0", every=1, samples=8 * STEPS)
    fit(one_package, module, [watch], tmp_path)
    assert (watch.monitor.state_dict()["rows"] < 0).any()


def test_recomputed_views_count_once(one_package: Any, tmp_path: Path) -> None:
    """Reentrant checkpointing calls the submodule again, in the backward pass."""

    class Counted(nn.Linear):
        calls = 0

        def forward(self, h: Tensor) -> Tensor:
            self.calls += self.training
            return super().forward(h)

    module = model(one_package, Counted(8, 16))

    def training_step(batch: Tensor, batch_idx: int) -> Tensor:
        h = module.backbone(batch)
        z = torch.utils.checkpoint.checkpoint(module.projector, h, use_reentrant=True)
        return z.square().mean()

    module.training_step = training_step
    watch = callback("projector", every=1, samples=100)
    fit(one_package, module, [watch], tmp_path)
    assert module.projector.calls == 2 * STEPS
    assert watch.monitor.report.samples == 8 * STEPS


@pytest.mark.parametrize("what", ["submodule", "wrapped", "step"])
def test_compiled(one_package: Any, tmp_path: Path, what: str) -> None:
    """With a backend that needs no C++ compiler; capture is what could lose the hook."""
    module = model(one_package)
    if what == "submodule":
        module.projector.compile(backend="eager")
    elif what == "wrapped":
        module.projector = torch.compile(module.projector, backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    watch = callback("projector", every=1, samples=8)
    fit(one_package, module, [watch], tmp_path)
    assert watch.monitor.state_dict()["step"] == STEPS


def test_two_submodules_keep_their_states(one_package: Any, tmp_path: Path) -> None:
    both = [callback("projector"), callback("backbone", prefix="features")]
    trainer = fit(one_package, model(one_package), both, tmp_path)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    for watch, width in zip(both, (16, 8), strict=True):
        assert saved[watch.state_key]["monitor"]["rows"].shape == (8 * STEPS, width)


def test_without_either_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vicreg_losses.lightning", raising=False)
    words = "expected the package lightning or pytorch-lightning, got neither"
    with pytest.raises(ImportError, match=words):
        importlib.import_module("vicreg_losses.lightning")
