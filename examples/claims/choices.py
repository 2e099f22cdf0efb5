"""The objectives, with what pilot.py chose once for each; nothing is tuned for a variant."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, SimSiamPredictionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from trainer import Joint, Network, Scale

from vicreg_losses import LeJEPALoss, VarianceLoss, VICRegLoss, VISRegLoss

RATES = {"vicreg": 1e-2, "visreg": 1e-2, "lejepa": 1e-2, "siamese": 1e-2}
VISREG_WEIGHT = 0.6  # the paper's lambda for small data sets
MOMENTUM = 0.99  # to 1 by a cosine; a few hundred steps are too few for BYOL's 0.996


def vicreg(size: Scale, seed: int) -> Joint:
    """VICReg, with its published coefficients."""
    return Joint(VICRegLoss())


def visreg(size: Scale, seed: int, **options: float | str) -> Joint:
    """VISReg; ``options`` of :class:`VISRegLoss` may differ."""
    options = {"weight": VISREG_WEIGHT, "num_slices": size.slices, "seed": seed, **options}
    return Joint(VISRegLoss(**options))


def lejepa(size: Scale, seed: int) -> Joint:
    """LeJEPA: SIGReg with its published lambda."""
    return Joint(LeJEPALoss(num_slices=size.slices, seed=seed))


@dataclass(frozen=True)
class Method:
    """A Siamese method, with or without its parts.

    Attributes:
        predictor: "simsiam" (a bottleneck), "byol" (as wide as the projector), or ``None``.
        stop_gradient: whether targets are constants.
        momentum: whether a moving average of the network makes the targets; else the network.
        variance: what the library's term is of, added with weight 1: "z", the embeddings before the
            cosine normalises them; "direction", ``D^1/2 z / |z|``, whose standard deviations are 1
            where directions are spread evenly; or ``None``.
    """

    predictor: str | None = "simsiam"
    stop_gradient: bool = True
    momentum: bool = False
    variance: str | None = None


SIMSIAM = Method()
BYOL = Method(predictor="byol", momentum=True)


class Siamese(nn.Module):
    """The symmetric negative cosine of predictions and targets, and the library in one line."""

    def __init__(self, method: Method, network: Network, scale: Scale) -> None:
        super().__init__()
        size, hidden = scale.dimensions, scale.hidden
        heads = {
            "simsiam": lambda: SimSiamPredictionHead(size, size // 4, size),
            "byol": lambda: BYOLPredictionHead(size, hidden, size),
            None: nn.Identity,
        }
        self.method = method
        self.predictor = heads[method.predictor]().to(scale.device)
        self.distance = NegativeCosineSimilarity()
        self.regularizer = VarianceLoss()
        self.teacher: list[Network] = []  # in a list: no parameters of this module
        if method.momentum:
            self.teacher.append(copy.deepcopy(network))
            deactivate_requires_grad(self.teacher[0])

    def forward(self, network: Network, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the embeddings before they are normalised."""
        z0, z1 = embeddings = [network(view) for view in views]
        targets = [self.teacher[0](view) for view in views] if self.teacher else embeddings
        if self.method.stop_gradient:
            targets = [target.detach() for target in targets]
        p0, p1 = (self.predictor(z) for z in embeddings)
        loss = (self.distance(p0, targets[1]) + self.distance(p1, targets[0])) / 2
        if self.method.variance == "z":
            loss = loss + self.regularizer(z0, z1)  # the one line
        elif self.method.variance == "direction":
            u0, u1 = (z.shape[1] ** 0.5 * F.normalize(z) for z in embeddings)
            loss = loss + self.regularizer(u0, u1)
        return loss, embeddings

    def after_step(self, network: Network, step: int, steps: int) -> None:
        """Move the teacher, if there is one."""
        for teacher in self.teacher:
            update_momentum(network, teacher, cosine_schedule(step, steps, MOMENTUM, 1))
