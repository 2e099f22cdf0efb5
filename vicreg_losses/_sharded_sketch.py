"""The sliced sketch over several ranks.

- Wasserstein, slices sent: each rank projects its samples and sends the projections of slices to
  the rank that sorts those, which sends the residuals back. What it sends is independent of W.
- Samples sent: each rank has all samples and some slices, and sends back a part of everybody's
  gradient. Where the slices outnumber ranks times dimensions, or are each rank's own.
- Epps-Pulley: the sums of the harmonics are added up.

None but the last message of a kind depends on whether a gradient is wanted.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._collectives import Ranks, all_gather, all_reduce_, all_to_all
from ._epps_pulley import combine_waves_, epps_pulley_from_means, wave_sums
from ._moments import Moments, merge, own_row
from ._request import Request
from ._sort import sort_residual_
from ._torch import wide

# In place of a projection where there is no sample, and its target: sorted behind all others, which
# are at most sqrt(N D), with a residual of exactly 0.
PADDING = 2.0**100


class Gathered(NamedTuple):
    """The samples of all ranks.

    Attributes:
        samples: (W, V, capacity, D), of the dtype in which they were sent, 0 where there is none.
        counts: how many of each rank there are, (W,).
        moments: of all of them.
    """

    samples: Tensor
    counts: Tensor
    moments: Moments

    def is_sample(self) -> Tensor:
        """Which of them are there, (W, capacity)."""
        places = torch.arange(self.samples.shape[2], device=self.counts.device)
        return places < self.counts[:, None]

    def centered(self, begin: int, end: int) -> Tensor:
        """Samples of some ranks less the mean, (V, ranks * capacity, D), 0 where there is none."""
        moments = self.moments
        some = self.samples[begin:end].transpose(0, 1)  # (V, ranks, capacity, D)
        x = torch.empty_like(
            some, dtype=moments.origin.dtype, memory_format=torch.contiguous_format
        )
        torch.sub(some, moments.origin[:, None], out=x)
        x.sub_(moments.shift[:, None]).mul_(self.is_sample()[begin:end, :, None])
        return x.flatten(1, 2)


def gather(z: Tensor, request: Request, ranks: Ranks) -> Gathered:
    """Send all samples to all ranks, in one message with what the moments are merged from.

    Args:
        z: the samples of this rank, (V, N, D).
        request: names the dtype that holds them exactly.
        ranks: which.
    """
    views, samples, dimensions = shape = z.shape[0], z.shape[1], z.shape[2]
    dtype = wire_dtype(request, z)
    row = own_row(z)[0]
    size = views * ranks.capacity * dimensions * dtype.itemsize
    length = -(-size // 8) * 8  # a view of another dtype begins at a multiple of it
    message = row.new_zeros(length + row.numel() * row.itemsize, dtype=torch.uint8)
    shape_sent = views, ranks.capacity, dimensions
    message[:size].view(dtype).view(shape_sent)[:, :samples] = z
    message[length:].view(row.dtype).copy_(row)
    heard = all_gather(message, ranks.group)
    rows = heard[:, length:].view(row.dtype)
    there = heard[:, :size].view(dtype).unflatten(1, shape_sent)
    return Gathered(there, rows[:, 0], merge(rows, shape)[0])


def wire_dtype(request: Request, like: Tensor) -> torch.dtype:
    """In which samples are sent."""
    dtype: torch.dtype = getattr(torch, request.wire) if request.wire else like.dtype
    return dtype


def padded_quantiles(count: Tensor, length: int, rule: str, dtype: torch.dtype) -> Tensor:
    """:func:`._torch.quantiles` of a count on the device, then ``PADDING``: (length,)."""
    i = torch.arange(1, length + 1, dtype=count.dtype, device=count.device)
    low = torch.minimum(i, count + 1 - i).clamp_(min=1)  # exactly symmetric about 0
    if rule == "paper":
        q = torch.special.ndtri(low / (count + 1))
    else:
        edges = torch.special.ndtri(torch.stack((low - 1, low)) / count)
        density = torch.exp(-0.5 * edges.square()) / math.sqrt(2 * math.pi)
        q = count * (density[0] - density[1])
    q = q * torch.sign(count + 1 - 2 * i)  # low is the lower half: q < 0
    return torch.where(i <= count, q, PADDING).to(dtype)


def send_slices(
    x: Tensor, directions: Tensor, rule: str, count: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Sum of squared residuals on this rank's slices, and the gradient of the sum of all halves.

    Args:
        x: standardised samples of this rank, (V, N, D).
        directions: of all slices, (D, K).
        rule: of the quantiles.
        count: N of all ranks.
        ranks: which.

    Returns:
        0-dim; (V, N, D).
    """
    views, samples, dimensions = x.shape
    slices, size, capacity = directions.shape[1], ranks.size, ranks.capacity
    mine = -(-slices // size)
    w, flat = directions.T, x.reshape(views * samples, dimensions)
    sent = x.new_full((size * mine, views, capacity), PADDING)
    sent[:slices, :, :samples] = (w @ flat.T).view(slices, views, samples)
    heard = all_to_all(sent.view(size, mine, views, capacity), ranks.group)
    rows = heard.permute(1, 2, 0, 3).contiguous().view(mine, views, size * capacity)
    del sent, heard
    own = rows[: max(0, min(mine, slices - ranks.rank * mine))].view(-1, size * capacity)
    total = x.new_zeros((), dtype=wide(x))
    if own.numel():
        targets = padded_quantiles(count, size * capacity, rule, x.dtype)
        total += sort_residual_(own, targets, True).sum(dtype=total.dtype)
    back = rows.view(mine, views, size, capacity).permute(2, 0, 1, 3)
    residual = all_to_all(back, ranks.group).view(size * mine, views, capacity)
    own_residual = residual[:slices, :, :samples].reshape(slices, views * samples)
    return total, (own_residual.T @ w).view(x.shape)


def send_samples(
    gathered: Gathered,
    directions: Tensor,
    ranks: Ranks,
    sigma: Tensor | None,
    evaluate: Callable[[Tensor], Tensor],
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Sum of a statistic over this rank's slices, and the gradient of that over all slices.

    Args:
        gathered: all samples.
        directions: of this rank's slices, (D, k).
        ranks: which.
        sigma: divides the centred samples, (V, 1, D); ``None`` to take them as they are.
        evaluate: maps projections (rows, W * capacity) to values of rows, and overwrites them by
            their gradient.
        samples: how many of this rank there are.

    Returns:
        0-dim; (V, N, D), of x.
    """
    size, views, capacity, dimensions = gathered.samples.shape
    there = gathered.is_sample().view(-1)
    x = gathered.centered(0, size)
    if sigma is None:
        x = (x + gathered.moments.mean()).mul_(there[:, None])
    else:
        x /= sigma
    w = directions.T
    total = x.new_zeros((), dtype=wide(x))
    if len(w):
        p = torch.bmm(w.expand(views, -1, -1), x.mT)  # (V, k, W * capacity)
        total += evaluate(p.view(-1, size * capacity)).sum(dtype=total.dtype)
        torch.bmm(p.mT, w.expand(views, -1, -1), out=x)
        del p
    else:
        x.zero_()
    sent = x.view(views, size, capacity, dimensions).transpose(0, 1)
    return total, all_to_all(sent, ranks.group).sum(0)[:, :samples]


def add_harmonics(
    z: Tensor, directions: Tensor, table: Tensor, extra: list[Tensor], keep: bool, ranks: Ranks
) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor]]:
    """Epps-Pulley statistic of all ranks' samples.

    Args:
        z: the samples of this rank, (V, N, D).
        directions: of all slices, (D, K).
        table: from :func:`._epps_pulley.knot_table`.
        extra: 0-dim numbers to add up in the same message.
        keep: whether the gradient is needed.
        ranks: which.

    Returns:
        The sum over views and slices, 0-dim; its gradient, (V, N, D); N; the sums of ``extra``.
    """
    views, samples, _ = z.shape
    slices = directions.shape[1]
    w = directions.T.expand(views, -1, -1)
    p = torch.bmm(w, z.mT).flatten(0, 1)  # (V K, N)
    sums = wave_sums(p, table)
    more = torch.stack([x.to(z.dtype) for x in (z.new_full((), samples), *extra)])
    heard = all_reduce_(torch.cat([sums.flatten(), more]), ranks.group)
    count = heard[sums.numel()].to(wide(z))
    means = heard[: sums.numel()].view(sums.shape) / count
    value, coefficients = epps_pulley_from_means(means, table, count)
    slope = None
    if keep:
        combine_waves_(p, table, coefficients)
        slope = torch.bmm(p.view(views, slices, samples).mT, w)
    return value.sum(dtype=count.dtype), slope, count, list(heard[sums.numel() + 1 :].unbind())


def epps_pulley_rows_(p: Tensor, table: Tensor, there: Tensor, count: Tensor) -> Tensor:
    """As :func:`._epps_pulley.epps_pulley_` for rows in which some places hold 0 for no sample."""
    sums = wave_sums(p, table)
    sums[:, : table.shape[1]] -= (~there).sum()  # cos 0
    value, coefficients = epps_pulley_from_means(sums / count, table, count)
    combine_waves_(p, table, coefficients)
    return value


def wasserstein_rows_(p: Tensor, there: Tensor, targets: Tensor) -> Tensor:
    """Sums of squared residuals of rows, which become the residuals; 0 in places of no sample."""
    p.masked_fill_(~there, PADDING)
    return sort_residual_(p, targets, True)
