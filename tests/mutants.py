"""Wrong implementations of the losses over several ranks, each one edit away from the right one."""

import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

from vicreg_losses import _moments, _sharded, _sharded_covariance, _sharded_sketch

_Call = _sharded._Call


class Mutant(NamedTuple):
    """One function with a piece of its text replaced.

    Attributes:
        name: what is wrong.
        function: which; a code of its own reaches all that have imported it.
        old: there once.
        new: in its place.
    """

    name: str
    function: Callable[..., Any]
    old: str
    new: str

    def __str__(self) -> str:
        return self.name

    def code(self) -> CodeType:
        text = textwrap.dedent(inspect.getsource(self.function))
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: expected {self.old!r} once in\n{text}")
        scope = dict(self.function.__globals__)
        exec(compile(text.replace(self.old, self.new), f"<{self.name}>", "exec"), scope)
        code: CodeType = scope[self.function.__name__].__code__
        return code


SHARE = "share = self.ranks.size if request.averages else 1"

MUTANTS = [
    # The convention.
    Mutant("gradient without W", _Call._finish, SHARE, "share = 1"),
    Mutant("gradient over W", _Call._finish, "share = self.", "share = 1 / self."),
    Mutant("sum ignored", _Call._finish, SHARE, "share = self.ranks.size"),
    # Counts.
    Mutant(
        "N of this rank",
        _Call._finish,
        "views, _, dimensions = z.shape",
        "views, local, dimensions = z.shape; count = torch.full_like(count, local)",
    ),
    Mutant("N of this rank in all sums", _moments.merge, "count.sum()", "count[0] * len(count)"),
    Mutant("own slices not counted", _Call._finish, "slices *= self.ranks.size", "slices *= 1"),
    # Statistics.
    Mutant(
        "variance within ranks alone",
        _moments.merge,
        "squares = spread.square().sum(0)",
        "squares = 0 * spread.square().sum(0)",
    ),
    Mutant(
        "products within ranks alone",
        _sharded_covariance.add_products,
        "torch.baddbmm(block, spread",
        "torch.baddbmm(block, 0 * spread",
    ),
    Mutant("mean of means", _moments.merge, "(weight * mean).sum(0) / total", "mean.mean(0)"),
    Mutant("low part of means dropped", _moments.merge, ".add_(low)", ""),
    Mutant("shift of the mean dropped", _moments.Moments.center, ".sub_(self.shift)", ""),
    Mutant("origin of an empty rank", _moments.merge, "(count > 0)", "(count == 0)"),
    Mutant(
        "mean of this rank",
        _moments.global_moments,
        "origin = (sums[1:] / total).to(z.dtype).view(row)",
        "origin = (sums[1:] / total).to(z.dtype).view(row); total = sums[0] * 0 + z.shape[1]",
    ),
    Mutant(
        "sigma of this rank",
        _Call._sketch,
        "sigma = (self.moments.squares / count)",
        "sigma = (z - z.mean(1, keepdim=True)).square().mean(1, keepdim=True)",
    ),
    # Sums of ranks.
    Mutant("SSE not reduced", _Call.run, 'self.pending["invariance"]', 'self.sums["invariance"]'),
    Mutant(
        "energy not reduced",
        _Call._meet_statistics,
        'self.pending["energy"]',
        'self.sums["energy"]',
    ),
    Mutant(
        "products not reduced",
        _sharded_covariance.add_products,
        "all_reduce_(heard, ranks.group)",
        "heard = all_reduce_(heard.clone(), ranks.group) * 0 + heard",
    ),
    Mutant("sketch not reduced", _Call._sketch, 'self.pending["sketch"]', 'self.sums["sketch"]'),
    Mutant(
        "waves of this rank",
        _sharded_sketch.add_harmonics,
        "heard[: sums.numel()].view(sums.shape) / count",
        "sums / samples",
    ),
    Mutant(
        "upstream gradient dropped",
        _sharded.gradient,
        "piece, by)",
        "piece, torch.ones_like(by))",
    ),
    # Covariance.
    Mutant(
        "diagonal kept in the value",
        _Call._covariance,
        "(total - diagonal)",
        "(total - 0 * diagonal)",
    ),
    Mutant("diagonal kept in the gradient", _Call._covariance, "value=-1", "value=-0.0"),
    Mutant(
        "half of a product",
        _sharded_covariance.add_products,
        "product[:, begin:, begin:end] = block.mT",
        "product[:, end:, begin:end] = 0",
    ),
    Mutant(
        "first ranks' columns alone",
        _sharded_covariance.gram_rows,
        "min(begin + ranks, size)",
        "min(begin + ranks, size - (size > ranks))",
    ),
    Mutant("diagonal lost in float32", _Call._covariance, "wider=True", "wider=False"),
    Mutant(
        "samples rounded on the way",
        _sharded_sketch.wire_dtype,
        "else like.dtype",
        "else torch.float16",
    ),
    # Slices, and where they are.
    Mutant(
        "residuals to other ranks",
        _sharded_sketch.send_slices,
        "permute(2, 0, 1, 3)",
        "permute(2, 0, 1, 3).flip(0)",
    ),
    Mutant(
        "gradients to other ranks",
        _sharded_sketch.send_samples,
        "transpose(0, 1)\n",
        "transpose(0, 1).roll(1, 0)\n",
    ),
    Mutant(
        "last range of slices dropped",
        _sharded_sketch.send_slices,
        "min(mine, slices - ranks.rank * mine)",
        "mine * (slices - ranks.rank * mine >= mine)",
    ),
    Mutant(
        "remainder of slices dropped",
        _Call._sketch,
        "mine = -(-w.shape[1] // ranks.size)",
        "mine = w.shape[1] // ranks.size",
    ),
    Mutant(
        "first slices on all ranks",
        _Call._sketch,
        "w[:, ranks.rank * mine : (ranks.rank + 1) * mine]",
        "w[:, :mine]",
    ),
    # Padding.
    Mutant(
        "padding is samples",
        _sharded_sketch.Gathered.is_sample,
        "self.counts[:, None]",
        "0 * self.counts[:, None] + len(places)",
    ),
    Mutant(
        "padding has waves",
        _sharded_sketch.epps_pulley_rows_,
        "-= (~there).sum()",
        "-= 0 * (~there).sum()",
    ),
    Mutant(
        "padding sorted among samples",
        _sharded_sketch.send_slices,
        "capacity), PADDING)",
        "capacity), 0.0)",
    ),
    Mutant(
        "paper's quantiles of the padded length",
        _sharded_sketch.padded_quantiles,
        "low / (count + 1)",
        "low / (length + 1)",
    ),
    Mutant(
        "exact quantiles of the padded length",
        _sharded_sketch.padded_quantiles,
        "torch.stack((low - 1, low)) / count",
        "torch.stack((low - 1, low)) / length",
    ),
]
