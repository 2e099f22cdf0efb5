"""The Epps-Pulley statistic of rows and its gradient: sums of harmonics of the projections.

On a CPU each thread takes rows of its own through numpy, without a barrier: PyTorch's operations
would wait at the end of each for a thread that has to share its core. Elsewhere plain PyTorch.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._parallel import for_each_block
from ._torch import CHUNK, wide

# Elements of a harmonic at a time, for each thread of a CPU: 16 harmonics are 1 MiB, about an L2
# cache, and take several times longer than the calls.
_CPU_GRAIN = 8192
# Elements that a thread takes at a time: few have to be worth the start of another thread.
_CPU_BLOCK = 65536
# Elements of a product that BLAS computes in the thread that asks for it.
_PRODUCT = 4096
# Fewer elements than this PyTorch adds up in the thread that asks for it.
_SERIAL = 32768

Real: TypeAlias = NDArray[np.floating[Any]]
Complex: TypeAlias = NDArray[np.complexfloating[Any, Any]]
Finish: TypeAlias = Callable[[int, int, Complex, Callable[[], Complex]], None]
Array = TypeVar("Array", Tensor, Real)


def knot_table(knots: int, t_max: float, like: Tensor) -> Tensor:
    """Positions t, targets ``exp(-t^2/2)`` and weights of the Epps-Pulley sum: (3, knots - 1).

    The knot at t = 0 is left out: it adds 0 to the value and to the gradient. The weights are the
    trapezoid rule's, doubled for the negative half line (so 2 dt inside), times ``exp(-t^2/2)``.
    """
    if like.device.type == "cpu":
        table = torch.from_numpy(_knot_table_on_cpu(knots, t_max))
    else:
        table = wide_knot_table(knots, t_max, wide(like), like.device)
    return table.to(like.dtype)


@functools.lru_cache(maxsize=16)
def _knot_table_on_cpu(knots: int, t_max: float) -> NDArray[np.float64]:
    return wide_knot_table(knots, t_max, torch.float64, torch.device("cpu")).numpy()


def wide_knot_table(knots: int, t_max: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`knot_table` anew, in a dtype."""
    dt = t_max / (knots - 1)
    t = torch.arange(1, knots, dtype=dtype, device=device) * dt
    target = torch.exp(-0.5 * t.square())
    weight = 2 * dt * target
    weight[-1] /= 2
    return torch.stack((t, target, weight))


def epps_pulley_(p: Tensor, table: Tensor, keep_gradient: bool) -> Tensor:
    """Epps-Pulley statistic of each row against N(0, 1); ``p`` becomes its gradient.

    Args:
        p: projections, (K, N), contiguous; overwritten by the gradient of the sum of the returned
            values (with ``keep_gradient``).
        table: from :func:`knot_table`.
        keep_gradient: whether the gradient is needed.

    Returns:
        The statistic of each slice, (K,).
    """
    if _takes_numpy(p):
        return _epps_pulley_in_numpy_(p, table, keep_gradient)
    slices, samples = p.shape
    statistic = p.new_empty(slices)
    for begin, block, waves in _wave_blocks(p, table):
        value, coefficients = epps_pulley_from_means(waves.mean(-1), table, samples)
        statistic[begin : begin + len(block)] = value
        if keep_gradient:
            torch.bmm(coefficients, waves, out=block.unsqueeze(1))
    return statistic


def _epps_pulley_in_numpy_(p: Tensor, table: Tensor, keep_gradient: bool) -> Tensor:
    values, knots, samples = p.numpy(), table.numpy(), p.shape[1]
    means = np.empty((len(p), table.shape[1]), np.result_type(values, np.complex64))

    def finish(begin: int, end: int, waves: Complex, sums: Callable[[], Complex]) -> None:
        some = means[begin:end]
        np.divide(sums(), samples, out=some)
        if keep_gradient:
            _, a, b = terms(some.real, some.imag, knots, samples)
            _combine(waves, a, b, values[begin:end])

    _for_each_wave_block(p, table, finish)
    with np.errstate(all="ignore"):  # all at once, so with the same bits whatever is kept
        return torch.from_numpy(terms(means.real, means.imag, knots, samples)[0])


