"""Who is measured: ours, the published formulas, and what other packages ship.

Each contender is called as its own documentation says, on the same views. What a package's loss
is defined to be may differ from the published formula (an epsilon, a normalisation): its errors
are those against its own definition, in float64, so that a large one is a mistake and no choice.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import vicreg_losses as vl
from benchmarks import published
from benchmarks.points import Point

Loss = Callable[..., Tensor]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Contender:
    """An implementation of a loss.

    Attributes:
        name: as tables show it; the losses of one package at several losses share it.
        build: makes the loss of a point; it is called with the V views of shape (N, D).
        package: the distribution that it needs, or "" for none but PyTorch.
        views: the only number of views that it takes, or 0 for any; -2 for two or more.
        definition: which float64 formula of ``truth.py`` it claims to be, and its options.
        same_loss: whether it minimises the same as ours, so that its time counts against ours.
        takes_directions: whether the loss has a ``directions`` argument; otherwise it draws
            them by ``torch.randn``.
        compiled: whether it is under ``torch.compile``, so that its first call takes seconds.
    """

    name: str
    build: Callable[[Point], Loss]
    package: str = ""
    views: int = 0
    definition: dict[str, Any] = field(default_factory=dict)
    same_loss: bool = True
    takes_directions: bool = False
    compiled: bool = False

    def absence(self, point: Point) -> str:
        """Why it cannot be measured at a point, or nothing."""
        if self.package:
            try:
                version(self.package)
            except PackageNotFoundError:
                return f"{self.package} is not installed"
        if self.views > 0 and point.views != self.views:
            return f"takes {self.views} views"
        if self.views < 0 and point.views < -self.views:
            return f"takes {-self.views} views or more"
        return ""


def _together(views: Sequence[Tensor]) -> Tensor:
    return views[0][None] if len(views) == 1 else torch.stack(views)


def _published(point: Point, wrap: Callable[[Any], Any] = lambda formula: formula) -> Loss:
    """The formula of the views, with slices drawn at every call; ``wrap`` takes all but the draw.

    The draw is outside as errors are compared along given directions.
    """
    if point.loss == "vicreg":
        return wrap(published.vicreg_of_views)
    if not point.slices:
        formula = getattr(published, point.loss)
        return wrap(lambda *views: formula(_together(views)))

    def sketch(w: Tensor, *views: Tensor) -> Tensor:
        w = w / w.norm(dim=0, keepdim=True)
        if point.loss == "sigreg":
            return published.epps_pulley(_together(views), w)
        return published.visreg_loss(_together(views), w, num_global=1)

    wrapped = wrap(sketch)
    return lambda *views: wrapped(torch.randn(point.dimensions, point.slices), *views)


def _compiled(point: Point) -> Loss:
    return _published(point, torch.compile)


def _ours(point: Point) -> Loss:
    if point.loss == "visreg":
        return vl.VISRegLoss(num_slices=point.slices, num_global=1)
    if point.loss == "sigreg":
        return vl.SlicedSketchLoss(point.slices, "epps_pulley")
    return {
        "variance": vl.VarianceLoss,
        "covariance": vl.CovarianceLoss,
        "vicreg": vl.VICRegLoss,
    }[point.loss]()


def _ours_compiled(point: Point) -> Loss:
    """A compiled function of the views, as the formula is and as training steps are."""
    loss = _ours(point)
    return torch.compile(lambda *views, **given: loss(*views, **given))


def _mean_over_views(loss: Loss) -> Loss:
    return lambda *views: torch.stack([loss(view) for view in views]).mean()


def _lightly_variance(point: Point) -> Loss:
    from lightly.loss.vicreg_loss import variance_loss

    return _mean_over_views(variance_loss)


def _lightly_covariance(point: Point) -> Loss:
    from lightly.loss.vicreg_loss import covariance_loss

    return _mean_over_views(covariance_loss)


def _lightly_vicreg(point: Point) -> Loss:
    from lightly.loss import VICRegLoss

    return VICRegLoss()


def _lightly_barlow(point: Point) -> Loss:
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss()


def _lightly_visreg(point: Point) -> Loss:
    from lightly.loss import VISRegLoss

    loss = VISRegLoss(num_slices=point.slices)
    return lambda first, *rest: loss(global_proj=first[None], local_proj=torch.stack(rest))


def _lightly_sigreg(point: Point) -> Loss:
    from lightly.loss.lejepa_loss import SIGReg

    loss = SIGReg(num_vectors=point.slices)
    return lambda *views: loss(_together(views))


def _metric_learning_vicreg(point: Point) -> Loss:
    from pytorch_metric_learning.losses import VICRegLoss

    loss = VICRegLoss()
    return lambda first, second: loss(first, ref_emb=second)


def _stable_vicreg(point: Point) -> Loss:
    from stable_pretraining.losses import VICRegLoss

    return VICRegLoss()


def _stable_sigreg(point: Point) -> Loss:
    # transformers, which this imports, looks for a package that has the name of our kernels/.
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    with mock.patch.object(sys, "path", elsewhere):
        from stable_pretraining.methods.lejepa import SlicedEppsPulley

    return SlicedEppsPulley(point.slices)


OURS, OURS_COMPILED = "ours", "ours, compiled"
ALL_OURS = (OURS, OURS_COMPILED)
PUBLISHED, COMPILED = "published", "compiled"
_LIGHTLY = "lightly"
_METRIC_LEARNING, _STABLE = "pytorch-metric-learning", "stable-pretraining"
_COMMON = (Contender(PUBLISHED, _published), Contender(COMPILED, _compiled, compiled=True))
_PLAIN = (
    Contender(OURS, _ours),
    Contender(OURS_COMPILED, _ours_compiled, compiled=True),
    *_COMMON,
)
_SKETCH = (*(replace(c, takes_directions=True) for c in _PLAIN[:2]), *_COMMON)
FIELD: dict[str, tuple[Contender, ...]] = {
    "variance": (*_PLAIN, Contender(_LIGHTLY, _lightly_variance, "lightly")),
    "covariance": (*_PLAIN, Contender(_LIGHTLY, _lightly_covariance, "lightly")),
    "vicreg": (
        *_PLAIN,
        Contender(_LIGHTLY, _lightly_vicreg, "lightly", views=2),
        Contender(_METRIC_LEARNING, _metric_learning_vicreg, _METRIC_LEARNING, views=2),
        Contender(_STABLE, _stable_vicreg, _STABLE, views=2),
        Contender(
            "lightly Barlow Twins",
            _lightly_barlow,
            "lightly",
            views=2,
            definition={"formula": "barlow_twins"},
            same_loss=False,
        ),
    ),
    "visreg": (
        *_SKETCH,
        Contender(_LIGHTLY, _lightly_visreg, "lightly", -2, {"shape_eps": 1e-4, "scale_eps": 0.0}),
    ),
    "sigreg": (
        *_SKETCH,
        Contender(_LIGHTLY, _lightly_sigreg, "lightly"),
        Contender(_STABLE, _stable_sigreg, _STABLE, views=1),  # its LeJEPA pools them
    ),
}


def preload() -> None:
    """Import what is installed, without computing: processes that are forked here start at once."""
    import contextlib
    import io

    small = {loss: Point(loss, 2, 4, 4, 4) for loss in FIELD}
    for loss, contenders in FIELD.items():
        for contender in contenders:
            if contender.package and not contender.absence(small[loss]):
                with contextlib.redirect_stderr(io.StringIO()):  # banners of other packages
                    contender.build(small[loss])
