"""Every loss over several ranks against the concatenated batch on one process.

The value is the same on all ranks; the gradient for a rank's samples is W times the derivative for
trainers that average over ranks, and the derivative for those that add.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracles
import pool
import pytest
import torch
from oracles import error, float32_errors, truth, value_and_grad
from rank_cases import FLOAT64, VANISHING, Batch, cases, wrong
from torch import Tensor

from vicreg_losses import (
    SlicedSketchLoss,
    _moments,
    _sharded_covariance,
    distributed,
    functional,
)

FLOAT32, U = 1e-6, 2.0**-24

# Means and products go in one message where D >= 32 W; a matrix is sent in blocks from D = 128 on.
BATCHES = [
    Batch((8, 5), views=3),
    Batch((4, 9, 5)),
    Batch((6, 1, 9, 3)),
    Batch((7, 0, 5)),
    Batch((1, 1, 1, 1)),
    Batch((0, 2), slices=1),
    Batch((6, 1, 9, 3), slices=2),
    Batch((5, 4, 3), dimensions=1, slices=2),
    Batch((9, 40), dimensions=70),
    Batch((3, 6, 4), dimensions=100),
    Batch((4, 3, 0, 5), dimensions=134),
]
UNEVEN = Batch((6, 1, 9, 3))
Answer = tuple[Tensor, Tensor]


def answers(rank: int, world: int, batch: Batch, reduction: str) -> dict[str, Any]:
    """Values and gradients of one rank, and whether a second call repeats them."""
    found = {}
    for name, (ours, _) in cases(batch, rank, reduction=reduction).items():
        value, gradient = value_and_grad(ours, batch.part(rank))
        again = value_and_grad(ours, batch.part(rank))
        repeats = torch.equal(value, again[0]) and torch.equal(gradient, again[1])
        found[name] = value, gradient, repeats
    return found


@pytest.mark.parametrize(
    ("batch", "reduction"),
    [*((b, "mean") for b in BATCHES), *((b, "sum") for b in (BATCHES[2], BATCHES[-1]))],
    ids=str,
)
def test_as_one_process_with_all_samples(batch: Batch, reduction: str) -> None:
    world = len(batch.sizes)
    heard = pool.run(answers, world, batch, reduction)
    assert wrong(batch, heard, world if reduction == "mean" else 1) == {}
    assert [name for answer in heard for name, x in answer.items() if not x[2]] == []


def test_the_comparison_sees_local_losses() -> None:
    """Those of each rank's own samples, which differ in mean and spread, would all be wrong."""
    batch = Batch((8, 5))
    heard = []
    for rank in range(2):
        losses = cases(batch, rank, gather_distributed=False)
        heard.append({n: value_and_grad(ours, batch.part(rank)) for n, (ours, _) in losses.items()})
    assert set(wrong(batch, heard, 2)) == set(cases(batch))


PATHS: dict[str, tuple[Any, str, Any]] = {
    "moments by two all-reduces": (_moments, "_GATHERED", 0),
    "Gram columns of two ranks at a time": (_sharded_covariance, "CHUNK", 2 * 2 * 5 * 134),
    "means apart from products": (_sharded_covariance, "is_one_message", lambda *_: False),
}


