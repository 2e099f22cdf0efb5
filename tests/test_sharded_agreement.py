"""Calls that differ between ranks are one error on all of them, which names what differs."""

import os
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from pool import Failure, outcomes, refusal, run
from torch import Tensor

from vicreg_losses import CovarianceLoss, SlicedSketchLoss, VarianceLoss, distributed
from vicreg_losses.functional import (
    center_loss,
    covariance_loss,
    invariance_loss,
    sliced_sketch_loss,
    variance_loss,
)

WORLD, ODD = 3, 1
N, D, K = 5, 6, 4


def embeddings(n: int = N, d: int = D, v: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return oracles.embeddings(v, n, d, dtype=dtype)


# Different calls: `odd` is whether this rank is the one that differs


def seeded(odd: bool) -> Tensor:
    return SlicedSketchLoss(K, seed=3 + odd)(embeddings())


def stepped(odd: bool) -> Tensor:
    loss = SlicedSketchLoss(K)
    loss.step += odd
    return loss(embeddings())


def ordered(odd: bool) -> Tensor:
    losses = [VarianceLoss(), CovarianceLoss()]
    return torch.stack([loss(embeddings()) for loss in (losses[::-1] if odd else losses)])


def sketched(**options: Any) -> Tensor:
    directions = oracles.unit_directions(D, K)
    return sliced_sketch_loss(embeddings(), directions=directions, **options)


def limited(odd: bool) -> Tensor:
    distributed.limit_samples(N + odd)
    return center_loss(embeddings())


def statistics(odd: bool) -> Any:
    if odd:
        return variance_loss(embeddings())
    return distributed.batch_statistics(embeddings())


# What differs, as the error must show it: its name, the value of most ranks and that of the odd
# one. `None` for a value that the name alone explains.
DIFFERENT: dict[str, tuple[Callable[[bool], Any], str, str | None, str | None]] = {
    **{
        f"dimensions of {loss.__name__}": (
            lambda odd, loss=loss: loss(embeddings(d=D + odd)),
            "dimensions",
            "6",
            "7",
        )
        for loss in (
            variance_loss,
            center_loss,
            covariance_loss,
            invariance_loss,
            sliced_sketch_loss,
        )
    },
    "views": (
        lambda odd: variance_loss(embeddings(v=2 + odd)),
        "views",
        "2",
        "3",
    ),
    "dtype": (
        lambda odd: covariance_loss(embeddings(dtype=torch.float32 if odd else torch.float64)),
        "dtype",
        "torch.float64",
        "torch.float32",
    ),
    "16 bits": (
        lambda odd: covariance_loss(embeddings(dtype=torch.bfloat16 if odd else torch.float32)),
        "wire",
        "''",
        "'bfloat16'",
    ),
    "num_slices": (
        lambda odd: sliced_sketch_loss(embeddings(), num_slices=K + odd, generator_seed=1),
        "slices",
        "4",
        "5",
    ),
    "generator_seed": (
        lambda odd: sliced_sketch_loss(embeddings(), num_slices=K, generator_seed=1 + odd),
        "seed, step or directions",
        None,
        None,
    ),
    "seed": (seeded, "seed, step or directions", None, None),
    "step": (stepped, "seed, step or directions", None, None),
    "directions": (
        lambda odd: sliced_sketch_loss(embeddings(), directions=oracles.unit_directions(D, K, odd)),
        "seed, step or directions",
        None,
        None,
    ),
    "gamma": (
        lambda odd: variance_loss(embeddings(), gamma=1.0 + odd),
        "gamma",
        "1.0",
        "2.0",
    ),
    "form": (
        lambda odd: variance_loss(embeddings(), form="squared" if odd else "hinge"),
        "variance",
        "'hinge'",
        "'squared'",
    ),
    "form of the invariance": (
        lambda odd: invariance_loss(embeddings(), form="center" if odd else "pairwise"),
        "factor",
        "4.0",
        "1.0",
    ),
    "strategy": (
        lambda odd: covariance_loss(embeddings(), strategy="feature" if odd else "gram"),
        "covariance",
        "'gram'",
        "'feature'",
    ),
    "reduction": (
        lambda odd: center_loss(embeddings(), reduction="sum" if odd else "mean"),
        "averages",
        "True",
        "False",
    ),
    "statistic": (
        lambda odd: sketched(statistic="epps_pulley" if odd else "wasserstein"),
        "sketch",
        "'wasserstein'",
        "'epps_pulley'",
    ),
    "quantiles": (
        lambda odd: sketched(quantiles="exact" if odd else "paper"),
        "quantiles",
        "'paper'",
        "'exact'",
    ),
    "knots": (
        lambda odd: sketched(statistic="epps_pulley", knots=17 + odd),
        "knots",
        "17",
        "18",
    ),
    "exchange": (
        lambda odd: sketched(exchange="samples" if odd else "slices"),
        "exchange",
        "'slices'",
        "'samples'",
    ),
    "slices": (
        lambda odd: sketched(slices="per_rank" if odd else "shared"),
        "own_slices",
        "False",
        "True",
    ),
    "order of two losses": (ordered, "variance", "'hinge'", "''"),
    "limit_samples": (limited, "limit of samples", "5", "6"),
    "loss or statistics": (statistics, "function", "'batch_statistics'", "nothing"),
    "shape of statistics": (
        lambda odd: distributed.batch_statistics(embeddings(d=D + odd)),
        "shape",
        "(2, 6)",
        "(2, 7)",
    ),
    "all_gather": (
        lambda odd: distributed.all_gather(embeddings(N + odd)[0]),
        "samples",
        "5",
        "6",
    ),
}


def differ(rank: int, world: int, name: str) -> Any:
    return DIFFERENT[name][0](rank == ODD)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_calls_are_one_error_on_all_ranks(name: str) -> None:
    _, what, most, odd = DIFFERENT[name]
    failures = outcomes(differ, WORLD, name)
    assert [type(failure) for failure in failures] == [Failure] * WORLD
    assert {failure.kind for failure in failures} == {"RuntimeError"}
    (message,) = {failure.message for failure in failures}
    assert "expected the same call on all ranks" in message
    values = f"{most} on rank 0, 2; {odd} on rank 1" if most is not None else ""
    assert f"{what}: {values}" in message


def agree(rank: int, world: int, name: str) -> str:
    return refusal(lambda: DIFFERENT[name][0](False))


def test_the_same_calls_are_no_error() -> None:
    """The errors above come from the differences, not from the calls."""
    for name in DIFFERENT:
        if name != "loss or statistics":
            assert run(agree, WORLD, name) == [""] * WORLD, name


def only_what_differs(rank: int, world: int) -> str:
    return refusal(lambda: variance_loss(embeddings(), gamma=1.0 + (rank == ODD)))


def test_the_error_names_nothing_that_is_the_same() -> None:
    (message,) = set(run(only_what_differs, WORLD))
    assert message.count("on rank") == 2


def later(rank: int, world: int, debug: str) -> list[str]:
    """After a first call: slices of another seed, one other slice, another option."""
    os.environ["VICREG_LOSSES_DEBUG"] = debug
    try:
        losses = [SlicedSketchLoss(K, seed=seed) for seed in (0, rank)]
        calls = [lambda loss=loss: loss(embeddings()) for loss in losses]
        w = oracles.unit_directions(D, 6)
        calls.append(lambda: sliced_sketch_loss(embeddings(), directions=w))
        other = torch.cat([w[:, :5], w[:, 5:] * (-1) ** rank], 1)
        calls.append(lambda: sliced_sketch_loss(embeddings(), directions=other))
        calls.append(lambda: sketched(quantiles=("paper", "exact", "paper")[rank]))
        return [refusal(call) for call in calls]
    finally:
        del os.environ["VICREG_LOSSES_DEBUG"]


@pytest.mark.parametrize("debug", ["", "0", "1"])
def test_later_calls(debug: str) -> None:
    """Options and some numbers of the slices are looked at in every call; all when debugging."""
    for first, seeds, second, one_slice, option in run(later, WORLD, debug):
        assert first == second == ""
        assert "seed, step or directions: " in seeds
        assert ("seed, step or directions: " in one_slice) == (debug == "1")
        assert "quantiles: " in option


def in_sub_groups(rank: int, world: int) -> tuple[str, str]:
    """Two groups agree each for itself on what the whole world does not."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    gamma, ours = 1.0 + rank // 2, pairs[rank // 2]
    alone = refusal(lambda: variance_loss(embeddings(), gamma=gamma, process_group=ours))
    return alone, refusal(lambda: variance_loss(embeddings(), gamma=gamma))


def test_only_ranks_of_the_group_must_agree() -> None:
    for alone, together in run(in_sub_groups, 4):
        assert alone == ""
        assert "gamma" in together
