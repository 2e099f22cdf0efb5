"""The losses by name, and the terms that ``--add`` puts beside them.

Each sees the embeddings of all views as they leave the network: not normalised, and of this rank's
images alone. VICReg, VISReg, LeJEPA and the added terms make the batch global themselves; SimCLR
and Barlow Twins, which are lightly's, are given the gathered one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from networks import Outputs
from settings import Settings, SettingsError
from torch import Tensor, nn

from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    distributed,
)

Views = Sequence[Tensor]
Terms = dict[str, Tensor]
SLICES = 1024


class Objective(nn.Module):
    """A loss, and the regularizers added to it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.base = BASES[settings.loss](settings)
        added = {"variance": VarianceLoss, "covariance": CovarianceLoss}
        # Of another seed than the base's, whose slices it would draw otherwise.
        added["sketch"] = lambda: SlicedSketchLoss(SLICES, seed=settings.seed + 1)
        self.added = nn.ModuleDict({name: added[name]() for name in settings.add})
        self.weights = settings.add

    def forward(self, outputs: Outputs, targets: Views) -> tuple[Tensor, Terms]:
        """The loss, and its terms before they are weighted, detached.

        Args:
            outputs: Of the network that is trained.
            targets: (N, D) embeddings of the global views, without gradient: what SimSiam and BYOL
                predict.
        """
        loss, terms = self.base(outputs, targets)
        for name, regularizer in self.added.items():
            terms[f"added {name}"] = term = regularizer(outputs.embeddings)
            loss = loss + self.weights[name] * term  # the one line
        return loss, {name: term.detach() for name, term in terms.items()}


class Regularized(nn.Module):
    """VICReg, VISReg or LeJEPA, with its terms in one pass."""

    def __init__(self, composite: nn.Module) -> None:
        super().__init__()
        self.composite = composite

    def forward(self, outputs: Outputs, targets: Views) -> tuple[Tensor, Terms]:
        terms = self.composite.terms(outputs.embeddings)
        return self.composite.total(terms), terms._asdict()


class Invariance(nn.Module):
    """The mean squared distance of two views alone: what collapses."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = InvarianceLoss()

    def forward(self, outputs: Outputs, targets: Views) -> tuple[Tensor, Terms]:
        return self.loss(outputs.embeddings), {}


class NegativeCosine(nn.Module):
    """SimSiam's and BYOL's: minus the cosine of a prediction and another, global view's target.

    BYOL's own is 2 + 2 times this (arXiv:2006.07733, equation 2), of the same minima.
    """

    def forward(self, outputs: Outputs, targets: Views) -> tuple[Tensor, Terms]:
        views = product(enumerate(outputs.predictions), enumerate(targets))
        cosines = [F.cosine_similarity(p, t).mean() for (i, p), (j, t) in views if i != j]
        return -torch.stack(cosines).mean(), {}


class Pairs(nn.Module):
    """One of lightly's losses, on each global view with each other view, of the global batch."""

    def __init__(self, loss: nn.Module, num_global: int) -> None:
        super().__init__()
        self.loss, self.num_global = loss, num_global

    def forward(self, outputs: Outputs, targets: Views) -> tuple[Tensor, Terms]:
        gathered = [distributed.all_gather(z) for z in outputs.embeddings]
        pairs = [
            self.loss(gathered[i], gathered[j])
            for i, j in product(range(self.num_global), range(len(gathered)))
            if i < j
        ]
        return torch.stack(pairs).mean(), {}


def _lightly(name: str, **options: float) -> nn.Module:
    try:
        import lightly.loss
    except ImportError as error:
        raise SettingsError(f"--loss: simclr and barlow need lightly: {error}") from error
    return getattr(lightly.loss, name)(**options)


def _visreg(settings: Settings) -> VISRegLoss:
    """VISReg, 2606.02572: 0.9 and 4096 slices on ImageNet, 0.6 on small sets (section 3.3)."""
    small = settings.preset == "small"
    return VISRegLoss(
        weight=0.6 if small else 0.9,
        num_slices=256 if small else 4096,
        num_global=settings.global_views,
        seed=settings.seed,
    )


BASES: dict[str, Callable[[Settings], nn.Module]] = {
    # Coefficients 25, 25, 1: VICReg, section 4.2.
    "vicreg": lambda settings: Regularized(VICRegLoss()),
    "visreg": lambda settings: Regularized(_visreg(settings)),
    # 0.05 and 1024 slices: LeJEPA, 2511.08544.
    "lejepa": lambda settings: Regularized(
        LeJEPALoss(num_global=settings.global_views, seed=settings.seed)
    ),
    "simsiam": lambda settings: NegativeCosine(),
    "byol": lambda settings: NegativeCosine(),
    # Temperature 0.1, lambda 5e-3: the papers' choices on ImageNet.
    "simclr": lambda settings: Pairs(
        _lightly("NTXentLoss", temperature=0.1), settings.global_views
    ),
    "barlow": lambda settings: Pairs(
        _lightly("BarlowTwinsLoss", lambda_param=5e-3), settings.global_views
    ),
    "invariance": lambda settings: Invariance(),
}