@contextmanager
def taken(path: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if path:
            patch.setattr(*PATHS[path])
        yield


def answers_by_path(rank: int, world: int, batch: Batch, path: str) -> dict[str, Any]:
    with taken(path):
        return answers(rank, world, batch, "mean")


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_large_worlds(path: str) -> None:
    """What only many ranks or dimensions would choose."""
    batch = Batch((4, 3, 0, 5), dimensions=134, slices=5)
    assert wrong(batch, pool.run(answers_by_path, 4, batch, path), 4) == {}


def test_ranks_draw_slices_of_their_own() -> None:
    z = UNEVEN.part(0)
    drawn = [SlicedSketchLoss(5, slices="per_rank").next_directions(z, rank) for rank in range(4)]
    assert torch.equal(drawn[0], SlicedSketchLoss(5).next_directions(z))
    assert len(torch.cat(drawn, 1).T.unique(dim=0)) == 4 * 5


# What may differ between ranks


def answers_of_modes(rank: int, world: int, batch: Batch) -> dict[str, Any]:
    """Each rank in another mode: with a gradient, without, in inference mode, detached."""
    found = {}
    for i, (name, (ours, _)) in enumerate(cases(batch, rank).items()):
        z, mode = batch.part(rank), (rank + i) % 4
        if mode == 0:
            found[name] = value_and_grad(ours, z)
        elif mode == 1:
            with torch.no_grad():
                found[name] = ours(z.requires_grad_()), None
        elif mode == 2:
            with torch.inference_mode():
                found[name] = ours(z.clone()).tolist(), None
        else:
            found[name] = ours(z), None
    return found


def test_modes_may_differ() -> None:
    heard = pool.run(answers_of_modes, 4, UNEVEN)
    for name, (_, formula) in cases(UNEVEN).items():
        value, gradient = truth(formula, UNEVEN.whole())
        values = [float(answer[name][0]) for answer in heard]
        assert len(set(values)) == 1, name
        assert error(torch.tensor(values[0], dtype=torch.float64), value, VANISHING) <= FLOAT64
        parts = zip(UNEVEN.split(4 * gradient), heard, strict=True)
        errors = [error(a[name][1], g, VANISHING) for g, a in parts if a[name][1] is not None]
        assert len(errors) == 1, name
        assert max(errors) <= FLOAT64, name


def answers_of_one_backward(rank: int, world: int, batch: Batch) -> dict[str, Any]:
    """All ranks evaluate, one differentiates."""
    found = {}
    for name, (ours, _) in cases(batch, rank).items():
        z = batch.part(rank).requires_grad_()
        value = ours(z)
        found[name] = value.detach(), torch.autograd.grad(value, z)[0] if rank == 1 else None
    return found


def test_backward_on_one_rank_alone() -> None:
    batch = Batch((4, 9, 5))
    answer = pool.run(answers_of_one_backward, 3, batch, timeout=30)[1]
    for name, (_, formula) in cases(batch).items():
        gradient = 3 * batch.split(truth(formula, batch.whole())[1])[1]
        assert error(answer[name][1], gradient, VANISHING) <= FLOAT64, name


# Numbers that are hard


def not_finite(rank: int, world: int, batch: Batch, bad: float, where: int) -> list[str]:
    """Losses whose value is finite in spite of a number of one rank, or their gradient."""
    found = []
    for name, (ours, _) in cases(batch, rank).items():
        z = batch.part(rank)
        if rank == where:
            z[0, 1, 2] = bad
        value, gradient = value_and_grad(ours, z)
        if value.isfinite() or gradient.isfinite().any():
            found.append(name)
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_not_finite_anywhere_is_seen_everywhere(bad: float, where: int) -> None:
    assert pool.run(not_finite, 3, Batch((7, 0, 5)), bad, where) == [[], [], []]


def test_an_overflow_on_one_rank_is_seen_everywhere() -> None:
    """A standard deviation of inf would make all samples 0, and the sketch of them finite."""
    heard = pool.run(not_finite, 3, Batch((7, 0, 5)), 1e200, 2)
    assert heard[0] == heard[1] == heard[2]
    assert not [name for name in heard[0] if "wasserstein" in name or "visreg.s" in name]


def offset_answers(rank: int, world: int, batch: Batch, offset: float, path: str) -> dict[str, Any]:
    losses, z = cases(batch, rank), offset_part(batch, rank, offset)
    with taken(path):
        found = {name: value_and_grad(losses[name][0], z) for name in OFFSET}
        return {**found, "statistics": distributed.batch_statistics(z)}


def offset_part(batch: Batch, rank: int, offset: float) -> Tensor:
    """Columns of both signs; of one spread, so that float32 holds them at any offset."""
    sign = torch.where(torch.arange(batch.dimensions) % 3 == 0, -1.0, 1.0)
    return (batch.part(rank) + sign * offset).float()


# Epps-Pulley has no accurate float32 value at an offset, on one rank neither.
OFFSET = [
    *(t.name for t in oracles.ALL_TERMS if "epps_pulley" not in t.name),
    "wasserstein-slices",
    "wasserstein-samples",
    "wasserstein-per_rank",
    "vicreg",
    "visreg",
]


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    ("batch", "path"),
    [(UNEVEN, ""), *((Batch((0, 40, 25), dimensions=100), path) for path in ("", *PATHS))],
    ids=str,
)
def test_float32_at_an_offset(batch: Batch, path: str, offset: float) -> None:
    """As accurate as plain PyTorch where the offset has been taken away."""
    world = len(batch.sizes)
    heard = pool.run(offset_answers, world, batch, offset, path)
    z = torch.cat([offset_part(batch, rank, offset) for rank in range(world)], 1)
    shifted = (z.double() - z.double().mean((0, 1))).float()
    for name in OFFSET:
        formula = cases(batch)[name][1]
        reference = z if name in ("center", "visreg") else shifted
        value, gradient = truth(formula, z)
        plain_value, plain_gradient = float32_errors(formula, reference)
        assert all(torch.equal(a[name][0], heard[0][name][0]) for a in heard), name
        assert error(heard[0][name][0], value) <= FLOAT32 + 2 * plain_value, name
        if "wasserstein" not in name:  # its ranks are not decided by rounded samples
            together = torch.cat([a[name][1] for a in heard], 1)
            assert error(together, world * gradient) <= FLOAT32 + 2 * plain_gradient, name
    statistics = heard[0]["statistics"]
    assert ((statistics.variance / z.double().var(1)) - 1).abs().max() <= FLOAT32