def wave_sums(p: Tensor, table: Tensor) -> Tensor:
    """Sums over samples of ``cos(t p)``, then of ``sin(t p)``: (K, N) -> (K, 2 J)."""
    total = p.new_zeros(len(p), 2 * table.shape[1])
    if _takes_numpy(p):
        cosine, sine = np.split(total.numpy(), 2, 1)

        def finish(begin: int, end: int, _: Complex, sums: Callable[[], Complex]) -> None:
            some = sums()
            cosine[begin:end], sine[begin:end] = some.real, some.imag

        _for_each_wave_block(p, table, finish)
        return total
    for begin, block, waves in _wave_blocks(p, table):
        torch.sum(waves, -1, out=total[begin : begin + len(block)])
    return total


def combine_waves_(p: Tensor, table: Tensor, coefficients: Tensor) -> None:
    """Overwrite each row by a sum of its waves: (K, N), coefficients (K, 1, 2 J)."""
    if _takes_numpy(p):
        values = p.numpy()
        a, b = np.split(coefficients.numpy()[:, 0], 2, 1)

        def finish(begin: int, end: int, waves: Complex, _: Callable[[], Complex]) -> None:
            _combine(waves, a[begin:end], b[begin:end], values[begin:end])

        _for_each_wave_block(p, table, finish)
        return
    for begin, block, waves in _wave_blocks(p, table):
        torch.bmm(coefficients[begin : begin + len(block)], waves, out=block.unsqueeze(1))


