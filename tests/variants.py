"""Published variants of the losses, by their formulas, and data on which they differ.

Written from the papers and from what each code base computes, in plain PyTorch, and sharing nothing
with the library. Embeddings z are (V, N, D), directions w (D, K); every formula takes both.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

GLOBAL_VIEWS = 2
CONFIGURED_BATCH = 150  # larger than any N of the tests: a short last batch


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def hinge(x: Tensor, eps: float = 1e-4, gamma: float = 1.0) -> Tensor:
    return (gamma - (x.var(0) + eps).sqrt()).clamp(min=0).mean()


def off_diagonal_energy(x: Tensor, divisor: float | None = None) -> Tensor:
    x = x - x.mean(0)
    c = x.T @ x / (divisor or len(x) - 1)
    return c.square().sum() - c.diagonal().square().sum()


def cov(x: Tensor, divisor: float | None = None) -> Tensor:
    return off_diagonal_energy(x, divisor) / x.shape[1]


def total(term: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.stack([term(x) for x in z]).sum()


def mean(term: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return total(term, z) / len(z)


def official(z: Tensor, w: Tensor) -> Tensor:
    return 25 * mse(*z) + 25 * (hinge(z[0]) / 2 + hinge(z[1]) / 2) + cov(z[0]) + cov(z[1])


def official_short_batch(z: Tensor, w: Tensor) -> Tensor:
    covariances = [cov(x, CONFIGURED_BATCH - 1) for x in z]
    return 25 * mse(*z) + 25 * mean(hinge, z) + sum(covariances)


def pseudo_code(z: Tensor, w: Tensor) -> Tensor:
    return 25 * mse(*z) + 25 * total(hinge, z) + total(cov, z)


def equation(z: Tensor, w: Tensor) -> Tensor:
    distance = (z[0] - z[1]).square().sum(1).mean()
    return 25 * distance + 25 * total(hinge, z) + total(cov, z)


def vicregl_two_views(z: Tensor, w: Tensor) -> Tensor:
    return 25 * mse(*z) + 25 * mean(hinge, z) + mean(cov, z)


def vicregl_crops(z: Tensor, w: Tensor) -> Tensor:
    """Distances from each global view to every other view, both orders of two global ones."""
    pairs = [(a, b) for a in range(GLOBAL_VIEWS) for b in range(len(z)) if a != b]
    distance = sum(mse(z[a], z[b]) for a, b in pairs) / len(pairs)
    return 25 * distance + 25 * mean(hinge, z) + mean(cov, z)


def vicregl_local(z: Tensor, w: Tensor) -> Tensor:
    """Matched features of two views, (N, P, D): statistics over the batch for each slot."""
    a, b = matched(z)
    slots = [torch.stack([a[:, p], b[:, p]]) for p in range(a.shape[1])]
    return sum(vicregl_two_views(slot, w) for slot in slots) / len(slots)


def matched(z: Tensor) -> tuple[Tensor, Tensor]:
    """Two (N, P, D) out of (V, N, D): V - 1 slots of each."""
    return z[:-1].transpose(0, 1), 0.5 * z[1:].transpose(0, 1)


def jolibrain(z: Tensor, w: Tensor) -> Tensor:
    def variance(x: Tensor) -> Tensor:
        return (1 - x.std(0)).clamp(min=0).mean()

    return 25 * mse(*z) + 15 * mean(variance, z) + mean(cov, z)


def eb_jepa(z: Tensor, w: Tensor) -> Tensor:
    d = z.shape[2]
    return mse(*z) + total(hinge, z) + total(lambda x: off_diagonal_energy(x) / d / (d - 1), z)


def vcreg_one_view(z: Tensor, w: Tensor) -> Tensor:
    return 25 * hinge(z[0]) / 2 + cov(z[0])


def to_centre(z: Tensor, views: int | None = GLOBAL_VIEWS) -> Tensor:
    return torch.stack([mse(x, z[:views].mean(0)) for x in z]).mean()


def scale_term(x: Tensor, eps: float) -> Tensor:
    return (1 - (x - x.mean(0)).square().mean(0).sqrt() - eps).square().mean()


def shape_term(x: Tensor, w: Tensor, eps: float) -> Tensor:
    n = len(x)
    levels = [NormalDist().inv_cdf(i / (n + 1)) for i in range(1, n + 1)]
    q = torch.tensor(levels, dtype=x.dtype)
    sigma = x.detach().std(0, correction=0)
    projections = ((x - x.mean(0)) / (sigma + eps)) @ w
    return (projections.sort(0).values - q[:, None]).square().mean()


def visreg(
    z: Tensor, w: Tensor, weight: float, scale_eps: float, shape_eps: float, views: int | None
) -> Tensor:
    def regularizer(x: Tensor) -> Tensor:
        centre = x.mean(0).square().mean()
        return scale_term(x, scale_eps) + shape_term(x, w, shape_eps) + centre

    return (1 - weight) * to_centre(z, views) + weight * mean(regularizer, z)


def epps_pulley(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """Trapezoid rule over the knots t of all of the line, times N."""
    p = x @ w
    target = torch.exp(-(t**2) / 2)
    error = torch.stack(
        [(torch.exp(1j * tj * p).mean(0) - f).abs() ** 2 for tj, f in zip(t, target, strict=True)]
    )
    integral = torch.trapezoid(error * target[:, None], t, dim=0)
    return len(x) * integral.mean()


def line(t_max: float, knots: int) -> Tensor:
    return torch.linspace(-t_max, t_max, knots, dtype=torch.float64)


FOLDED = line(3, 33)  # 17 knots from 0 to 3, mirrored


def sigreg(z: Tensor, w: Tensor, t: Tensor = FOLDED) -> Tensor:
    return mean(lambda x: epps_pulley(x, w, t), z)


def lejepa(z: Tensor, w: Tensor, weight: float, views: int | None, t: Tensor = FOLDED) -> Tensor:
    return (1 - weight) * to_centre(z, views) + weight * sigreg(z, w, t)


def lejepa_pooled(z: Tensor, w: Tensor) -> Tensor:
    return to_centre(z) + 0.02 * epps_pulley(z.flatten(0, 1), w, FOLDED)


def sample(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Correlated views of different means and spreads, on both sides of 1; directions."""
    v, n, d, k = shape
    generator = torch.Generator().manual_seed(sum(shape))
    base, *noise = torch.randn(v + 1, n, d, generator=generator, dtype=torch.float64)
    z = torch.stack(noise) * 0.4 + base + 0.3 * base.roll(1, 1)
    w = torch.randn(d, k, generator=generator, dtype=torch.float64)
    return z * torch.linspace(0.2, 1.5, d, dtype=torch.float64) + 0.1, w / w.norm(dim=0)


def differentiated(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    distance = ((found - wanted).norm() / wanted.norm()).item()
    return math.inf if math.isnan(distance) else distance
