"""Random directions: i.i.d. Gaussian columns normalised to length 1."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from ._parallel import for_each_block

# The multipliers of the splitmix64 generator, as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_BITS = (1 << 64) - 1
# Numbers that one generator of the CPU draws: about a millisecond.
_DRAWN = 1 << 18

_Word = TypeVar("_Word", int, Tensor)


def draw_directions(seed: Tensor, step: Tensor, dimensions: int, slices: int) -> Tensor:
    """Directions of one step of one sequence, (D, K), float32, on the device of ``seed``.

    The same numbers at every call with the same arguments on one kind of device; the global
    generators are neither read nor advanced. Off the CPU no value comes back to the host, so the
    draw can be captured in a CUDA graph and changes at every replay.

    Args:
        seed: which sequence; 0-dim, int64.
        step: the position in it; 0-dim, int64.
        dimensions: D.
        slices: K.
    """
    if seed.device.type == "cpu":
        rows = _generated_normal(_key(int(seed), int(step)), dimensions, slices)
    else:
        rows = counter_normal(_key(seed, step), dimensions, slices)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    lost = norms == 0  # one number in 2^24 is 0, and a slice of one dimension has but one
    rows[:, :1] += lost
    rows /= norms + lost
    return rows.T


def _generated_normal(key: int, dimensions: int, slices: int) -> Tensor:
    """Standard normal numbers (K, D), float32, from the CPU's generator.

    It is serial, so some slices at a time have one of their own, whatever the number of threads.
    """
    rows = torch.empty(slices, dimensions, dtype=torch.float32, device="cpu")

    def work(begin: int, end: int) -> None:
        seed = _scramble(key + begin) if begin else key & _BITS
        generator = torch.Generator("cpu").manual_seed(seed)
        rows[begin:end].normal_(generator=generator)

    for_each_block(lambda: work, slices, max(1, _DRAWN // dimensions))
    return rows


def counter_normal(key: Tensor, dimensions: int, slices: int) -> Tensor:
    """Standard normal numbers (K, D), float32, each a function of (key, slice, dimension) alone."""
    slice_index = torch.arange(slices, device=key.device)[:, None] << 32
    pair_index = torch.arange((dimensions + 1) // 2, device=key.device)
    bits = _scramble(_scramble(slice_index + pair_index + key) + key)
    first = ((bits >> 32) & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32)
    first.clamp_(max=1 - 2.0**-24)  # never a radius of 0
    second = (bits & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
    radius = first.log_().mul_(-2).sqrt_()  # Box and Muller, 1958
    return torch.cat((radius * second.cos(), radius * second.sin()), 1)[:, :dimensions]


def seed_of_rank(seed: Tensor, rank: int) -> Tensor:
    """A seed of its own for each rank but the first."""
    return _scramble(_scramble(seed) + rank)


def _key(seed: _Word, step: _Word) -> _Word:
    return _scramble(_scramble(seed) + step)


def _scramble(x: _Word) -> _Word:
    """splitmix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words, as ints or tensors."""
    x = _wrap(x + _GOLDEN)
    x = _wrap((x ^ (x >> 30 & 0x3FFFFFFFF)) * _FIRST)
    x = _wrap((x ^ (x >> 27 & 0x1FFFFFFFFF)) * _SECOND)
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def _wrap(x: _Word) -> _Word:
    return x & _BITS if isinstance(x, int) else x  # tensors wrap around by themselves
