"""What a training step is measured with: networks, objectives, and whether ours are right."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import vicreg_losses as vl
from benchmarks import published

TINY = "resnet-tiny"
ARCHITECTURES = (TINY, "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SIMSIAM_WIDTH = 2048  # at most, as in its paper
TOLERANCES = {"value_error": 1e-4, "gradient_error": 1e-2}


class Outputs(NamedTuple):
    """Embeddings z (2, N, D) and, of SimSiam, predictions p (2, N, D)."""

    z: Tensor
    p: Tensor | None = None


Loss = Callable[[Outputs, Tensor | None], Tensor]  # of outputs, and directions if not drawn


@dataclass(frozen=True)
class Setup:
    """What is measured on."""

    device: str
    arch: str
    batch_size: int
    image_size: int
    width: int
    slices: int
    impl: str
    seconds: float


@dataclass(frozen=True)
class Objective:
    """A loss, maybe on top of another one: the published formula and, if there is one, ours."""

    name: str
    published: Loss
    ours: Loss | None
    on_top_of: str = ""

    def sides(self) -> dict[str, Loss]:
        both = {"published": self.published, "ours": self.ours}
        return {side: loss for side, loss in both.items() if loss}


class Network(nn.Module):
    """A ResNet, an expander of three layers and, for SimSiam, a predictor of two."""

    def __init__(self, setup: Setup, predicts: bool) -> None:
        super().__init__()
        if setup.arch == TINY:
            self.backbone = ResNet(BasicBlock, [1, 1, 1, 1])
        else:
            self.backbone = torchvision.models.get_model(setup.arch)
        features = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        width = min(setup.width, SIMSIAM_WIDTH) if predicts else setup.width
        self.expander = multilayer(features, width, width, width)
        self.predictor = multilayer(width, max(1, width // 4), width) if predicts else None

    def forward(self, images: Tensor) -> Outputs:
        z = self.expander(self.backbone(images))
        p = None if self.predictor is None else self.predictor(z)
        return Outputs(*(None if x is None else x.unflatten(0, (2, -1)) for x in (z, p)))


def multilayer(*widths: int) -> nn.Sequential:
    """Linear layers, with batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers[:-2])


def wide(x: Tensor) -> Tensor:
    """In float32 or wider, as published formulas have to be computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def floor(out: Outputs, _: Tensor | None) -> Tensor:
    """Hardly a loss, so that there is something to differentiate."""
    return wide(out.z if out.p is None else out.p).square().mean()


def simsiam(out: Outputs, _: Tensor | None) -> Tensor:
    """Negative cosine similarity to the other view (Chen and He, 2021, arXiv:2011.10566)."""
    assert out.p is not None
    return -F.cosine_similarity(wide(out.p), wide(out.z.detach()).flip(0), dim=-1).mean()


def published_visreg(slices: int) -> Loss:
    """With slices drawn on the device at every call, as ours."""

    def loss(out: Outputs, directions: Tensor | None) -> Tensor:
        if directions is None:
            shape = (out.z.shape[2], slices)
            directions = F.normalize(torch.randn(shape, device=out.z.device), dim=0)
        return published.visreg_loss(wide(out.z), directions)

    return loss


def objectives(setup: Setup) -> dict[bool, list[Objective]]:
    """Those of the network without a predictor, and those of the network with one."""
    vicreg = vl.VICRegLoss(impl=setup.impl)
    visreg = vl.VISRegLoss(num_slices=setup.slices, impl=setup.impl).to(setup.device)
    variance = vl.VarianceLoss(impl=setup.impl)
    return {
        False: [
            Objective(
                "VICReg", lambda out, _: published.vicreg(wide(out.z)), lambda out, _: vicreg(out.z)
            ),
            Objective(
                "VISReg",
                published_visreg(setup.slices),
                lambda out, directions: visreg(out.z, directions=directions),
            ),
        ],
        True: [
            Objective("SimSiam", simsiam, None),
            Objective(
                "SimSiam + variance",
                lambda out, _: published.variance(wide(out.z)),
                lambda out, _: variance(out.z),
                on_top_of="SimSiam",
            ),
        ],
    }


def gradients(loss: Loss, out: Outputs, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and gradient of z and p after each other, in float64."""
    leaves = Outputs(*(x if x is None else x.detach().requires_grad_() for x in out))
    value = loss(leaves, directions.to(wide(leaves.z).dtype))
    value.backward()
    found = [x.grad for x in leaves if x is not None and x.grad is not None]
    return value.detach().double(), torch.cat([x.double().flatten() for x in found])


def check(objective: Objective, out: Outputs, slices: int) -> dict[str, dict[str, float]]:
    """Relative errors of both sides, against the published formula in float64.

    That of the gradient is in its norm, and has a wide tolerance: projections that are equal in the
    working precision may be sorted either way, which changes a few elements of VISReg's.

    Returns:
        ``value_error`` and ``gradient_error`` of each side.

    Raises:
        SystemExit: An error is too large.
    """
    directions = published.unit_directions(out.z.shape[2], slices).to(out.z.device)
    double = Outputs(*(x if x is None else x.double() for x in out))
    value, gradient = gradients(objective.published, double, directions)
    errors = {}
    for side, loss in objective.sides().items():
        found = gradients(loss, out, directions)
        of_value = (found[0] - value).abs() / value.abs().clamp(min=1)
        of_gradient = (found[1] - gradient).norm() / gradient.norm()
        errors[side] = {"value_error": of_value.item(), "gradient_error": of_gradient.item()}
        for name, error in errors[side].items():
            if not error <= TOLERANCES[name]:  # NaN neither
                raise SystemExit(
                    f"refusing to report {objective.name}: {side} differs from the published "
                    f"formula in float64: {name} {error:.1e}, expected {TOLERANCES[name]:.0e}"
                )
    return errors
