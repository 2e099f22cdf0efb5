"""A small pretraining loop: a network, an objective on two views, and what its features are worth.

One thread and one process train one network; the scripts train two at a time.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from lightly.models.modules.heads import BYOLProjectionHead
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1, resnet50

from vicreg_losses import diagnostics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the examples
from augment import Views
from data import DataError as DataError
from data import load as load_images
from data import ordered_batches
from evaluation import knn_accuracy

WEIGHT_DECAY = 1e-4
WARM_UP = 0.1
LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Scale:
    """How large the runs of an experiment are.

    Attributes:
        name: "cores", "quick" or "full".
        widths: of the small ResNet's stem and stages; ``None`` for a ResNet-50.
        hidden: width of the projector.
        dimensions: D, of the embeddings.
        slices: K of the sketches.
        batch: images in a batch.
        steps: of the optimiser.
        train: training images of each class; ``None`` for all.
        held_out: held-out images of each class; ``None`` for all.
        device: where to train.
    """

    name: str
    widths: tuple[int, ...] | None
    hidden: int
    dimensions: int
    slices: int
    batch: int
    steps: int
    train: int | None
    held_out: int | None
    device: str = "cpu"


SCALES = {
    "cores": Scale("cores", (16, 32, 128), 512, 128, 512, 128, 300, 400, 200),
    "quick": Scale("quick", (4, 8, 16), 32, 16, 16, 16, 3, 20, 10),
    "full": Scale("full", None, 2048, 256, 4096, 256, 20_000, None, None, "cuda"),
}


@dataclass(frozen=True)
class Data:
    """Images (N, 1, 28, 28) uint8 and labels (N,), sorted by class, and the views of them."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    views: Views


@lru_cache
def load(name: str, scale: Scale) -> Data:
    """The first images of each class of a data set, or all of them."""
    images = load_images(name)
    parts = []
    for samples, count in ((images.train, scale.train), (images.held_out, scale.held_out)):
        pixels, labels = next(iter(ordered_batches(samples, len(samples), workers=0)))
        chosen = first_of_each_class(labels, count)
        parts += [pixels[chosen], labels[chosen]]
    return Data(*parts, images.views)


def first_of_each_class(labels: Tensor, count: int | None) -> Tensor:
    """Indices of the first ``count`` samples of each class, by class."""
    return torch.cat([torch.where(labels == k)[0][:count] for k in labels.unique()])


class Network(nn.Module):
    """A backbone for gray images and a projector without a BatchNorm at its end.

    That leaves the scale of the embeddings free, which is what the regularizers act on.
    """

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.backbone, width = large() if scale.widths is None else small(scale.widths)
        self.projector = BYOLProjectionHead(width, scale.hidden, scale.dimensions)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


def small(widths: tuple[int, ...]) -> tuple[nn.Module, int]:
    """A ResNet of one block for each stage, and the number of its features."""
    stem = nn.Conv2d(1, widths[0], 5, stride=2, padding=2, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    for before, after in pairwise(widths):
        shortcut = nn.Sequential(conv1x1(before, after, 2), nn.BatchNorm2d(after))
        layers.append(BasicBlock(before, after, 2, shortcut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1]


def large() -> tuple[nn.Module, int]:
    """A ResNet-50 for small gray images (a first layer of 3x3, no pooling), and its features."""
    backbone = resnet50()
    backbone.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    backbone.maxpool, backbone.fc = nn.Identity(), nn.Identity()
    return backbone, 2048


def build(scale: Scale, seed: int) -> Network:
    """The network of a seed, the same for every variant."""
    torch.manual_seed(seed)
    return Network(scale).to(scale.device, memory_format=torch.channels_last)


class Joint(nn.Module):
    """The embeddings of both views in one of the library's losses: VICReg, VISReg, LeJEPA."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, network: Network, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the embeddings of the views."""
        embeddings = [network(view) for view in views]
        return self.loss(*embeddings), embeddings

    def after_step(self, network: Network, step: int, steps: int) -> None:
        """Nothing moves but by the optimiser."""


def fit(
    network: Network,
    objective: nn.Module,
    data: Data,
    *,
    scale: Scale,
    seed: int,
    lr: float,
) -> float:
    """Train ``network`` by AdamW: warm-up, cosine decay, gradients clipped at norm 1.

    The order of the images and their views depend on ``seed`` alone, so that all variants of an
    experiment see the same.

    Args:
        network: what is trained, in place.
        objective: ``objective(network, views)`` gives the loss and the embeddings;
            ``objective.after_step(network, step, steps)`` follows every step.
        data: the training images and the views of them.
        scale: batch size, number of steps, device.
        seed: of the order and of the views.
        lr: the largest learning rate.

    Returns:
        float: the standard deviation of an embedding dimension over a batch (biased, as the losses
        see it), the mean over the last quarter of the steps, views and dimensions.

    Raises:
        FloatingPointError: the embeddings are not finite.
    """
    parameters = [*network.parameters(), *objective.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, scale.steps, pct_start=WARM_UP, cycle_momentum=False
    )
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(scale.device).manual_seed(seed)
    network.train()
    settled = []
    for step in range(scale.steps):
        rows = torch.randint(len(data.train), (scale.batch,), generator=order)
        pair = data.views(data.train[rows].to(scale.device), draws)
        with torch.autocast(scale.device, torch.bfloat16, enabled=scale.device != "cpu"):
            loss, embeddings = objective(network, pair)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT, error_if_nonfinite=False)
        optimizer.step()
        schedule.step()
        objective.after_step(network, step, scale.steps)
        if step >= scale.steps * 3 // 4:
            settled.append(torch.stack(embeddings).detach().float().std(1, correction=0).mean())
    spread = float(torch.stack(settled).mean())
    if not math.isfinite(spread):
        raise FloatingPointError(f"the embeddings of seed {seed} are not finite")
    return spread


@torch.inference_mode()
def encode(module: nn.Module, images: Tensor, views: Views) -> Tensor:
    """``module`` in evaluation mode on images as they are: (N, width), float32, on the CPU."""
    module.eval()
    device = next(module.parameters()).device
    parts = [module(views.plain(part.to(device))).float().cpu() for part in images.split(500)]
    return torch.cat(parts)


def measures(network: Network, data: Data) -> dict[str, float]:
    """What the features of held-out images are worth, and how the embeddings spread."""
    train, test = (encode(network.backbone, x, data.views) for x in (data.train, data.test))
    z = encode(network, data.test, data.views)
    right = logistic_predictions(train, data.labels, test) == data.test_labels
    labels = data.labels, data.test_labels
    classes = int(data.labels.max()) + 1
    return {
        "probe": float(right.double().mean()),
        "knn": knn_accuracy(train, labels[0], test, labels[1], classes=classes),
        "unit_spread": unit_spread(z),
        "rank": effective_rank(z),
    }


def logistic_predictions(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Classes of ``test`` by a logistic regression on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500, tol=1e-3))
    probe.fit(train.double().numpy(), labels.numpy())
    return torch.from_numpy(np.asarray(probe.predict(test.double().numpy())))


def unit_spread(z: Tensor) -> float:
    """Mean standard deviation of the dimensions of ``z / |z|``, times D^1/2.

    1 for directions spread evenly, 0 for a single one (the measure of SimSiam's authors, 2021).
    """
    return float(nn.functional.normalize(z.double()).std(0).mean()) * z.shape[1] ** 0.5


def effective_rank(z: Tensor) -> float:
    """RankMe of the centred embeddings: how many directions they use."""
    return diagnostics.effective_rank(z, center=True)
