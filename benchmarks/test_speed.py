"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=param:case``."""

import pytest

from benchmarks.cases import CASES, Case
from benchmarks.measure import step


@pytest.mark.parametrize("which", ["published", "ours"])
@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda c: c.name)
def test_speed(benchmark, case: Case, which: str) -> None:
    benchmark.group = case.name
    z, loss = case.embeddings(), getattr(case, which)()
    step(loss, z)
    benchmark.pedantic(step, args=(loss, z), rounds=5, iterations=1)
