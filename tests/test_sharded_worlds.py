"""Random worlds of ranks, in threads: value and gradient are those of the concatenated batch.

And mutation control: the same property refutes every one of a list of wrong implementations.
"""

from collections.abc import Iterator

import oracles
import pytest
import threads
import torch
from hypothesis import Phase, given, reject, settings
from mutants import MUTANTS, Mutant
from oracles import value_and_grad
from torch import Tensor
from worlds import World, worlds

from vicreg_losses import _collectives, _moments, _sharded_covariance

# Identical samples may by chance be of length 1.
pytestmark = pytest.mark.filterwarnings("ignore:.*have length 1:UserWarning")

WORLDS, ENOUGH = 600, 1000
U64, U32 = 2.0**-53, 2.0**-24
# As in test_properties; and how many roundings of its size a sample passes through, beside those of
# a projection: subtractions of the mean's parts, the division, the product, and their sums.
FLOAT64, FLOAT32, ROUNDINGS = 1e-10, 1e-6, 16
UNDECIDED = 4e-6
# What an offset of the samples leaves as it is, and so shall its rounding.
INVARIANT = ("invariance", "variance", "hinge", "covariance", "wasserstein", "vicreg")


@pytest.fixture(scope="module", autouse=True)
def ranks_are_threads() -> Iterator[None]:
    with threads.installed():
        yield


def library(world: World) -> tuple[list[Tensor], list[Tensor | None]]:
    """Value and gradient on each rank."""
    samples, directions, options = world.samples(), world.directions(), world.options()
    function = world.function()

    def on_rank(rank: int) -> tuple[Tensor, Tensor | None]:
        if world.spare is not None:
            limit = max(world.sizes) + world.spare
            _collectives.limit_samples(threads.here(), limit)
        wants = rank != world.frozen
        z = samples[rank].requires_grad_(wants)
        views = list(z.unbind()) if world.listed else z
        more = {"directions": directions[rank]} if world.term.sketch else {}
        value = function(views, **more, **options)
        sent = len(threads.here().sent)
        gradient = torch.autograd.grad(value, z)[0] if wants else None
        if len(threads.here().sent) != sent:
            raise RuntimeError("backward communicates")
        return value.detach(), gradient

    with pytest.MonkeyPatch.context() as patch:
        if world.in_parts:
            patch.setattr(_moments, "_GATHERED", 0)
            patch.setattr(_sharded_covariance, "CHUNK", 1)
        done = threads.run(len(world.sizes), on_rank)
    return [value for value, _ in done], [gradient for _, gradient in done]


def with_diagonal(z: Tensor) -> Tensor:
    """The covariances before the diagonal is subtracted: the size of what then cancels."""
    x = z - z.mean(1, keepdim=True)
    product = x.mT @ x / (z.shape[1] - 1)
    return product.square().sum() / z.shape[2]


class Wrong(AssertionError):
    """What the library says is not true; any other error is a crash."""


def is_decided(world: World, truth: Tensor) -> bool:
    """Whether float32 rounding can change neither a rank nor the active side of a hinge.

    A projection carries an error of about sqrt(D) U < 8e-7, a deviation one of a few U.
    """
    name, options = world.name, world.term.options
    if world.dtype == "float64":
        return True  # its rounding is 2^-29 of that
    if name.startswith(("wasserstein", "visreg")):
        directions = torch.cat(world.directions(), 1).double()
        return oracles.rank_gap(truth, directions) > UNDECIDED
    if name.startswith(("variance-hinge", "hinge", "vicreg")):
        deviations = torch.sqrt(truth.var(1) + options.get("eps", 1e-4))
        return (deviations - options.get("gamma", 1.0)).abs().min().item() > UNDECIDED
    return True


def sensitivity(world: World, truth: Tensor) -> tuple[float, float]:
    """What the rounding of samples changes in value and gradient, by the formula itself.

    By ``ROUNDINGS`` units, and D in a projection. A unit is half an ulp: of the samples, in
    float64, for the oracle; for the library in its dtype, of the centred samples if the term does
    not depend on their mean.
    """
    formula, generator = world.formula(), torch.Generator().manual_seed(world.seed)
    u = U64 if world.dtype == "float64" else U32
    seen = truth - truth.mean(1, keepdim=True) if world.name.startswith(INVARIANT) else truth
    unit = U64 * truth.abs().amax(1, keepdim=True) + u * seen.abs().amax(1, keepdim=True)
    value, gradient = value_and_grad(formula, truth)
    unit *= ROUNDINGS + world.dimensions * world.term.sketch
    changes = []
    for _ in range(2):
        step = torch.empty_like(truth).uniform_(-1, 1, generator=generator)
        moved = value_and_grad(formula, truth + unit * step)
        changes.append(((moved[0] - value).abs().item(), (moved[1] - gradient).norm().item()))
    return max(v for v, _ in changes), max(g for _, g in changes)


