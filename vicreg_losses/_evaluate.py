"""Values and closed-form gradients of the regularizers: local statistics, then the terms.

No autograd here: :mod:`._ops` makes these two functions differentiable, :mod:`._opaque` makes them
operators for compiled code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import resolve

TERMS = ("variance", "center", "covariance", "sketch")
SIGMA_EPS = 1e-6  # VISReg adds it to the standard deviation, in the scale and in the shape term


class Request(NamedTuple):
    """Which regularizers to evaluate; an empty string or ``False`` leaves a term out."""

    variance: str = ""  # "hinge" | "squared"
    center: bool = False
    covariance: str = ""  # "auto" | "gram" | "feature"
    sketch: str = ""  # "wasserstein" | "epps_pulley"
    gamma: float = 1.0
    eps: float = 1e-4
    quantiles: str = "paper"  # "paper" | "exact"
    knots: int = 17
    t_max: float = 3.0
    impl: str = "auto"

    def terms(self) -> tuple[bool, bool, bool, bool]:
        """Which of ``TERMS`` are asked for."""
        return bool(self.variance), self.center, bool(self.covariance), bool(self.sketch)

    def needs_statistics(self) -> bool:
        """Whether the mean and the variance over samples are needed."""
        return bool(self.variance or self.center or self.covariance) or self.sketch == "wasserstein"

    def needs_mean(self) -> bool:
        """Whether the gradient needs the mean (with a covariance it has the centred samples)."""
        return self.center or bool(self.variance and not self.covariance)


class Residue(NamedTuple):
    """What backward needs, beside the views; ``None`` where the request does not."""

    mean_high: Tensor | None = None  # (V, 1, D)
    mean_low: Tensor | None = None  # (V, 1, D)
    column: Tensor | None = None  # (V, 1, D), variance gradient = centered * column
    squares: Tensor | None = None  # (V, 1, D)
    centered: Tensor | None = None  # (V, N, D)
    inner: Tensor | None = None  # (V, N, N) or (V, D, D)
    sketch: Tensor | None = None  # (V, N, D), the sketch term's gradient


def evaluate(
    request: Request, views: Sequence[Tensor], directions: Tensor | None, keep: bool
) -> list[Tensor]:
    """Values of the terms; with ``keep`` followed by the residue, its ``None`` left out."""
    backend = resolve(request.impl)
    z, ours = batch(views)
    count, samples, dimensions = z.shape
    values: dict[str, Tensor] = {}
    residue: dict[str, Tensor | None] = {}
    if request.sketch == "epps_pulley":
        table = backend.knot_table(request.knots, request.t_max, z)
        values["sketch"], residue["sketch"] = backend.sketch(
            z, directions, lambda p: backend.epps_pulley_(p, table, keep), keep
        )
    if request.needs_statistics():
        centered, high, low = backend.center(z, inplace=ours)
        squares = backend.squared_sums(centered)
        if request.needs_mean():
            residue["mean_high"], residue["mean_low"] = high, low
        if request.variance:
            values["variance"], residue["column"] = _variance(request, squares, samples)
        if request.center:
            values["center"] = (high + low).square().mean()
        if request.covariance:
            energy, residue["inner"] = backend.covariance_energy(
                centered, squares, uses_gram(request, samples, dimensions), keep
            )
            values["covariance"] = energy / (count * dimensions * (samples - 1) ** 2)
            residue["squares"], residue["centered"] = squares, centered
        if request.sketch == "wasserstein":
            sigma = (squares / samples).sqrt_() + SIGMA_EPS
            x = centered / sigma if request.covariance else centered.div_(sigma)
            targets = backend.quantiles(samples, request.quantiles, x)
            values["sketch"], gradient = backend.sketch(
                x, directions, lambda p: backend.wasserstein_(p, targets, keep), keep
            )
            residue["sketch"] = gradient.div_(sigma) if gradient is not None else None
    outputs = [values[name].to(z.dtype) for name in TERMS if name in values]
    if keep:
        outputs += [r for r in Residue(**residue) if r is not None]
    return outputs


def _variance(request: Request, squares: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The variance term and the factor of the centred embeddings in its gradient."""
    elements = squares.numel()
    if request.variance == "hinge":
        std = (squares / (samples - 1)).add_(request.eps).sqrt_()
        value = (request.gamma - std).relu_().mean()
        slope = (-1 / (elements * (samples - 1))) / std
        return value, slope.masked_fill_(std >= request.gamma, 0)
    sigma = (squares / samples).sqrt_()
    excess = sigma + (SIGMA_EPS - 1)
    value = excess.square().mean()
    slope = excess.mul_(2 / (elements * samples)) / sigma
    return value, slope.masked_fill_(sigma == 0, 0)


