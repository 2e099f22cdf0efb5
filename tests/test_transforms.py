"""What surrounds a module: transforms that captured it, symbolic shapes, another default device."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    functional,
)

MODULES = {
    "VarianceLoss": VarianceLoss,
    "CovarianceLoss": CovarianceLoss,
    "InvarianceLoss": InvarianceLoss,
    "wasserstein": lambda: SlicedSketchLoss(8),
    "epps_pulley": lambda: SlicedSketchLoss(8, "epps_pulley"),
    "VICRegLoss": VICRegLoss,
    "VISRegLoss": lambda: VISRegLoss(num_slices=8),
    "LeJEPALoss": lambda: LeJEPALoss(num_slices=8),
}


def embeddings(samples: int = 12) -> torch.Tensor:
    return torch.randn(2, samples, 6, generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize("name", MODULES)
def test_function_transform_of_a_captured_module(name: str) -> None:
    """Value and gradient of an eager call; the slices move on as there."""
    module, other = MODULES[name](), MODULES[name]()
    for _ in range(2):
        z = embeddings().requires_grad_()
        other(z).backward()
        gradient = torch.func.grad(lambda x: module(x))(embeddings())
        assert torch.equal(gradient, z.grad)
    assert module.state_dict() == other.state_dict()


@pytest.mark.parametrize("name", MODULES)
def test_symbolic_shapes_and_options(name: str) -> None:
    torch._dynamo.reset()
    module, other = MODULES[name](), MODULES[name]()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for samples in (12, 20):
        z, same = embeddings(samples).requires_grad_(), embeddings(samples).requires_grad_()
        other(z).backward()
        compiled(same).backward()
        # Both sums round each element once; 16 ulp is more than either needs at this size.
        torch.testing.assert_close(same.grad, z.grad, rtol=16 * 2**-23, atol=1e-7)


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("default_device")
@pytest.mark.parametrize("statistic", ["wasserstein", "epps_pulley"])
def test_default_device_is_not_the_embeddings_device(statistic: str) -> None:
    z = torch.ones(5, 3, device="cpu").cumsum(0)
    value = functional.sliced_sketch_loss(z, statistic=statistic, num_slices=4)
    assert value.device.type == "cpu"
    assert value.isfinite()


@pytest.mark.parametrize("name", ["wasserstein", "VISRegLoss"])
def test_counter_follows_the_embeddings(name: str) -> None:
    """A module that was left on another device moves there once (here: from meta, by load)."""
    module: nn.Module = MODULES[name]()
    module(embeddings())
    assert module.step.device.type == "cpu"
    assert set(module.state_dict()) == {"seed", "step"}
