"""The covariance term over several ranks: value and gradient for the samples of this one.

- "gram": all samples are sent to all ranks once; each computes its rows of the Gram matrix, and so
  its part of the energy and its own gradient.
- "feature": the D x D products of the ranks are added up, half of each; where the ranks are few
  for the dimensions, in one message with their means.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ._collectives import Ranks, all_reduce_
from ._moments import Moments, global_moments, merge, own_row, row_length
from ._sharded_sketch import Gathered
from ._torch import CHUNK, energy, wide


class Product(NamedTuple):
    """Sum of squares of products of centred samples, and a quarter of its gradient.

    Attributes:
        energy: over all views, 0-dim, of the wide dtype.
        gradient: (V, N, D), if it is needed.
    """

    energy: Tensor
    gradient: Tensor | None


def gram_rows(z: Tensor, gathered: Gathered, keep: bool, wider: bool = False) -> Product:
    """This rank's rows of the Gram matrix, with their diagonal part: some columns at a time.

    Args:
        z: the samples of this rank, (V, N, D).
        gathered: those of all.
        keep: whether the gradient is needed.
        wider: whether to compute in float64.
    """
    size, views, capacity, dimensions = gathered.samples.shape
    x = gathered.moments.center(z)
    x = x.double() if wider else x
    gradient = torch.zeros_like(x) if keep else None
    total = torch.zeros((), dtype=wide(z), device=z.device)
    ranks = max(1, CHUNK // (views * capacity * dimensions))
    for begin in range(0, size, ranks):
        columns = gathered.centered(begin, min(begin + ranks, size)).to(x.dtype)
        inner = torch.bmm(x, columns.mT)
        total += energy(inner)
        if gradient is not None:
            gradient.baddbmm_(inner, columns)
        del inner, columns  # before the next ones are made
    return Product(total, gradient)


def add_products(
    z: Tensor, extra: list[Tensor], ranks: Ranks, keep: bool
) -> tuple[Moments, Product, list[Tensor]]:
    """The D x D products of all ranks, without their diagonal.

    With S_r the product of a rank about its own mean, and d_r that mean less the global one:
    ``S = sum_r S_r + n_r d_r d_r^T``; so means and products can go in one message.

    Args:
        z: the samples of this rank, (V, N, D).
        extra: 0-dim numbers to add up in the same message.
        ranks: which.
        keep: whether the gradient is needed.

    Returns:
        The moments; the product; the sums of ``extra``.
    """
    views, _, dimensions = shape = z.shape[0], z.shape[1], z.shape[2]
    numbers = [x.to(z.dtype).view(1) for x in extra]
    spread = None
    if is_one_message(ranks.size, dimensions):
        rows = z.new_zeros(ranks.size, row_length(shape, squares=False))
        rows[ranks.rank], x = own_row(z, squares=False)
        parts = [*_block_products(x), rows.view(-1), *numbers]
    else:
        moments = global_moments(z, ranks)
        x = moments.center(z)
        rows = z.new_empty(0)
        parts = [*_block_products(x), *numbers]
    heard = torch.cat(parts)
    del parts
    all_reduce_(heard, ranks.group)
    sums = heard[len(heard) - len(extra) :]
    heard = heard[: len(heard) - len(extra)]
    if rows.numel():
        means = heard[len(heard) - rows.numel() :].view(rows.shape)
        moments, spread = merge(means, shape)
    product, place = z.new_empty(views, dimensions, dimensions), 0
    for begin, end in _edges(dimensions):
        length = views * (end - begin) * (dimensions - begin)
        block = heard[place : place + length].view(views, end - begin, -1)
        place += length
        if spread is not None:
            block = torch.baddbmm(block, spread[:, :, begin:end].mT, spread[:, :, begin:])
        product[:, begin:end, begin:] = block
        product[:, begin:, begin:end] = block.mT
    diagonal = product.diagonal(dim1=1, dim2=2)
    moments = moments._replace(squares=diagonal.clone().unsqueeze(1))
    diagonal.zero_()
    gradient = torch.bmm(moments.center(z), product) if keep else None
    return moments, Product(energy(product), gradient), list(sums.unbind())


def is_one_message(ranks: int, dimensions: int) -> bool:
    """Whether the means of all ranks are a small part beside the products."""
    return 32 * ranks <= dimensions


def _edges(dimensions: int) -> list[tuple[int, int]]:
    """Rows of a symmetric matrix in blocks, of which the part from the diagonal on is sent."""
    blocks = max(1, min(16, dimensions // 64))
    edges = [dimensions * i // blocks for i in range(blocks + 1)]
    return list(itertools.pairwise(edges))


def _block_products(x: Tensor) -> list[Tensor]:
    return [
        torch.bmm(x[:, :, begin:end].mT, x[:, :, begin:]).flatten()
        for begin, end in _edges(x.shape[2])
    ]


def block_length(dimensions: int) -> int:
    """How many numbers of a symmetric matrix are sent."""
    return sum((end - begin) * (dimensions - begin) for begin, end in _edges(dimensions))
