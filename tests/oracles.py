"""Textbook formulas for every loss, in plain PyTorch, differentiated by autograd.

These are the truth the library is tested against, so they are written from the published
definitions (arXiv 2105.04906, 2606.02572, 2511.08544), one line of mathematics per line of code,
and share nothing with the library. They follow the dtype of their input: float64 gives the truth,
float32 gives "what plain PyTorch itself gets wrong", the yardstick for the float32 tests.

Embeddings `z` are (V, N, D): V views, N samples, D dimensions. Directions are (D, K), unit columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
NORMAL = NormalDist()


def mean_over_views(term: Loss, z: Tensor) -> Tensor:
    """Averages a term of one (N, D) view over the views of (V, N, D)."""
    return torch.stack([term(view) for view in z]).mean()


def invariance(z: Tensor, form: str = "pairwise", num_global: int | None = None) -> Tensor:
    """Mean squared distance between pairs of views, or to the mean of the first `num_global`."""
    if form == "pairwise":
        pairs = list(combinations(range(len(z)), 2))
        return torch.stack([(z[a] - z[b]).square().mean() for a, b in pairs]).mean()
    center = z[:num_global].mean(0)
    return torch.stack([(view - center).square().mean() for view in z]).mean()


def variance(z: Tensor, gamma: float = 1.0, eps: float = 1e-4, form: str = "hinge") -> Tensor:
    """VICReg's hinge on the unbiased, or VISReg's square on the biased standard deviation.

    `Tensor.std` differentiates to 0, not NaN, where a column is constant: the published convention.
    """

    def hinge(view: Tensor) -> Tensor:
        return torch.relu(gamma - torch.sqrt(view.var(0, correction=1) + eps)).mean()

    def squared(view: Tensor) -> Tensor:
        return (1 - (view.std(0, correction=0) + 1e-6)).square().mean()

    return mean_over_views({"hinge": hinge, "squared": squared}[form], z)


def center(z: Tensor) -> Tensor:
    """Mean squared column mean."""
    return mean_over_views(lambda view: view.mean(0).square().mean(), z)


def covariance(z: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances, divided by D."""

    def one_view(view: Tensor) -> Tensor:
        n, d = view.shape
        centered = view - view.mean(0)
        matrix = centered.T @ centered / (n - 1)
        diagonal = torch.eye(d, dtype=torch.bool)
        return matrix.masked_fill(diagonal, 0).square().sum() / d

    return mean_over_views(one_view, z)


def normal_quantiles(n: int, rule: str = "paper") -> Tensor:
    """The N target values, float64: Phi^-1(i / (N+1)), or the mean of each of N equal bins."""
    if rule == "paper":
        targets = [NORMAL.inv_cdf(i / (n + 1)) for i in range(1, n + 1)]
    else:
        edge_density = [0.0, *(NORMAL.pdf(NORMAL.inv_cdf(i / n)) for i in range(1, n)), 0.0]
        targets = [n * (edge_density[i] - edge_density[i + 1]) for i in range(n)]
    return torch.tensor(targets, dtype=torch.float64)


def standardized_projections(view: Tensor, directions: Tensor) -> Tensor:
    """(N, K) projections of one view, centred and divided by its detached biased deviation."""
    sigma = view.std(0, correction=0).detach()
    return ((view - view.mean(0)) / (sigma + 1e-6)) @ directions.to(view.dtype)


def sliced_wasserstein(z: Tensor, directions: Tensor, quantiles: str = "paper") -> Tensor:
    """Mean squared distance of sorted standardised projections from normal quantiles."""
    targets = normal_quantiles(z.shape[1], quantiles).to(z.dtype)[:, None]

    def one_view(view: Tensor) -> Tensor:
        projections = standardized_projections(view, directions)
        return (projections.sort(dim=0).values - targets).square().mean()

    return mean_over_views(one_view, z)


