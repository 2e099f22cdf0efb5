"""Published objectives, put together from the terms and named by source.

``forward`` is the weighted sum of ``terms``; a trainer that logs calls ``terms`` once and adds them
up with ``total``. The statistics pass is shared by all regularizers of a composite.
"""

from typing import Any, NamedTuple

from torch import Tensor

from . import _checks, _ops, _options
from ._options import Embeddings
from ._request import Request, batch_shape
from .modules import Loss, SlicedLoss

__all__ = ["LeJEPALoss", "LeJEPATerms", "VICRegLoss", "VICRegTerms", "VISRegLoss", "VISRegTerms"]


class VICRegTerms(NamedTuple):
    """Terms of VICReg, 0-dim: the variance a mean over views, the covariance a sum."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class VISRegTerms(NamedTuple):
    """Terms of VISReg, 0-dim, each a mean over views."""

    invariance: Tensor
    scale: Tensor
    shape: Tensor
    center: Tensor


class LeJEPATerms(NamedTuple):
    """Terms of LeJEPA, 0-dim, each a mean over views."""

    invariance: Tensor
    sketch: Tensor


def _weighted(terms: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
    first, *rest = (term * weight for term, weight in zip(terms, weights, strict=True))
    total = sum(rest, first)
    # NaN where the sum overflowed: a finite gradient must not come with it.
    return total * (total.detach() * 0 + 1)


class VICRegLoss(Loss):
    """VICReg: ``25 invariance + 25 variance + 1 covariance``.

    The invariance is pairwise, the variance (hinge) the mean over views, the covariance their sum:
    the official code for two views (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906). The paper's
    pseudo-code adds the variance up over views: coefficients 25, 50, 1 for two. Its equation does
    not divide the invariance by D either: 25 D, 50, 1.

    Args:
        invariance, variance, covariance: the coefficients.
        gamma: target standard deviation of the hinge.
        eps: added to the variance under its root.
        **common: ``gather_distributed``, ``process_group``, ``reduction``, ``impl``.

    ``forward(*views)`` takes two or more views: (N, D) tensors, a list of them, or one (V, N, D)
    tensor. Dtypes, errors and gradients: see :mod:`vicreg_losses.functional`.
    """

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-4,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.gamma, self.eps = gamma, eps
        for name in ("invariance", "variance", "covariance"):
            _checks.real(name, getattr(self, name))
        self._request()

    def options(self) -> dict[str, Any]:
        names = ("invariance", "variance", "covariance", "gamma", "eps")
        return {name: getattr(self, name) for name in names}

    def _request(self) -> Request:
        one = _options.variance_request(self.gamma, self.eps, "hinge", self.impl)
        return Request(
            variance="hinge", covariance="auto", gamma=one.gamma, eps=one.eps, impl=one.impl
        )

    def terms(self, *views: Embeddings) -> VICRegTerms:
        """The terms, without their coefficients; each can be differentiated."""
        tensors, request = self._float_views(views, "VICRegLoss", self._request())
        request = _options.with_invariance(request, "pairwise", None, tensors)
        _checks.warn_of_unit_norm("VICRegLoss", tensors, self.gamma)
        invariance, variance, covariance = _ops.regularizers(request, tensors)
        return VICRegTerms(invariance, variance, covariance * batch_shape(tensors)[0])

    def total(self, terms: VICRegTerms) -> Tensor:
        """The weighted sum of ``terms``: what ``forward`` returns."""
        return _weighted(terms, (self.invariance, self.variance, self.covariance))

    def forward(self, *views: Embeddings) -> Tensor:
        return self.total(self.terms(*views))


class VISRegLoss(SlicedLoss):
    """VISReg: ``(1 - weight) invariance + weight (scale + shape + center)``.

    VISReg (2026, arXiv:2606.02572): invariance to the mean of the views, squared variance (scale),
    sliced Wasserstein distance of the standardised embeddings to N(0, 1) (shape), squared mean
    (center). The default weight is the paper's for a ViT-B on ImageNet.

    Args:
        weight: lambda, from 0 to 1.
        num_slices: K.
        scale, shape, center: the weights of the three regularizers.
        num_global: how many views form the centre of the invariance; ``None`` for all.
        quantiles: "paper" or "exact" targets, see :func:`functional.sliced_sketch_loss`.
        seed: which sequence of slices.
        **common: ``gather_distributed``, ``process_group``, ``reduction``, ``impl``.

    ``forward(*views, directions=None)``: ``directions`` (D, K) replace the drawn ones. Dtypes,
    errors and gradients: see :mod:`vicreg_losses.functional`.
    """

    def __init__(
        self,
        weight: float = 0.9,
        num_slices: int = 4096,
        scale: float = 1.0,
        shape: float = 1.0,
        center: float = 1.0,
        num_global: int | None = None,
        quantiles: str = "paper",
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(num_slices, seed, **common)
        _checks.fraction("weight", weight)
        self.weight, self.scale, self.shape, self.center = weight, scale, shape, center
        for name in ("scale", "shape", "center"):
            _checks.real(name, getattr(self, name))
        _options.invariance_options("center", num_global, "auto")
        self.num_global, self.quantiles = num_global, quantiles
        self._request()

    def options(self) -> dict[str, Any]:
        names = ("weight", "num_slices", "scale", "shape", "center", "num_global", "quantiles")
        return {**{name: getattr(self, name) for name in names}, "seed": self._shown_seed()}

    def _request(self) -> Request:
        one = _options.sketch_request("wasserstein", self.quantiles, 17, 3.0, self.impl)
        return Request(
            variance="squared",
            center=True,
            sketch=one.sketch,
            quantiles=one.quantiles,
            impl=one.impl,
        )

    def terms(self, *views: Embeddings, directions: Tensor | None = None) -> VISRegTerms:
        """The terms, without their weights; each can be differentiated."""
        tensors, request = self._float_views(views, "VISRegLoss", self._request())
        request = _options.with_invariance(request, "center", self.num_global, tensors)
        _checks.warn_of_unit_norm("VISRegLoss", tensors)
        w = self.directions_for(tensors, directions)
        invariance, scale, center, shape = _ops.regularizers(request, tensors, w)
        return VISRegTerms(invariance, scale, shape, center)

    def total(self, terms: VISRegTerms) -> Tensor:
        """The weighted sum of ``terms``: what ``forward`` returns."""
        weight = self.weight
        regularizers = (weight * self.scale, weight * self.shape, weight * self.center)
        return _weighted(terms, (1 - weight, *regularizers))

    def forward(self, *views: Embeddings, directions: Tensor | None = None) -> Tensor:
        return self.total(self.terms(*views, directions=directions))


class LeJEPALoss(SlicedLoss):
    """LeJEPA: ``(1 - weight) invariance + weight sketch`` with SIGReg as the sketch.

    LeJEPA (Balestriero and LeCun, 2025, arXiv:2511.08544): invariance to the mean of the views,
    and the Epps-Pulley statistic of projections against N(0, 1), the mean over views.

    Args:
        weight: lambda, from 0 to 1.
        num_slices: K.
        num_global: how many views form the centre of the invariance; ``None`` for all.
        knots: number of points of the statistic's sum.
        t_max: the last of them.
        seed: which sequence of slices.
        **common: ``gather_distributed``, ``process_group``, ``reduction``, ``impl``.

    ``forward(*views, directions=None)``: ``directions`` (D, K) replace the drawn ones. Dtypes,
    errors and gradients: see :mod:`vicreg_losses.functional`.
    """

    def __init__(
        self,
        weight: float = 0.05,
        num_slices: int = 1024,
        num_global: int | None = None,
        knots: int = 17,
        t_max: float = 3.0,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(num_slices, seed, **common)
        _checks.fraction("weight", weight)
        _options.invariance_options("center", num_global, "auto")
        self.weight, self.num_global, self.knots, self.t_max = weight, num_global, knots, t_max
        self._request()

    def options(self) -> dict[str, Any]:
        names = ("weight", "num_slices", "num_global", "knots", "t_max")
        return {**{name: getattr(self, name) for name in names}, "seed": self._shown_seed()}

    def _request(self) -> Request:
        return _options.sketch_request("epps_pulley", "paper", self.knots, self.t_max, self.impl)

    def terms(self, *views: Embeddings, directions: Tensor | None = None) -> LeJEPATerms:
        """The terms, without their weights; each can be differentiated."""
        tensors, request = self._float_views(views, "LeJEPALoss", self._request())
        request = _options.with_invariance(request, "center", self.num_global, tensors)
        _checks.warn_of_unit_norm("LeJEPALoss", tensors)
        w = self.directions_for(tensors, directions)
        return LeJEPATerms(*_ops.regularizers(request, tensors, w))

    def total(self, terms: LeJEPATerms) -> Tensor:
        """The weighted sum of ``terms``: what ``forward`` returns."""
        return _weighted(terms, (1 - self.weight, self.weight))

    def forward(self, *views: Embeddings, directions: Tensor | None = None) -> Tensor:
        return self.total(self.terms(*views, directions=directions))