def gradient(
    request: Request,
    views: Sequence[Tensor],
    values: Sequence[Tensor],
    residues: Sequence[Tensor],
    upstream: Sequence[Tensor],
    asked: Sequence[bool],
) -> Tensor:
    """Gradient of the terms with an upstream gradient: (V, N, D) in the dtype of the values.

    The sum of a product with the Gram matrix or the covariance, of ``centered * column`` (both the
    diagonal of the Gram form and the variance), of a row (the centre) and of the sketch's gradient.
    """
    backend = resolve(request.impl)
    residue = _unpack(request, residues)
    names = [name for name, wanted in zip(TERMS, request.terms(), strict=True) if wanted]
    value_of = {name: v for name, v, there in zip(names, values, asked, strict=True) if there}
    upstream_of = dict(zip(value_of, upstream, strict=True))
    count, samples, dimensions = batch_shape(views)

    def scale(name: str, factor: float = 1.0) -> Tensor:
        return finite_scale(upstream_of[name], value_of[name], factor)

    gradient = column = None
    if "variance" in value_of:
        column = residue.column * scale("variance")
    if "covariance" in value_of:
        gradient, diagonal = backend.covariance_product(
            residue.centered,
            residue.squares,
            residue.inner,
            uses_gram(request, samples, dimensions),
            scale("covariance", 4 / (count * dimensions * (samples - 1) ** 2)),
        )
        if diagonal is not None:
            column = diagonal if column is None else column + diagonal
    if column is not None:
        centered = residue.centered
        if centered is None:
            centered = (batch(views)[0] - residue.mean_high).sub_(residue.mean_low)
            gradient = centered.mul_(column)
        else:
            gradient = centered * column if gradient is None else gradient.addcmul_(centered, column)
    if "center" in value_of:
        row = residue.mean_high + residue.mean_low
        row *= scale("center", 2 / (count * samples * dimensions))
        if gradient is None:
            gradient = row.expand(count, samples, dimensions).contiguous()
        else:
            gradient += row
    if "sketch" in value_of:
        sketch = residue.sketch
        if gradient is None:
            gradient = sketch * scale("sketch")
        else:
            gradient.addcmul_(sketch, scale("sketch"))
    return torch.zeros_like(batch(views)[0]) if gradient is None else gradient


def finite_scale(upstream: Tensor, value: Tensor, factor: float = 1.0) -> Tensor:
    """``factor`` times the upstream gradient, or NaN where the value is not finite.

    A gradient scaler looks at gradients only: finite ones beside a value of inf would be a step.
    """
    return torch.add(value * 0, upstream, alpha=factor)


def uses_gram(request: Request, samples: int, dimensions: int) -> bool:
    return samples < dimensions if request.covariance == "auto" else request.covariance == "gram"


def computing_dtype(views: Sequence[Tensor]) -> torch.dtype:
    """float64 if any view is; else float32, whatever is stored."""
    return torch.float64 if any(view.dtype == torch.float64 for view in views) else torch.float32


def batch(views: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The views as one (V, N, D) tensor of the computing dtype; whether it is a fresh copy."""
    dtype = computing_dtype(views)
    if len(views) > 1:
        return torch.stack([view.to(dtype) for view in views]), True
    z = views[0].to(dtype)
    return (z if z.dim() == 3 else z.unsqueeze(0)), z is not views[0]


def batch_shape(views: Sequence[Tensor]) -> tuple[int, int, int]:
    """(V, N, D)."""
    first = views[0]
    count = first.shape[0] if first.dim() == 3 else len(views)
    return count, first.shape[-2], first.shape[-1]


def kept_fields(request: Request) -> tuple[bool, ...]:
    """Which fields of ``Residue`` a request keeps."""
    mean, covariance = request.needs_mean(), bool(request.covariance)
    variance, sketch = bool(request.variance), bool(request.sketch)
    return mean, mean, variance, covariance, covariance, covariance, sketch


def _unpack(request: Request, residues: Sequence[Tensor]) -> Residue:
    rest = iter(residues)
    return Residue(*(next(rest) if kept else None for kept in kept_fields(request)))


