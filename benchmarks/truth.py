"""Value and gradient of every loss in float64, at any size that the losses are measured at.

By autograd on the definitions, with two changes that are equal in exact arithmetic: D x D products
become N x N ones where those are smaller, and slices are taken a few at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from benchmarks.points import Point

Part = Callable[..., Tensor]
_ELEMENTS = 2**20  # projections that one part of a sketch may have


def value_and_gradients(
    point: Point, views: Sequence[Tensor], directions: Tensor | None, definition: dict[str, Any]
) -> tuple[float, list[Tensor]]:
    """The loss of a point as ``definition`` (of a contender) has it, and its gradients."""
    leaves = [view.detach().double().requires_grad_() for view in views]
    total = 0.0
    for part in _parts(point, directions, **definition):
        value = part(*leaves)
        value.backward()
        total += value.item()
    return total, [leaf.grad if leaf.grad is not None else leaf * 0 for leaf in leaves]


def error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the truth."""
    off = sum((f.double() - t).square().sum() for f, t in zip(found, true, strict=True))
    size = sum(t.square().sum() for t in true)
    return float((off / size).sqrt())


def _parts(
    point: Point, directions: Tensor | None, formula: str = "", **options: float
) -> Iterator[Part]:
    """Terms that add up to the loss."""
    if directions is None:
        yield {
            "variance": lambda *views: _mean(_hinge, views),
            "covariance": lambda *views: _mean(_covariance, views),
            "vicreg": _vicreg,
            "barlow_twins": _barlow_twins,
        }[formula or point.loss]
        return
    if point.loss == "visreg":
        yield lambda *views: _all_but_shape(views, **options)
    count = max(1, _ELEMENTS // (point.samples * point.views))
    for columns in directions.double().split(count, dim=1):
        share = columns.shape[1] / point.slices
        if point.loss == "visreg":
            yield _shape_part(columns, 0.9 * share, **options)
        else:
            yield _epps_pulley_part(columns, share)


def _mean(term: Part, views: Sequence[Tensor]) -> Tensor:
    return torch.stack([term(view) for view in views]).mean()


def _hinge(z: Tensor) -> Tensor:
    return (1 - (z.var(0, correction=1) + 1e-4).sqrt()).clamp(min=0).mean()


def _covariance(z: Tensor) -> Tensor:
    samples, dimensions = z.shape
    x = z - z.mean(0)
    product = x @ x.T if samples < dimensions else x.T @ x
    diagonal = x.square().sum(0)
    off = product.square().sum() - diagonal.square().sum()
    return off / (samples - 1) ** 2 / dimensions


def _invariance(views: Sequence[Tensor]) -> Tensor:
    pairs = combinations(views, 2)
    return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()


def _vicreg(*views: Tensor) -> Tensor:
    covariance = len(views) * _mean(_covariance, views)
    return 25 * _invariance(views) + 25 * _mean(_hinge, views) + covariance


def _barlow_twins(first: Tensor, second: Tensor) -> Tensor:
    samples, dimensions = first.shape
    a, b = (
        (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() / samples**0.5
        for z in (first, second)
    )
    gram = samples < dimensions
    squares = ((a @ a.T) * (b @ b.T)).sum() if gram else (a.T @ b).square().sum()
    diagonal = (a * b).sum(0)
    return (diagonal - 1).square().sum() + 5e-3 * (squares - diagonal.square().sum())


def _all_but_shape(
    views: Sequence[Tensor], scale_eps: float = 1e-6, shape_eps: float = 0.0
) -> Tensor:
    invariance = _mean(lambda z: (z - views[0]).square().mean(), views)
    scale = _mean(lambda z: (1 - z.std(0, correction=0) - scale_eps).square().mean(), views)
    center = _mean(lambda z: z.mean(0).square().mean(), views)
    return 0.1 * invariance + 0.9 * (scale + center)


def _shape_part(
    directions: Tensor, weight: float, shape_eps: float = 1e-6, scale_eps: float = 0.0
) -> Part:
    def one_view(z: Tensor) -> Tensor:
        sigma = z.detach().std(0, correction=0) + shape_eps
        projections = ((z - z.mean(0)) / sigma) @ directions
        ranks = torch.arange(1, len(z) + 1, dtype=z.dtype) / (len(z) + 1)
        targets = torch.special.ndtri(ranks)[:, None]
        return (projections.sort(0).values - targets).square().mean()

    return lambda *views: weight * _mean(one_view, views)


def _epps_pulley_part(directions: Tensor, weight: float) -> Part:
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    target = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * 3 / 16) * target
    weights[[0, -1]] /= 2

    def one_view(z: Tensor) -> Tensor:
        phase = (z @ directions).unsqueeze(-1) * t
        off = (phase.cos().mean(0) - target).square() + phase.sin().mean(0).square()
        return len(z) * (off @ weights).mean()

    return lambda *views: weight * _mean(one_view, views)
