"""The published formulas as a trainer would write them, differentiated by autograd.

Written from the papers: VICReg (arXiv:2105.04906), VISReg (arXiv:2606.02572) and LeJEPA
(arXiv:2511.08544). Embeddings are (V, N, D); terms are means over views.
"""

from itertools import combinations

import torch
from torch import Tensor


def variance(z: Tensor) -> Tensor:
    return torch.relu(1 - torch.sqrt(z.var(dim=-2) + 1e-4)).mean()


def covariance(z: Tensor) -> Tensor:
    total = z.new_zeros(())
    for x in z.unbind(0):
        samples, dimensions = x.shape
        x = x - x.mean(0)
        c = (x.T @ x) / (samples - 1)
        total = total + off_diagonal(c).pow(2).sum() / dimensions
    return total / z.shape[0]


def off_diagonal(c: Tensor) -> Tensor:
    n = c.shape[0]
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def vicreg(z: Tensor) -> Tensor:
    invariance = torch.nn.functional.mse_loss(z[0], z[1])
    return 25 * invariance + 25 * variance(z) + z.shape[0] * covariance(z)


def vicreg_of_views(*views: Tensor) -> Tensor:
    """VICReg of two or more views, each (N, D): the mean of their pairs, and no copy of them."""
    pairs = list(combinations(views, 2))
    invariance = sum(torch.nn.functional.mse_loss(a, b) for a, b in pairs) / len(pairs)
    spread = sum(variance(view) for view in views) / len(views)
    return 25 * invariance + 25 * spread + sum(covariance(view[None]) for view in views)


def unit_directions(dimensions: int, slices: int) -> Tensor:
    w = torch.randn(dimensions, slices)
    return w / w.norm(dim=0, keepdim=True)


def visreg_terms(z: Tensor, slices: int) -> Tensor:
    """Scale, shape and centre, with slices drawn at every call."""
    return visreg(z, unit_directions(z.shape[2], slices))


def visreg(z: Tensor, directions: Tensor) -> Tensor:
    """Scale, shape and centre, along given directions."""
    centered = z - z.mean(1, keepdim=True)
    sigma = _deviation(centered)
    shape = _distance(centered / sigma.detach(), directions)
    return (1 - sigma).square().mean() + shape + z.mean(1).square().mean()


def visreg_loss(
    z: Tensor, directions: Tensor, weight: float = 0.9, num_global: int | None = None
) -> Tensor:
    """All of VISReg, along given directions; the views are drawn to the mean of the global ones."""
    invariance = (z - z[:num_global].mean(0)).square().mean()
    return (1 - weight) * invariance + weight * visreg(z, directions)


def sliced_wasserstein(z: Tensor, directions: Tensor) -> Tensor:
    """The shape term of VISReg alone."""
    centered = z - z.mean(1, keepdim=True)
    return _distance(centered / _deviation(centered.detach()), directions)


def _deviation(centered: Tensor) -> Tensor:
    return centered.norm(dim=1, keepdim=True) / centered.shape[1] ** 0.5 + 1e-6


def _distance(x: Tensor, directions: Tensor) -> Tensor:
    samples = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    levels = torch.arange(1, samples + 1, dtype=dtype, device=x.device) / (samples + 1)
    targets = 2**0.5 * torch.erfinv(2 * levels - 1)
    sorted_projections = (x @ directions).sort(dim=1).values
    return (sorted_projections - targets[:, None]).square().mean()


def sigreg(z: Tensor, slices: int, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """Epps-Pulley statistic, with slices drawn at every call."""
    return epps_pulley(z, unit_directions(z.shape[2], slices), knots, t_max)


def epps_pulley(z: Tensor, directions: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """Epps-Pulley statistic, along given directions."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    t = torch.linspace(0, t_max, knots, dtype=dtype, device=z.device)
    weights = torch.full_like(t, 2 * t_max / (knots - 1))
    weights[0] /= 2
    weights[-1] /= 2
    target = torch.exp(-t.square() / 2)
    phase = (z @ directions).unsqueeze(-1) * t
    error = (phase.cos().mean(1) - target).square() + phase.sin().mean(1).square()
    return (error @ (weights * target) * z.shape[1]).mean()