def epps_pulley_from_means(
    means: Tensor, table: Tensor, samples: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Statistic (k,) and coefficients (k, 1, 2 J) of the waves in its gradient."""
    cosine, sine = means.unflatten(1, (2, -1)).unbind(1)
    value, *coefficients = terms(cosine, sine, table, samples)
    return value, torch.cat(coefficients, 1).unsqueeze(1)


def terms(
    cosine: Array, sine: Array, table: Array, samples: int | Tensor
) -> tuple[Array, Array, Array]:
    """Statistic (...), and coefficients (..., J) of the cosines and the sines in its gradient.

    With c, s the means of ``cos(t p)`` and ``sin(t p)``: ``T = N sum_t w [(c - phi)^2 + s^2]``, so
    ``dT/dp_i = 2 sum_t w t [s cos(t p_i) - (c - phi) sin(t p_i)]``.
    """
    t, target, weight = table
    excess = cosine - target
    value = samples * ((excess * excess + sine * sine) * weight).sum(-1)
    scale = 2 * weight * t
    return value, sine * scale, -excess * scale


def _takes_numpy(p: Tensor) -> bool:
    return p.device.type == "cpu"


def _for_each_wave_block(p: Tensor, table: Tensor, finish: Finish) -> None:
    """Evaluate the waves of all rows on a CPU, a few rows at a time.

    Args:
        p: (K, N).
        table: from :func:`knot_table`.
        finish: called with a half-open range of rows, their waves (J, k, N) and a function that
            gives the sums of these over samples, (k, J).
    """
    slices, samples = p.shape
    if samples == 0:
        return
    values, step, count = p.numpy(), table[0, 0].item(), table.shape[1]
    rows = min(slices, max(1, _CPU_GRAIN // samples))

    def make_worker() -> Callable[[int, int], None]:
        memory = np.empty((count * rows, samples), np.result_type(values, np.complex64))

        @functools.cache  # for two sizes at most
        def scratch(size: int) -> tuple[Complex, Callable[[], Complex]]:
            waves = memory[: count * size].reshape(count, size, samples)
            return waves, _row_sums_of(waves)

        def work(begin: int, end: int) -> None:
            with np.errstate(all="ignore"):  # the values say what is not finite
                for first in range(begin, end, rows):
                    last = min(first + rows, end)
                    waves, sums = scratch(last - first)
                    _powers(values[first:last], step, waves)
                    finish(first, last, waves, sums)

        return work

    for_each_block(make_worker, slices, max(rows, _CPU_BLOCK // samples // rows * rows))


def _powers(p: Real, step: float, waves: Complex) -> None:
    """``exp(i j step p)`` for j = 1 .. J: (k, N) -> ``waves`` (J, k, N).

    Only powers of 4 are evaluated; the others are products of two earlier ones. A shorter chain of
    evaluations would let the rounding of the first one grow by J.
    """
    count, known = len(waves), 1
    _evaluate(p, step, waves[0])
    while known < count:
        more = min(known, count - known)
        np.multiply(waves[:more], waves[known - 1], out=waves[known : known + more])
        known += more
        if known < count and known.bit_length() % 2:  # a power of 4
            _evaluate(p, known * step, waves[known - 1])


def _evaluate(p: Real, frequency: float, wave: Complex) -> None:
    angle = p * frequency
    np.cos(angle, out=wave.real)
    np.sin(angle, out=wave.imag)


def _row_sums_of(waves: Complex) -> Callable[[], Complex]:
    """A function that gives the sums of (J, k, N) over samples, (k, J), in the calling thread.

    PyTorch's sum of complex numbers is vectorised, numpy's is not.
    """
    count, rows, samples = waves.shape
    totals = torch.from_numpy(np.empty(count * rows, waves.dtype))
    each = max(1, (_SERIAL - 1) // samples)
    parts = torch.from_numpy(waves).view(-1, samples).split(each)
    pairs = list(zip(parts, totals.split(each), strict=True))

    def sums() -> Complex:
        for part, total in pairs:
            torch.sum(part, 1, out=total)
        array: Complex = totals.numpy()
        return array.reshape(count, rows).T

    return (lambda: waves.sum(-1).T) if samples >= _SERIAL else sums


def _combine(waves: Complex, a: Real, b: Real, out: Real) -> None:
    """``sum_j a_j cos_j + b_j sin_j`` of each row: (J, k, N), coefficients (k, J) -> (k, N)."""
    numbers = waves.view(out.dtype).swapaxes(0, 1)  # (k, J, 2 N), cosines and sines in turns
    coefficients = np.stack((a, b), 1)
    for begin in range(0, out.shape[1], _PRODUCT):
        end = begin + _PRODUCT
        sums = coefficients @ numbers[:, :, 2 * begin : 2 * end]
        np.add(sums[:, 0, 0::2], sums[:, 1, 1::2], out=out[:, begin:end])


def _wave_blocks(p: Tensor, table: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Off the CPU, some rows at a time: the first one, the rows, their waves (k, 2 J, N)."""
    slices, samples = p.shape
    if samples == 0:
        return
    rows = min(slices, max(1, CHUNK // 8 // samples))
    waves = p.new_empty(rows, 2 * table.shape[1], samples)
    for begin in range(0, slices, rows):
        block = p[begin : begin + rows]
        some = waves[: block.shape[0]]
        _harmonics(block, table[0, 0], some)
        yield begin, block, some


def _harmonics(p: Tensor, step: Tensor, waves: Tensor) -> None:
    """As :func:`_powers`: all cosines, then all sines, (k, N) -> ``waves`` (k, 2 J, N)."""
    cosine, sine = waves.unflatten(1, (2, -1)).unbind(1)
    count, known = cosine.shape[1], 1

    def evaluate(j: int) -> None:
        angle = p * (j * step)
        torch.cos(angle, out=cosine[:, j - 1])
        torch.sin(angle, out=sine[:, j - 1])

    evaluate(1)
    while known < count:
        old, last = slice(min(known, count - known)), slice(known - 1, known)
        new = slice(known, known + old.stop)
        torch.mul(cosine[:, old], cosine[:, last], out=cosine[:, new])
        cosine[:, new].addcmul_(sine[:, old], sine[:, last], value=-1)
        torch.mul(sine[:, old], cosine[:, last], out=sine[:, new])
        sine[:, new].addcmul_(cosine[:, old], sine[:, last])
        known = new.stop
        if known < count and known.bit_length() % 2:
            evaluate(known)
