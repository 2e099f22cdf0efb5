"""Inputs that are worked on in several blocks, against the oracle."""

from collections.abc import Callable

import oracles
import pytest
import torch
from torch import Tensor

from vicreg_losses import _epps_pulley, _torch, functional


def value_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    x = z.detach().clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def assert_same(ours: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor], z: Tensor):
    (value, gradient), (true_value, true_gradient) = (
        value_and_gradient(f, z) for f in (ours, truth)
    )
    assert abs(value - true_value) <= 1e-10 * abs(true_value)
    assert (gradient - true_gradient).norm() <= 1e-10 * true_gradient.norm()


@pytest.mark.parametrize("strategy", ["gram", "feature"])
@pytest.mark.parametrize("shape", [(1, 300, 290), (2, 260, 520), (2, 530, 259)])
def test_triangle_of_blocks(shape: tuple[int, int, int], strategy: str) -> None:
    """From 256 on the symmetric product is made of block rows."""
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z + 0.5 * z.roll(1, -1) + 2

    def truth(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for view in x:
            centered = view - view.mean(0)
            c = centered.T @ centered / (len(view) - 1)
            total = total + (c - c.diagonal().diag()).square().sum() / view.shape[1]
        return total / len(x)

    assert_same(lambda x: functional.covariance_loss(x, strategy=strategy), truth, z)


@pytest.mark.parametrize("statistic", ["wasserstein", "epps_pulley"])
def test_chunks_of_slices(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 slices at a time, and a few rows of harmonics, instead of all."""
    monkeypatch.setattr(_torch, "_CPU_CHUNK", 1)
    monkeypatch.setattr(_epps_pulley, "_CPU_GRAIN", 100)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 45, 12, dtype=torch.float64, generator=generator)
    w = torch.randn(12, 50, dtype=torch.float64, generator=generator)
    w = w / w.norm(dim=0)
    oracle = getattr(oracles, {"wasserstein": "sliced_wasserstein"}.get(statistic, statistic))
    assert_same(
        lambda x: functional.sliced_sketch_loss(x, directions=w, statistic=statistic),
        lambda x: oracle(x, w),
        z,
    )