def check(world: World) -> None:
    """Raises where a rank's value or gradient is not that of the concatenated batch."""
    values, gradients = library(world)
    truth = torch.cat(world.samples(), 1).double()
    value, gradient = value_and_grad(world.formula(), truth)
    share = len(world.sizes) if world.reduction == "mean" else 1
    if not all(torch.equal(other, values[0]) for other in values):
        raise Wrong(f"values differ: {values}")
    rows = zip(gradients, gradient.split(world.sizes, 1), strict=True)
    pairs = [(ours, share * true) for ours, true in rows if ours is not None]
    errors = (
        (values[0].double() - value).abs().item(),
        torch.cat([(ours - true).flatten() for ours, true in pairs]).norm().item() / share,
    )
    scale = value.abs().item(), gradient.norm().item()
    exact = FLOAT64 if world.dtype == "float64" else FLOAT32
    stored = 2.0**-8 if world.dtype == "bfloat16" else 0.0
    bounds = exact * scale[0], (exact + stored) * scale[1]
    if world.term.formula in (oracles.covariance, oracles.vicreg):
        full = value_and_grad(with_diagonal, truth)  # in float64, where it would hide the rest
        bounds = tuple(
            b + ROUNDINGS * U64 * x.norm().item() for b, x in zip(bounds, full, strict=True)
        )
    if not (errors[0] <= bounds[0] and errors[1] <= bounds[1]):  # NaN is wrong
        more = sensitivity(world, truth)
        if not errors[0] <= bounds[0] + more[0]:
            raise Wrong(f"value: {values[0].item()} for {value.item()}; bound {bounds[0]}, {more}")
        if not errors[1] <= bounds[1] + more[1] and is_decided(world, truth):
            raise Wrong(f"gradient: error {errors[1]} of {scale[1]}; bound {bounds[1]}, {more}")


@settings(max_examples=WORLDS)
@given(world=worlds())
def test_any_world(world: World) -> None:
    check(world)


def test_threads_pass_messages() -> None:
    def on_rank(rank: int) -> list[list[float]]:
        group, x = threads.here(), torch.tensor([10.0 * rank, 10.0 * rank + 1])
        gathered, swapped = _collectives.all_gather(x, group), _collectives.all_to_all(x, group)
        return [
            gathered.flatten().tolist(),
            swapped.tolist(),
            _collectives.all_reduce_(x, group).tolist(),
        ]

    assert threads.run(2, on_rank) == [
        [[0, 1, 10, 11], [0, 10], [10, 12]],
        [[0, 1, 10, 11], [1, 11], [10, 12]],
    ]


def test_threads_in_different_calls_are_an_error() -> None:
    def on_rank(rank: int) -> Tensor:
        x = torch.zeros(2 + rank)
        return _collectives.all_reduce_(x, threads.here())

    with pytest.raises(RuntimeError, match="the ranks differ"):
        threads.run(2, on_rank)


def test_an_error_of_one_thread_is_that_of_all() -> None:
    def on_rank(rank: int) -> Tensor:
        if rank == 1:
            raise KeyError("mine")
        return _collectives.all_reduce_(torch.zeros(2), threads.here())

    with pytest.raises(KeyError, match="mine"):
        threads.run(3, on_rank)


def test_a_thread_that_waits_for_one_that_is_done_is_an_error() -> None:
    def on_rank(rank: int) -> None:
        if rank == 1:
            _collectives.all_reduce_(torch.zeros(2), threads.here())

    with pytest.raises(RuntimeError, match="the ranks differ"):
        threads.run(3, on_rank)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_refuted(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant.function, "__code__", mutant.code())

    @settings(max_examples=ENOUGH, phases=[Phase.generate], report_multiple_bugs=False)
    @given(world=worlds())
    def property_holds(world: World) -> None:
        try:
            check(world)
        except Wrong:
            raise
        except Exception:
            reject()  # a crash refutes nothing

    with pytest.raises(Wrong):
        property_holds()
