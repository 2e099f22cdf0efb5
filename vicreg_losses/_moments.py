"""Mean and variance of the global batch, merged from those of the ranks.

A rank's mean is a pair (high, low) of numbers of its dtype: a rounded mean loses the variance at a
large offset. The global mean is a pair too, an origin that all ranks have exactly and a shift from
it (after Chan, Golub and LeVeque, 1983).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._collectives import Ranks, all_gather, all_reduce_
from ._torch import squared_sums, wide

# Most numbers that one all-gather may bring; more ranks or dimensions take two all-reduces.
_GATHERED = 1 << 19


class Moments(NamedTuple):
    """Of the samples of all ranks.

    Attributes:
        total: N, 0-dim, of the wide dtype.
        origin: some point near the mean, (V, 1, D).
        shift: the mean less the origin, (V, 1, D).
        squares: sums over samples of the squared deviations, (V, 1, D).
    """

    total: Tensor
    origin: Tensor
    shift: Tensor
    squares: Tensor

    def center(self, z: Tensor) -> Tensor:
        """Subtract the mean."""
        return (z - self.origin).sub_(self.shift)

    def mean(self) -> Tensor:
        return self.origin + self.shift


def _local_mean(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations from the mean of this rank, (V, N, D); its high and low part, (V, 1, D)."""
    if z.shape[1] == 0:
        none = z.new_zeros(z.shape[0], 1, z.shape[2])
        return z, none, none
    high = z.mean(1, keepdim=True)
    rest = z - high
    low = rest.mean(1, keepdim=True)
    return rest.sub_(low), high, low


def own_row(z: Tensor, squares: bool = True) -> tuple[Tensor, Tensor]:
    """What a rank says of its samples, flat: N, high, low and, if asked, the sums of squares.

    And the deviations from its own mean.
    """
    rest, high, low = _local_mean(z)
    parts = [high.new_full((1,), z.shape[1]), high.flatten(), low.flatten()]
    if squares:
        parts.append(squared_sums(rest).flatten())
    return torch.cat(parts), rest


def row_length(shape: tuple[int, int, int], squares: bool = True) -> int:
    """Length of :func:`own_row`."""
    return 1 + (3 if squares else 2) * shape[0] * shape[2]


def merge(rows: Tensor, shape: tuple[int, int, int]) -> tuple[Moments, Tensor]:
    """Moments from the rows of all ranks, (W, length); without squares, of the means alone.

    Returns:
        The moments, and the deviations of the ranks' means from the global one, each times the
        root of its count, (V, W, D).
    """
    views, _, dimensions = shape
    count = rows[:, 0].to(wide(rows))
    parts = rows[:, 1:].view(len(rows), -1, views, 1, dimensions)
    high, low = parts[:, 0], parts[:, 1]
    someone = (count > 0).int().argmax().view(1)  # any rank with samples
    origin = high.index_select(0, someone)[0]
    mean = (high.to(count.dtype) - origin).add_(low)
    weight, total = count.view(-1, 1, 1, 1), count.sum()
    shift = (weight * mean).sum(0) / total
    spread = (mean - shift).mul_(weight.sqrt())
    squares = spread.square().sum(0)
    if parts.shape[1] == 3:
        squares += parts[:, 2].sum(0, dtype=squares.dtype)
    dtype = rows.dtype
    moments = Moments(total, origin, shift.to(dtype), squares.to(dtype))
    return moments, spread[:, :, 0].transpose(0, 1).to(dtype)


def is_gathered(ranks: int, shape: tuple[int, int, int]) -> bool:
    """Whether one all-gather serves for the moments."""
    return ranks * row_length(shape) <= _GATHERED


def global_moments(z: Tensor, ranks: Ranks) -> Moments:
    """By one all-gather, or by two all-reduces about a common origin.

    Args:
        z: the samples of this rank, (V, N, D).
        ranks: which.
    """
    shape = z.shape[0], z.shape[1], z.shape[2]
    if is_gathered(ranks.size, shape):
        return merge(all_gather(own_row(z)[0], ranks.group), shape)[0]
    long = wide(z)
    row = shape[0], 1, shape[2]
    count = torch.full((1,), shape[1], dtype=long, device=z.device)
    sums = torch.cat([count, z.sum(1, dtype=long).flatten()])
    all_reduce_(sums, ranks.group)
    total = sums[0]
    origin = (sums[1:] / total).to(z.dtype).view(row)
    rest = z - origin
    sums = torch.cat(
        [rest.sum(1, dtype=long).flatten(), rest.square().sum(1, dtype=long).flatten()]
    )
    all_reduce_(sums, ranks.group)
    shift, squares = sums.view(2, *row).unbind(0)
    shift = shift / total
    squares = (squares - total * shift.square()).clamp_(min=0)
    return Moments(total, origin, shift.to(z.dtype), squares.to(z.dtype))
