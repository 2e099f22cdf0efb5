"""The network: a torchvision ResNet, the expander and, for some losses, a predictor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.models
from settings import PREDICTING, Settings, SettingsError
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

TINY = "resnet-tiny"
SMALL_IMAGE = 64  # up to here 7x7 is too coarse: it blurs the strokes of a digit


class Outputs(NamedTuple):
    """What the losses see of V views of N images.

    Attributes:
        embeddings: (N, D) for each view, not normalised.
        predictions: Of the same shapes, or empty where there is no predictor.
        features: (N, F), the backbone's for the first view, detached.
    """

    embeddings: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...]
    features: Tensor


class Network(nn.Module):
    """Backbone, expander and predictor, called once for all views of a batch.

    Views of one size go through it together, so batch norm takes the statistics of all of them (in
    expander and predictor, of all views), where the codes of most papers call it for each view.
    """

    def __init__(
        self, backbone: ResNet, widths: Sequence[int], predictor: int, last_norm: bool
    ) -> None:
        super().__init__()
        self.width = backbone.fc.in_features
        backbone.fc = nn.Identity()
        self.backbone = backbone
        self.expander = multilayer([self.width, *widths])
        if last_norm:
            self.expander.append(nn.BatchNorm1d(widths[-1], affine=False))
        self.predictor = multilayer([widths[-1], predictor, widths[-1]]) if predictor else None

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        """Embed ``views``, each (N, C, H, W), those of one size next to each other."""
        features = torch.cat([self.features(torch.cat(group)) for group in by_size(views)])
        z = self.expander(features)
        predictions = () if self.predictor is None else self.predictor(z).chunk(len(views))
        return Outputs(z.chunk(len(views)), predictions, features[: len(views[0])].detach())

    def features(self, images: Tensor) -> Tensor:
        """The backbone's features, (N, F), of images in gray or colour."""
        colours = images.expand(-1, 3, -1, -1)
        return self.backbone(colours.contiguous(memory_format=torch.channels_last))


class Features(nn.Module):
    """The features of a network alone."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(images)


def multilayer(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers, with batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    *hidden, last = pairwise(widths)
    for inputs, outputs in hidden:
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Linear(*last))


def by_size(views: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbouring views of one size, together."""
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape == view.shape:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


def architectures() -> list[str]:
    """Names of the ResNets that torchvision has, and of a small one for digits."""
    return [TINY, *torchvision.models.list_models(torchvision.models, include="*resne*")]


def check(arch: str) -> None:
    """Refuse what is not a ResNet of torchvision."""
    if arch not in architectures():
        raise SettingsError(f"--arch: expected one of {', '.join(architectures())}, got {arch!r}")


def build(settings: Settings) -> Network:
    """The network of ``settings``, with weights that its seed alone decides."""
    torch.manual_seed(settings.seed)
    widths = [int(width) for width in settings.expander.split("-")]
    backbone = build_backbone(settings.arch, settings.image_size)
    last_norm = settings.loss == "simsiam"  # its paper's section 3; PyTorch's mean and var alone
    predictor = settings.predictor if settings.loss in PREDICTING else 0
    network = Network(backbone, widths, predictor, last_norm)
    return network.to(memory_format=torch.channels_last)


def build_backbone(arch: str, image_size: int) -> ResNet:
    """A ResNet of random weights; for small images its first kernel is 3x3."""
    if arch == TINY:
        backbone = ResNet(BasicBlock, [1, 1, 1, 1])
    else:
        backbone = torchvision.models.get_model(arch, weights=None)
    if image_size <= SMALL_IMAGE:
        stem = backbone.conv1
        backbone.conv1 = nn.Conv2d(3, stem.out_channels, 3, stride=2, padding=1, bias=False)
    return backbone


def exported(backbone: ResNet) -> dict[str, Tensor]:
    """The backbone's state for torchvision's model of that name, of which it lacks ``fc`` alone.

    A first kernel of 3x3 becomes the centre of a 7x7 one of zeros: the same function.
    """
    state = backbone.state_dict()
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    margin = (7 - state["conv1.weight"].shape[-1]) // 2
    state["conv1.weight"] = F.pad(state["conv1.weight"], [margin] * 4).contiguous()
    return state
