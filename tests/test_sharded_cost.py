"""What a rank sends, computes and holds is as `distributed.plan` says, at 8 to 4096 ranks."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from costs import SAMPLES, SLICES, Case, differences, measure, measured, world
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from vicreg_losses import _moments, _sharded, _sharded_sketch, distributed
from vicreg_losses._plan import _REQUESTS
from vicreg_losses._torch import CHUNK

WORLDS = 8, 64, 512, 4096
DIMENSIONS = 256, 2048, 8192
DTYPES = torch.float32, torch.bfloat16


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("term", _REQUESTS)
def test_costs_are_as_planned(term: str, ranks: int) -> None:
    for dimensions in DIMENSIONS:
        for dtype in DTYPES:
            case = Case(term, ranks, dimensions, dtype)
            assert not differences(case, measured(case)), (case, measured(case), case.plan())


FORCED = [
    *[
        (term, "strategy", name)
        for term in ("covariance", "vicreg")
        for name in ("gram", "feature")
    ],
    *[(term, "exchange", "samples") for term in ("wasserstein", "epps_pulley", "visreg", "lejepa")],
    *[(term, "exchange", "slices") for term in ("wasserstein", "visreg")],
    *[(term, "per_rank", True) for term in ("wasserstein", "epps_pulley")],
]


@pytest.mark.parametrize(("term", "option", "value"), FORCED)
def test_forced_choices_cost_as_planned(term: str, option: str, value: Any) -> None:
    slices = 64 if option == "per_rank" else SLICES
    for ranks in (8, 512):
        case = Case(term, ranks, 512, torch.bfloat16, ((option, value),), slices=slices)
        assert not differences(case, measured(case)), (case, measured(case), case.plan())


SENDS_SAMPLES = [("covariance", (("strategy", "gram"),)), ("lejepa", (("exchange", "samples"),))]


@pytest.mark.parametrize(("term", "options"), [*((t, ()) for t in _REQUESTS), *SENDS_SAMPLES])
def test_messages_are_the_same_on_all_ranks(term: str, options: tuple[Any, ...]) -> None:
    """With fewer samples or none, on a rank without slices, with or without a gradient."""
    case = Case(term, 64, 256, options=options, slices=65)
    planned = [(message.collective, message.size) for message in case.plan().messages]
    for other in (
        case,
        replace(case, keep=False),
        replace(case, samples=3, rank=1),
        replace(case, samples=0, rank=63),
        replace(case, samples=0, rank=63, keep=False),
    ):
        assert measured(other).forward == planned
        assert measured(other).backward == []


@pytest.mark.parametrize("term", _REQUESTS)
def test_what_is_sent_follows_from_the_messages(term: str) -> None:
    for ranks in WORLDS:
        case = Case(term, ranks, 2048)
        factor = {
            "all_gather": ranks - 1,
            "all_reduce": 2 * (ranks - 1) / ranks,
            "all_to_all": (ranks - 1) / ranks,
        }
        plan = case.plan()
        each = [factor[collective] * size for collective, size in measured(case).forward]
        assert [message.sent for message in plan.messages] == [math.floor(x) for x in each]
        assert plan.sent == sum(message.sent for message in plan.messages)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_sketches_send_the_same_for_any_number_of_ranks(dimensions: int) -> None:
    slices = [Case("wasserstein", w, dimensions, options=(("exchange", "slices"),)) for w in WORLDS]
    sizes = [[m[1] for m in measured(c).forward if m[0] == "all_to_all"] for c in slices]
    assert sizes == [[SLICES * SAMPLES * 4] * 2] * len(WORLDS)
    sums = [measured(Case("epps_pulley", w, dimensions)).forward for w in WORLDS]
    assert sums == [[("all_reduce", (SLICES * 32 + 1) * 4)]] * len(WORLDS)


def test_no_loop_over_ranks() -> None:
    """As many operations at 4096 ranks as at fewer, wherever the messages are the same."""
    counts: dict[tuple[Any, ...], dict[int, int]] = {}
    for term in _REQUESTS:
        for ranks in WORLDS:
            for dimensions in DIMENSIONS:
                case = Case(term, ranks, dimensions)
                plan = case.plan()
                kinds = tuple((message.collective, message.carries) for message in plan.messages)
                key = term, dimensions, plan.strategy, kinds
                counts.setdefault(key, {})[ranks] = measured(case).operations
    for (term, dimensions, strategy, _), by_ranks in counts.items():
        if strategy != "gram":  # with one slice a rank, two copies fewer
            spread = max(by_ranks.values()) - min(by_ranks.values())
            assert spread <= 2, (term, dimensions, by_ranks)
    for term in _REQUESTS:
        assert any(4096 in by and len(by) > 1 for key, by in counts.items() if key[0] == term)
    assert max(by[4096] for by in counts.values() if 4096 in by) < 400


@pytest.mark.parametrize("term", ["wasserstein", "epps_pulley"])
def test_no_loop_over_ranks_where_samples_are_sent(term: str) -> None:
    cases = [Case(term, w, 256, options=(("exchange", "samples"),)) for w in (64, 4096)]
    # A rank of 4096 has one slice, whose rows need no copy.
    assert abs(measured(cases[0]).operations - measured(cases[1]).operations) <= 2


def gram_chunks(ranks: int, dimensions: int) -> int:
    return -(-ranks // max(1, CHUNK // (SAMPLES * dimensions)))


def test_rows_of_the_gram_matrix_are_made_by_chunks() -> None:
    """As many operations for each chunk of 2^24 numbers."""
    worlds = 512, 2048, 4096
    cases = [Case("covariance", w, 256, options=(("strategy", "gram"),)) for w in worlds]
    counts = [measured(case).operations for case in cases]
    chunks = [gram_chunks(w, 256) for w in worlds]
    assert chunks == [2, 8, 16]
    assert (counts[2] - counts[1]) * (8 - 2) == (counts[1] - counts[0]) * (16 - 8)
    assert counts[2] - counts[1] < 8 * 40


@pytest.mark.parametrize("term", _REQUESTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rank(term: str, dtype: torch.dtype) -> None:
    """As measured on the code that serves one rank; the memory to within half of it."""
    for dimensions in (64, 2048):
        case = Case(term, 1, dimensions, dtype)
        plan, found = case.plan(), measured(case)
        assert plan.messages == () == tuple(found.forward + found.backward)
        assert plan.sent == 0
        assert not differences(case, found) - {"memory"}
        assert 0.9 * found.memory <= plan.memory <= 1.5 * found.memory


# Changes of the library, and in what they are seen.
def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sends_twice(x: Tensor, group: Any) -> Tensor:
        function(x.clone(), group)
        return function(x, group)

    return sends_twice


def by_ranks(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, group: torch.stack([row.clone() for row in function(x, group)])


def wasteful(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept: list[Tensor] = []

    def keeps(x: Tensor, group: Any) -> Tensor:
        kept.extend((x.clone(), x.clone()))
        return function(x, group)

    return keeps


def sends_in_backward(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scale(*args: Any) -> Tensor:
        out = function(*args)
        dist.all_reduce(out)
        return out

    return scale


def again(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: [function(*args) for _ in range(2)][1]


WASSERSTEIN = Case("wasserstein", 64, 2048)
GRAM = Case("covariance", 64, 8192, torch.bfloat16)
MUTANTS: list[tuple[Case, Any, str, Callable[[Any], Any], str]] = [
    (Case("variance", 64, 8192), _moments, "all_reduce_", twice, "messages"),
    (WASSERSTEIN, _sharded, "all_reduce_", twice, "messages"),
    (GRAM, _sharded_sketch, "wire_dtype", lambda _: lambda *_: torch.float32, "messages memory"),
    (WASSERSTEIN, _sharded_sketch, "all_to_all", wasteful, "memory"),
    (WASSERSTEIN, _sharded, "finite_scale", sends_in_backward, "backward"),
    (GRAM, _sharded, "gram_rows", again, "flops"),
    (WASSERSTEIN, _sharded, "finite_scale", lambda function: function, ""),
]


@pytest.mark.parametrize(("case", "module", "name", "change", "seen"), MUTANTS)
def test_a_change_of_cost_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    case: Case,
    module: Any,
    name: str,
    change: Callable[[Any], Any],
    seen: str,
) -> None:
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    assert differences(case, measure(case)) == set(seen.split())


def test_a_loop_over_ranks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    once = measured(WASSERSTEIN).operations  # kept, so before the change
    monkeypatch.setattr(_sharded_sketch, "all_to_all", by_ranks(_sharded_sketch.all_to_all))
    assert measure(WASSERSTEIN).operations - once >= 2 * 64


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda count: count.item(), DataDependentOutputException),
        (lambda count: count.cpu(), AssertionError),
        (lambda count: bool(count > 0), DataDependentOutputException),
        (lambda count: torch.arange(9, device=count.device)[count.long()], None),
        (lambda count: count.new_tensor(3.0), AssertionError),
        (lambda count: torch.tensor(3.0, device=count.device), AssertionError),
        (lambda count: count.view(1)[count.view(1) > 0], DynamicOutputShapeException),
    ],
)
def test_reading_or_writing_the_device_is_seen(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[Tensor], Any], error: type[Exception] | None
) -> None:
    quantiles = _sharded_sketch.padded_quantiles

    def reads(count: Tensor, *args: Any) -> Tensor:
        read(count)
        return quantiles(count, *args)

    monkeypatch.setattr(_sharded_sketch, "padded_quantiles", reads)
    with pytest.raises(error or DataDependentOutputException):
        measure(WASSERSTEIN)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"term": "barlow"}, ValueError, "term: expected one of 'variance', .* got 'barlow'"),
    ({"samples": 0}, ValueError, "samples: expected at least 1, got 0"),
    ({"samples": 2.5}, TypeError, "samples: expected an int, got float"),
    ({"dimensions": -1}, ValueError, "dimensions: expected at least 1, got -1"),
    ({"slices": 0}, ValueError, "slices: expected at least 1"),
    ({"views": 0}, ValueError, "views: expected at least 1"),
    ({"knots": 1}, ValueError, "knots: expected at least 2"),
    ({"ranks": 0}, ValueError, "ranks: expected at least 1"),
    ({"ranks": True}, TypeError, "ranks: expected an int, got bool"),
    ({"strategy": "rows"}, ValueError, "strategy: expected one of 'auto', 'gram', 'feature'"),
    ({"exchange": "sums"}, ValueError, "exchange: expected one of 'auto', 'slices', 'samples'"),
    ({"exchange": "slices", "per_rank": True}, ValueError, "exchange: .* with per_rank"),
    ({"dtype": torch.int64}, TypeError, "dtype: expected one of .* got torch.int64"),
    ({"dtype": "float32"}, TypeError, "dtype: expected one of .* got float32"),
    ({"process_group": "no such group"}, RuntimeError, "process_group: expected a group"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"term": "vicreg", "samples": 256, "dimensions": 64, **changed}
    with pytest.raises(error, match=message):
        distributed.plan(**arguments)


def test_ranks_are_those_of_the_group() -> None:
    assert distributed.plan("vicreg", 256, 64).ranks == 1
    with world(16) as group:
        for given in ({}, {"process_group": group}, {"process_group": group.group_name}):
            assert distributed.plan("vicreg", 256, 64, **given) == distributed.plan(
                "vicreg", 256, 64, ranks=16
            )
        assert distributed.plan("vicreg", 256, 64, ranks=1).messages == ()
    assert distributed.plan("vicreg", 256, 64).messages == ()


def test_one_rank_has_the_strategy_of_one() -> None:
    """The smaller product; several ranks look at bytes."""
    choices = {"samples": 300, "dimensions": 256, "dtype": torch.bfloat16}
    assert distributed.plan("covariance", **choices, ranks=1).strategy == "feature"
    assert distributed.plan("covariance", 100, 256, ranks=1).strategy == "gram"
    for term in ("wasserstein", "epps_pulley"):
        assert distributed.plan(term, 256, 64, ranks=1).strategy == "local"


def test_text() -> None:
    lines = str(distributed.plan("visreg", 256, 2048, slices=4096, views=2, ranks=64)).splitlines()
    assert lines[0].startswith("visreg over 64 ranks by slices: ")
    assert "17.2 GFLOP" in lines[0]
    assert lines[0].endswith("B of memory on each")
    assert lines[1:] == [
        "  all_reduce of sums: 32.8 kB",
        "  all_reduce of squares: 65.5 kB",
        "  all_to_all of projections: 8.39 MB",
        "  all_to_all of residuals: 8.39 MB",
        "  all_reduce of squared deviations, sketch: 16 B",
    ]
    # 2 (64 - 1) / 64 of what is reduced, and 63 / 64 of what is exchanged.
    assert "16.7 MB sent" in lines[0]
    assert str(distributed.plan("center", 256, 64, ranks=1)).splitlines() == [
        "center over 1 ranks by moments: 0 B sent, 0 FLOP, 131 kB of memory on each"
    ]
