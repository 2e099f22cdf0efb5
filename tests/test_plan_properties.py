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


@given(st.sampled_from(CHIPS), st.integers(2, 20_000), st.booleans())
def test_networks(chip: Target, samples: int, exact: bool) -> None:
    """A permutation of the bits, the local ones first; up to the lengths that are promised."""
    network = plan.network(chip, samples, exact)
    if samples > (8192 if exact else 16384):
        assert network is None
        return
    bits = range(network.bits)
    assert samples <= 1 << network.bits < max(128, 2 * samples)
    assert sorted(network.places) == [*bits]
    flags = [network.local[place] for place in network.places]
    assert flags == sorted(flags, reverse=True)
    assert set(flags) <= {0, 1}
    lanes = 6 if chip.arch.startswith("gfx") else 5
    assert 2 ** (network.bits - sum(flags)) == network.warps << lanes
    assert 2 ** sum(flags) <= 32  # words of a thread


@given(
    st.sampled_from(CHIPS),
    st.integers(1, 12),
    SIZES,
    SIZES,
    SIZES,
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_sketch_plans(
    chip: Target, views: int, samples: int, dimensions: int, slices: int, parts: int, sorts: bool
) -> None:
    cut = plan.sketch_plan(chip, (views, samples, dimensions), slices, parts, sorts)
    blocks = cut.gradient
    assert cut.padded[0] % blocks.rows == 0
    assert cut.padded[1] % blocks.columns == 0
    assert cut.slices % blocks.depth == cut.chunk % blocks.depth == 0
    assert blocks.depth % 16 == 0  # slices of one program of the directions
    sizes = (samples, dimensions, slices), (*cut.padded, cut.slices)
    assert all(size <= padded < size + 256 for size, padded in zip(*sizes, strict=True))
    projections = cut.chunk * views * cut.padded[0]
    assert cut.chunk == blocks.depth or projections <= plan._PROJECTIONS[sorts]