def epps_pulley(z: Tensor, directions: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """N times the weighted distance of characteristic functions to N(0, 1)'s, mean over slices."""
    t = torch.linspace(0, t_max, knots, dtype=torch.float64)
    step = t_max / (knots - 1)
    weights = torch.tensor([step] + [2 * step] * (knots - 2) + [step], dtype=torch.float64)
    normal = torch.exp(-t.square() / 2)
    t, weights, normal = (constant.to(z.dtype) for constant in (t, weights * normal, normal))

    def one_view(view: Tensor) -> Tensor:
        angles = (view @ directions.to(view.dtype))[:, :, None] * t  # (N, K, knots)
        real, imaginary = angles.cos().mean(0), angles.sin().mean(0)
        distance = (real - normal).square() + imaginary.square()
        return len(view) * (distance * weights).sum(-1).mean()

    return mean_over_views(one_view, z)


def vicreg(
    z: Tensor, weights: tuple[float, float, float] = (25.0, 25.0, 1.0), **hinge: float
) -> Tensor:
    """VICReg as its code has it: mean variance, but summed covariance, over the views."""
    parts = invariance(z), variance(z, **hinge), len(z) * covariance(z)
    return weights[0] * parts[0] + weights[1] * parts[1] + weights[2] * parts[2]


def visreg(
    z: Tensor,
    directions: Tensor,
    weight: float = 0.9,
    parts: tuple[float, float, float] = (1.0, 1.0, 1.0),
    num_global: int | None = None,
) -> Tensor:
    """VISReg: invariance against the weighted sum of scale, shape and centre."""
    scale, shape, mean = variance(z, form="squared"), sliced_wasserstein(z, directions), center(z)
    regularizer = parts[0] * scale + parts[1] * shape + parts[2] * mean
    return (1 - weight) * invariance(z, "center", num_global) + weight * regularizer


def lejepa(
    z: Tensor, directions: Tensor, weight: float = 0.05, num_global: int | None = None
) -> Tensor:
    """LeJEPA: invariance against SIGReg."""
    return (1 - weight) * invariance(z, "center", num_global) + weight * epps_pulley(z, directions)


def value_and_grad(loss: Loss, z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of a scalar loss at `z`, which keeps its dtype, strides and contents."""
    leaf = z.detach().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def truth(loss: Loss, z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64, whatever the dtype of `z`."""
    return value_and_grad(loss, z.double())


def error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Norm-wise relative error in float64; NaN and inf in `actual` never pass a comparison.

    Args:
        actual: What was computed.
        expected: The truth, same shape.
        floor: Compared with instead of the norm of the truth when that is smaller, for quantities
            that vanish in exact arithmetic (the covariance of one dimension).
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).norm().item()
    scale = max(expected.double().norm().item(), floor)
    if math.isnan(difference):
        return math.inf
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def float32_errors(loss: Loss, z: Tensor) -> tuple[float, float]:
    """Relative error of the value and gradient of plain PyTorch's float32 at a float32 `z`.

    Rounding errors partly cancel by luck, most visibly in a single value, and that luck depends on
    the order of the rows, which the loss does not: the largest error over four orders is the
    yardstick.
    """
    value, gradient = truth(loss, z)
    errors = []
    for shift in (0, 1, len(z[0]) // 3, len(z[0]) // 2):
        plain_value, plain_gradient = value_and_grad(loss, z.roll(shift, dims=1))
        errors.append((error(plain_value, value), error(plain_gradient.roll(-shift, 1), gradient)))
    return max(e for e, _ in errors), max(e for _, e in errors)


def rank_gap(z: Tensor, directions: Tensor) -> float:
    """Smallest distance between neighbours in the sorted projections, in units of their spread.

    Below the rounding error of the projections the ranks, and with them the Wasserstein gradient,
    are not decided by the data.
    """
    gaps = [
        standardized_projections(view, directions.double()).sort(dim=0).values.diff(dim=0).min()
        for view in z.double()
    ]
    return min(gap.item() for gap in gaps)


def unit_directions(d: int, k: int, seed: int = 0) -> Tensor:
    """(D, K) float32 Gaussian columns of length 1."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    directions = torch.randn(d, k, generator=generator, dtype=torch.float64)
    return (directions / directions.norm(dim=0)).float()


def embeddings(v: int, n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(V, N, D) correlated views of the same samples, columns of different mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(v + 2, n, d, generator=generator, dtype=torch.float64)
    spread = torch.linspace(0.4, 1.4, d, dtype=torch.float64)
    shared = normal[0] + 0.5 * normal[0].mean(1, keepdim=True)
    z = spread * (shared + 0.5 * normal[2:]) + 0.3 * normal[1, :1]
    return z.to(dtype)


@dataclass(frozen=True)
class Term:
    """A public function with the options under test, and the formula it must agree with.

    Attributes:
        name: Test identifier.
        function: Name in `vicreg_losses.functional`.
        formula: The oracle, called with the embeddings (and directions for a sketch).
        options: Keywords given to the public function.
        formula_options: Keywords given to the formula.
        sketch: Whether directions are needed.
        min_views: Fewest views for which the term is defined.
    """

    name: str
    function: str
    formula: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    formula_options: dict[str, Any] = field(default_factory=dict)
    sketch: bool = False
    min_views: int = 1

    def __str__(self) -> str:
        return self.name

    def oracle(self, num_slices: int = 13) -> Loss:
        """The formula as a function of the embeddings alone."""
        if not self.sketch:
            return lambda z: self.formula(z, **self.formula_options)
        return lambda z: self.formula(
            z, unit_directions(z.shape[-1], num_slices), **self.formula_options
        )

    def library(self, functional: Any, num_slices: int = 13, **more: Any) -> Loss:
        """The public function as a function of the embeddings alone, along the same directions."""
        function, options = getattr(functional, self.function), {**self.options, **more}
        if not self.sketch:
            return lambda z: function(z, **options)

        def loss(z: Tensor) -> Tensor:
            directions = unit_directions(z.shape[-1], num_slices).to(z.device)
            wide = directions.double() if z.dtype == torch.float64 else directions
            return function(z, directions=wide, **options)

        return loss


def term(name: str, function: str, formula: Callable[..., Tensor], **options: Any) -> Term:
    """A term whose public keywords and formula keywords are the same."""
    fixed = {"sketch": options.pop("sketch", False), "min_views": options.pop("min_views", 1)}
    return Term(name, function, formula, options, dict(options), **fixed)


def covariance_term(strategy: str) -> Term:
    """Covariance by one strategy; the formula knows no strategies."""
    return Term(f"covariance-{strategy}", "covariance_loss", covariance, {"strategy": strategy})


def sketch_term(name: str, statistic: str, **options: Any) -> Term:
    """A sliced sketch; `statistic` chooses the formula."""
    formula = {"wasserstein": sliced_wasserstein, "epps_pulley": epps_pulley}[statistic]
    public = {"statistic": statistic, **options}
    return Term(name, "sliced_sketch_loss", formula, public, options, sketch=True)


# One of each: what the dtype, stride and scale tests run over.
TERMS = [
    term("invariance-pairwise", "invariance_loss", invariance, form="pairwise", min_views=2),
    term("invariance-center", "invariance_loss", invariance, form="center"),
    term("variance-hinge", "variance_loss", variance, form="hinge"),
    term("variance-squared", "variance_loss", variance, form="squared"),
    term("center", "center_loss", center),
    covariance_term("auto"),
    sketch_term("wasserstein", "wasserstein"),
    sketch_term("epps_pulley", "epps_pulley"),
]

# Every option: what the float64 tests run over.
ALL_TERMS = [
    *TERMS,
    term("invariance-1global", "invariance_loss", invariance, form="center", num_global=1),
    term(
        "invariance-2global",
        "invariance_loss",
        invariance,
        form="center",
        num_global=2,
        min_views=2,
    ),
    term("hinge-gamma0.7", "variance_loss", variance, gamma=0.7),
    term("hinge-gamma2-eps1e-2", "variance_loss", variance, gamma=2.0, eps=1e-2),
    covariance_term("gram"),
    covariance_term("feature"),
    sketch_term("wasserstein-exact", "wasserstein", quantiles="exact"),
    sketch_term("epps_pulley-2knots", "epps_pulley", knots=2, t_max=1.0),
    sketch_term("epps_pulley-9knots-5", "epps_pulley", knots=9, t_max=5.0),
    sketch_term("epps_pulley-34knots-2.5", "epps_pulley", knots=34, t_max=2.5),
]
