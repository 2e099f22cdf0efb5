"""The two ways to sort: the same bits, whatever is sorted."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vicreg_losses import _sort, _torch

Sort = Callable[[Tensor, Tensor, bool], Tensor]
SHAPES = [
    (1, 2),
    (1, 3),
    (5, 2),
    (3, 64),
    (40, 1000),
    (200, 700),
    (2, 65536),
    (3, 70000),
    (1, 70000),
]
BLOCK = _sort._BLOCK

# Of "huge", which standardized embeddings cannot reach.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in square:RuntimeWarning")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def some(p: Tensor, values: list[float]) -> Tensor:
    """Every third number replaced by one of these."""
    chosen = torch.tensor(values)[torch.arange(p.numel()) // 3 % len(values)].view(p.shape)
    return torch.where(torch.arange(p.numel()).view(p.shape) % 3 == 0, chosen, p)


TINY, HUGE = 2.0**-149, torch.finfo(torch.float32).max
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda p: p,
    "sorted": lambda p: p.sort(1).values,
    "reversed": lambda p: p.sort(1, descending=True).values,
    "ties": lambda p: p.round(),
    "all equal": lambda p: torch.full_like(p, -1.5),
    "signed zeros": lambda p: some(p.round(), [0.0, -0.0, -0.0, 0.0, -0.0]),
    "denormals": lambda p: some(p * 2.0**-140, [TINY, -TINY, 0.0, 3 * TINY]),
    "huge": lambda p: some(p, [HUGE, -HUGE, 1e30, -1e30]),
    "infinities": lambda p: some(p, [math.inf, -math.inf]),
}


def sort_by(sort: Sort, p: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    residual = p.clone(memory_format=torch.contiguous_format)
    sums = sort(residual, _torch.quantiles(p.shape[1], "paper", p), keep)
    return sums, residual


def bits(x: Tensor) -> Tensor:
    """Equal for equal floats alone: -0.0 and 0.0 differ."""
    return x.contiguous().view({torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_bits(kind: str, shape: tuple[int, int]) -> None:
    p = KINDS[kind](normal(*shape))
    sums, residual = sort_by(_sort._torch_sort_residual_, p, True)
    numpy_sums, numpy_residual = sort_by(_sort._numpy_sort_residual_, p, True)
    assert torch.equal(bits(numpy_residual), bits(residual))
    assert torch.equal(bits(numpy_sums), bits(sums))


@pytest.mark.parametrize("shape", [(5, 2), (40, 1000), (3, 70000)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["_torch_sort_residual_", "_numpy_sort_residual_"])
def test_values_alone_are_the_same(way: str, kind: str, shape: tuple[int, int]) -> None:
    p, sort = KINDS[kind](normal(*shape)), getattr(_sort, way)
    assert torch.equal(bits(sort_by(sort, p, False)[0]), bits(sort_by(sort, p, True)[0]))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("nan", [math.nan, -math.nan], ids=["nan", "-nan"])
@pytest.mark.parametrize("way", ["_torch_sort_residual_", "_numpy_sort_residual_"])
def test_nan_reaches_the_sum_of_its_row_alone(way: str, nan: float, keep: bool) -> None:
    p = normal(4, 50)
    p[1, 7] = math.copysign(nan, nan)
    p[3, :] = nan
    sums, _ = sort_by(getattr(_sort, way), p, keep)
    assert sums.isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_residual_is_by_rank(kind: str, dtype: torch.dtype) -> None:
    """Row by row in Python: a stable sort, and each number less the target of its rank."""
    p = KINDS[kind](normal(3, 97)).to(dtype)
    targets = _torch.quantiles(97, "paper", p)
    sums, residual = sort_by(_sort.sort_residual_, p, True)
    for row, expected_from in enumerate(p.tolist()):
        order = sorted(range(97), key=expected_from.__getitem__)
        expected = torch.empty(97, dtype=dtype)
        expected[torch.tensor(order)] = p[row, order] - targets
        assert torch.equal(residual[row], expected)
        total = sum(r * r for r in expected.double().tolist())
        if torch.isfinite(sums[row]):
            # Each of the squares and of the (pairwise) additions rounds once.
            assert sums[row].item() == pytest.approx(total, rel=16 * torch.finfo(dtype).eps)
        else:
            assert total > torch.finfo(dtype).max or math.isnan(total)


@pytest.mark.parametrize("keep", [True, False])
def test_ranks_of_equal_numbers_are_their_order(keep: bool) -> None:
    """All equal: the residual of the i-th is that of rank i, in every row and block."""
    samples = 700
    p = torch.zeros(3 * BLOCK // samples, samples)
    for sort in (_sort._torch_sort_residual_, _sort._numpy_sort_residual_):
        sums, residual = sort_by(sort, p, keep)
        targets = _torch.quantiles(samples, "paper", p)
        assert (sums == sums[0]).all()
        if keep:
            assert torch.equal(residual, (-targets).expand_as(p))


@pytest.mark.parametrize("slices", [1, BLOCK // 512 - 1, BLOCK // 512, BLOCK // 512 + 1])
def test_block_borders(slices: int) -> None:
    """Each row has the result that it has alone."""
    p = normal(slices, 512)
    sums, residual = sort_by(_sort._numpy_sort_residual_, p, True)
    for row in {0, slices // 2, slices - 2, slices - 1} - {-1}:
        alone_sums, alone = sort_by(_sort._numpy_sort_residual_, p[row : row + 1], True)
        assert torch.equal(alone[0], residual[row])
        assert alone_sums[0] == sums[row]


def test_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _sort._numpy_is_faster() is _sort._numpy_is_faster()
    results = []
    for choice in (True, False):
        monkeypatch.setattr(_sort, "_numpy_is_faster", lambda choice=choice: choice)
        results.append(sort_by(_sort.sort_residual_, normal(7, 300), True))
    assert all(map(torch.equal, *results))
