"""The short run's points under pytest-benchmark: ``pytest benchmarks``."""

import pytest

from benchmarks.contenders import FIELD, Contender
from benchmarks.measure import forward, step
from benchmarks.points import QUICK, Point

CASES = [(p, c) for p in QUICK for c in FIELD[p.loss] if not c.compiled]


@pytest.mark.parametrize("call", [forward, step], ids=lambda call: call.__name__)
@pytest.mark.parametrize(
    ("point", "contender"), CASES, ids=[f"{p.name}-{c.name}" for p, c in CASES]
)
@pytest.mark.filterwarnings("ignore")  # those of other packages
def test_speed(benchmark, point: Point, contender: Contender, call) -> None:
    absence = contender.absence(point)
    if absence:
        pytest.skip(f"{contender.name}: {absence}")
    benchmark.group = f"{point.name} {call.__name__}"
    loss, views = contender.build(point), point.embeddings()
    call(loss, views)
    benchmark.pedantic(call, args=(loss, views), rounds=5, iterations=1)
