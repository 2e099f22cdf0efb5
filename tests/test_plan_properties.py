"""Plans of the kernels at any size, on any chip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from vicreg_losses.kernels import plan
from vicreg_losses.kernels.launch import SHARED, Target

CHIPS = [
    Target("sm_80", 108, SHARED["sm_80"]),
    Target("sm_90", 132, SHARED["sm_90"]),
    Target("sm_100", 148, SHARED["sm_100"]),
    Target("gfx942", 304, SHARED["gfx942"]),
    Target("sm_86", 46, 101376),
]
SIZES = st.integers(2, 70_000)


@given(
    st.sampled_from(CHIPS), st.integers(1, 12), SIZES, SIZES, st.booleans(), st.sampled_from([1, 2])
)
def test_plans(
    chip: Target, views: int, samples: int, dimensions: int, gram: bool, parts: int
) -> None:
    cut = plan.plan(chip, (views, samples, dimensions), gram, parts)
    for blocks, along in ((cut.inner, cut.padded[1 if gram else 0]), (cut.gradient, cut.side)):
        step = 2 * parts * (blocks.rows + blocks.columns) * blocks.depth
        assert step * (blocks.stages - (1 if chip.arch.startswith("gfx") else 0)) <= chip.shared
        assert along % blocks.depth == 0
        assert blocks.columns % blocks.rows == 0
    assert cut.side % cut.inner.columns == 0
    assert cut.padded[0] % cut.gradient.rows == 0
    assert cut.padded[1] % cut.gradient.columns == 0
    assert cut.padded[1] % 64 == 0
    for size, padded in zip((samples, dimensions), cut.padded, strict=True):
        assert size <= padded < size + 256
    blocks = cut.side // cut.inner.columns
    assert cut.tiles == (cut.inner.columns // cut.inner.rows) * blocks * (blocks + 1) // 2
    total = views * cut.tiles * cut.steps
    assert (cut.programs - 1) * cut.span < total <= cut.programs * cut.span
    if cut.is_shared:
        assert cut.programs <= chip.processors  # all at once
        assert cut.tickets == 1 + views * cut.tiles


@given(st.sampled_from(CHIPS), st.integers(1, 12), SIZES, SIZES)
def test_strips(chip: Target, views: int, samples: int, dimensions: int) -> None:
    cut = plan.strips(chip, views, samples, dimensions)
    assert cut.strips * cut.columns >= dimensions > (cut.strips - 1) * cut.columns
    assert cut.splits * cut.split_rows >= samples > (cut.splits - 1) * cut.split_rows
    assert cut.split_rows % cut.rows == 0
    assert 1 <= cut.splits <= 128