def dominated_part(batch: Batch, rank: int) -> Tensor:
    """One column of N < D is so large that a float32 Gram matrix has little else in it."""
    z = batch.part(rank)
    z[:, :, 0] *= 1e3
    return z.float()


def dominated_answers(rank: int, world: int, batch: Batch) -> list[Answer]:
    z = dominated_part(batch, rank)
    return [
        value_and_grad(lambda z, s=s: functional.covariance_loss(z, strategy=s), z)
        for s in ("gram", "feature")
    ]


def test_covariance_with_dominant_diagonal() -> None:
    """As for one process: twice plain PyTorch's error, and four roundings of the result."""
    batch = Batch((6, 0, 9), dimensions=64)
    heard = pool.run(dominated_answers, 3, batch)
    z = torch.cat([dominated_part(batch, rank) for rank in range(3)], 1)
    value, gradient = truth(oracles.covariance, z)
    plain_value, plain_gradient = float32_errors(oracles.covariance, z)
    for place in (0, 1):
        together = torch.cat([answer[place][1] for answer in heard], 1)
        assert error(heard[0][place][0], value) <= 2 * plain_value + 4 * U
        assert error(together, 3 * gradient) <= 2 * plain_gradient + 4 * U


def narrow_answers(rank: int, world: int, batch: Batch, dtype: torch.dtype) -> list[str]:
    """Losses for which 16-bit numbers are not as good as the same numbers in float32."""
    found = []
    z = batch.part(rank, dtype)
    if dtype == torch.bfloat16:
        z[:, :, 1] *= 2.0**20  # float16 does not reach there
    for name, (ours, _) in cases(batch, rank).items():
        value, gradient = value_and_grad(ours, z)
        same, slope = value_and_grad(ours, z.float())
        good = value.dtype == torch.float32 and gradient.dtype == dtype
        exact = torch.equal(value, same) and torch.equal(gradient, slope.to(dtype))
        if not good or not (exact):
            found.append(name)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [UNEVEN, Batch((6, 2), dimensions=70)], ids=str)
def test_narrow_dtypes(batch: Batch, dtype: torch.dtype) -> None:
    """They are sent as they are and computed in float32: bitwise the same."""
    world = len(batch.sizes)
    assert pool.run(narrow_answers, world, batch, dtype) == [[]] * world


def tied_part(batch: Batch, rank: int) -> Tensor:
    """Rows of three kinds, all of which are on every rank."""
    return batch.part(0)[:, :3].repeat(1, 4, 1)[:, rank : rank + batch.sizes[rank]]


def tied_answers(rank: int, world: int, batch: Batch) -> dict[str, Any]:
    return {n: value_and_grad(f, tied_part(batch, rank)) for n, (f, _) in cases(batch).items()}


def test_tied_samples() -> None:
    """Their gradients are one of a set, but for the sum over those that are alike."""
    batch = Batch((4, 6, 5), slices=13)
    heard = pool.run(tied_answers, 3, batch)
    z = torch.cat([tied_part(batch, rank) for rank in range(3)], 1)
    kind = torch.cat([(torch.arange(n) + rank) % 3 for rank, n in enumerate(batch.sizes)])
    assert torch.equal(z, batch.part(0)[:, kind])

    def of_kinds(x: Tensor) -> Tensor:
        return torch.stack([x[:, kind == k].sum(1) for k in range(3)], 1)

    for name, (_, formula) in cases(batch).items():
        if "per_rank" in name:
            continue
        value, gradient = truth(formula, z)
        together = torch.cat([answer[name][1] for answer in heard], 1)
        assert error(heard[0][name][0], value, VANISHING) <= FLOAT64, name
        assert error(of_kinds(together), 3 * of_kinds(gradient), VANISHING) <= FLOAT64, name


def refused(rank: int, world: int, batch: Batch) -> tuple[dict[str, str], bool]:
    """What each loss says of the batch; and whether it works with enough samples thereafter."""
    z, enough = batch.part(rank), torch.ones(batch.views, 2, batch.dimensions)
    losses = {name: ours for name, (ours, _) in cases(batch, rank).items()}
    losses["batch_statistics"] = lambda z: distributed.batch_statistics(z).mean
    said = {name: pool.refusal(lambda f=f: f(z)) for name, f in losses.items()}
    return said, all(f(enough).isfinite().all() for f in losses.values())


@pytest.mark.parametrize("sizes", [(1, 0), (0, 1, 0), (0, 0)], ids=str)
def test_fewer_than_two_samples_in_all(sizes: tuple[int, ...]) -> None:
    for said, works in pool.run(refused, len(sizes), Batch(sizes)):
        expected = f"expected at least 2 samples in the global batch, got {sum(sizes)} over"
        assert {n: x for n, x in said.items() if not x.startswith("ValueError")} == {}
        assert {n: x for n, x in said.items() if expected not in x} == {}
        assert works
