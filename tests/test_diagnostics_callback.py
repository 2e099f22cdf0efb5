"""The callback without a Trainer: what it takes from a batch, and what it hands on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def callback() -> Any:
    module = pytest.importorskip(
        "vicreg_losses.lightning",
        reason="neither lightning nor pytorch-lightning is installed",
        exc_type=ImportError,
    )
    return module.EmbeddingMonitorCallback


def batch_of(watch: Any, *outputs: Tensor, world_size: int = 1) -> Any:
    """One training batch in which the submodule returns these; a Trainer's part that counts."""
    trainer = SimpleNamespace(
        world_size=world_size, callback_metrics={}, loggers=[], global_step=1, is_global_zero=False
    )
    watch.on_train_batch_start()
    for output in outputs:
        watch._hook(nn.Identity(), (), output)
    watch.on_train_batch_end(trainer)
    return trainer


def rows_of(watch: Any) -> Tensor:
    rows = watch.monitor.state_dict()["rows"]
    assert isinstance(rows, Tensor)
    return rows


def test_results_of_another_shape_are_left_out(callback: Any) -> None:
    """The crops of each size in one batch; and one after the other, where all of them count."""
    crops = torch.arange(6.0)[:, None, None] + torch.zeros(6, 12, 4)
    by_size = callback("projector", every=1, samples=100)
    batch_of(by_size, crops[:2].flatten(0, 1), crops[2:].flatten(0, 1))
    assert torch.equal(rows_of(by_size), crops[:2].flatten(0, 1))
    one_by_one = callback("projector", every=1, samples=100)
    batch_of(one_by_one, *crops)
    assert rows_of(one_by_one)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_several_results_of_several_views(callback: Any) -> None:
    views = torch.arange(4.0)[:, None, None] + torch.zeros(4, 8, 3)
    stacked, single = (callback("projector", every=1, samples=100) for _ in range(2))
    batch_of(stacked, views[:2], views[2:])
    batch_of(single, *views)
    assert torch.equal(rows_of(stacked), rows_of(single))


@pytest.mark.parametrize("world_size", [1, 2])
def test_numbers_of_one_rank_decide_nothing(callback: Any, world_size: int) -> None:
    """`ReduceLROnPlateau` would step on some ranks alone."""
    watch = callback("projector", every=1, samples=8)
    trainer = batch_of(watch, torch.eye(8), world_size=world_size)
    assert watch.monitor.report is not None
    assert ("embeddings/effective_rank" in trainer.callback_metrics) == (world_size == 1)


def test_results_outside_of_training_are_not_kept(callback: Any) -> None:
    """Validation within `fit` would hold them."""
    watch = callback("projector")
    watch._hook(nn.Identity(), (), torch.zeros(4, 2))
    assert watch._seen is None
    watch.on_train_batch_start()
    watch._hook(nn.Identity(), (), torch.zeros(4, 2))
    assert len(watch._seen) == 1
