"""The diagnostics: exact ranks, numpy's numbers, and a word for every thing that goes wrong."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from needed import needs
from torch import Tensor

from vicreg_losses import diagnostics
from vicreg_losses.diagnostics import EmbeddingReport, effective_rank, embedding_report

NEEDS_MATPLOTLIB = needs("matplotlib")[0]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def of_singular_values(values: Tensor, n: int, d: int) -> Tensor:
    """A matrix (n, d) of these singular values, dense."""
    left, right = (torch.linalg.qr(normal(size, len(values), size)).Q for size in (n, d))
    return left @ (values[:, None] * right.T)


@pytest.mark.parametrize("shape", [(64, 20), (20, 64), (33, 33)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7, 20])
def test_rank_of_equal_singular_values(rank: int, shape: tuple[int, int]) -> None:
    """At every scale, and above float64's rounding of N D products in a Gram matrix."""
    z = of_singular_values(torch.ones(rank, dtype=torch.float64), *shape)
    for scale in (1.0, 1e-12, 1e12):
        assert effective_rank(scale * z) == pytest.approx(rank, rel=1e-6)


@pytest.mark.parametrize("shape", [(8, 2048), (256, 2048), (2048, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_one_is_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows that are multiples of one by powers of 2, so exactly rank 1 in any dtype."""
    n, d = shape
    z = 2.0 ** torch.arange(n).remainder(5)[:, None] * normal(1, d).float()
    assert effective_rank(z.to(dtype)) == pytest.approx(1, abs=1e-6)


def test_rank_of_unequal_singular_values() -> None:
    """The exponential of the entropy of their shares, not of the shares of their squares."""
    values = torch.tensor([8.0, 4, 2, 1, 1], dtype=torch.float64)
    shares = values / values.sum()
    expected = math.exp(-(shares * shares.log()).sum())
    for shape in ((40, 12), (12, 40)):
        assert effective_rank(of_singular_values(values, *shape)) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 16, 8), (64, 8), (8, 64)], ids=str)
def test_rank_of_random_embeddings(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = normal(math.prod(shape[:-1]), shape[-1]).view(shape).to(dtype)
    pooled = z.double().flatten(0, -2).numpy()
    for center in (False, True):
        x = pooled - pooled.mean(0) if center else pooled
        singular = np.linalg.svd(x, compute_uv=False)
        shares = singular[singular > 1e-7 * singular[0]]
        shares = shares / shares.sum()
        expected = np.exp(-(shares * np.log(shares)).sum())
        assert effective_rank(z, center=center) == pytest.approx(expected, rel=1e-5)


def test_rank_of_nothing() -> None:
    assert effective_rank(torch.zeros(5, 3)) == 0
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert effective_rank(torch.ones(5, 3), center=True) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rank_of_non_finite_embeddings_is_nan(bad: float) -> None:
    z = normal(8, 4)
    z[3, 2] = bad
    assert math.isnan(effective_rank(z))
    report = embedding_report(z)
    assert math.isnan(report.effective_rank)
    assert len(report.problems) == 1
    assert "NaN or infinite" in report.problems[0]
    assert report.problem_kinds == ("non-finite",)
    assert "NaN or infinite" in str(report)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 16, 8), (64, 8), (8, 64)], ids=str)
def test_report_has_the_numbers_of_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = oracles.embeddings(*(1, *shape)[-3:]).view(shape).to(dtype)
    z[..., 2] = 0.25
    x = z.double().flatten(0, -2).numpy()
    n, d = x.shape
    report = embedding_report(z)
    std = x.std(0, ddof=1)
    assert (report.samples, report.dimensions) == (n, d)
    assert report.std.dtype == torch.float64
    np.testing.assert_allclose(report.std.numpy(), std, rtol=1e-12, atol=1e-15)
    for probability, quantile in report.std_quantiles:
        assert quantile == pytest.approx(np.quantile(std, probability), rel=1e-12, abs=1e-15)
    assert report.std_min == pytest.approx(std.min(), abs=1e-15)
    assert report.std_median == pytest.approx(np.median(std))
    assert report.dead_dimensions == 1
    correlation = np.corrcoef(np.delete(x, 2, 1).T)
    expected = np.abs(correlation - np.eye(d - 1)).sum() / ((d - 1) * (d - 2))
    # The product of standardized columns is one of float32.
    assert report.mean_abs_correlation == pytest.approx(expected, rel=1e-5)
    assert report.effective_rank == effective_rank(z)
    assert not report.unit_norm


def one_dimension_alive() -> Tensor:
    z = torch.zeros(64, 8)
    z[:, 0] = normal(64, 1)[:, 0]
    return z


# The kind and the words of what is wrong, embeddings in which it is, and in which it just is not.
PROBLEMS: dict[str, tuple[str, Callable[[], Tensor], Callable[[], Tensor]]] = {
    "collapse": (
        "collapse: no dimension has a standard deviation above",
        lambda: 5 + 8e-3 * normal(512, 8).clamp(-1, 1),
        lambda: 2e-2 * normal(512, 8),
    ),
    "dead dimensions": (
        "1 of 8 dimensions do not vary",
        lambda: normal(64, 8) * torch.tensor([1.0] * 7 + [5e-4]),
        lambda: normal(64, 8) * torch.tensor([1.0] * 7 + [2e-3]),
    ),
    "unit norm": (
        "rows have length 1",
        lambda: torch.nn.functional.normalize(normal(64, 8), dim=1),
        lambda: 1.02 * torch.nn.functional.normalize(normal(64, 8), dim=1),
    ),
    "low rank": (
        "dimensional collapse: an effective rank of",
        lambda: of_singular_values(20 * torch.ones(2, dtype=torch.float64), 64, 40),
        lambda: of_singular_values(20 * torch.ones(5, dtype=torch.float64), 64, 40),
    ),
    "correlation": (
        "dimensions repeat each other: mean |correlation|",
        lambda: normal(256, 1) + normal(256, 8),
        lambda: normal(256, 1) * 0.3 + normal(256, 8),
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_has_its_words(name: str) -> None:
    words, bad, good = PROBLEMS[name]
    report = embedding_report(bad())
    told = dict(zip(report.problem_kinds, report.problems, strict=True))
    assert told[name].startswith(words)
    assert words in str(report)
    assert not any(problem.startswith(words) for problem in embedding_report(good()).problems)


def test_healthy_embeddings_have_no_problem() -> None:
    report = embedding_report(normal(256, 32))
    assert report.problems == ()
    assert "nothing wrong found" in str(report)


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (5, 1), (2, 1000), (1, 2, 4)], ids=str)
def test_report_of_the_smallest_batches(shape: tuple[int, ...]) -> None:
    report = embedding_report(normal(math.prod(shape[:-1]), shape[-1]).view(shape))
    assert str(report)
    assert math.isnan(report.mean_abs_correlation) == (shape[-1] < 2)
    assert 0 < report.effective_rank <= min(shape[-2:]) * (1 + 1e-9)


def test_report_of_one_living_dimension() -> None:
    report = embedding_report(one_dimension_alive())
    assert report.dead_dimensions == 7
    assert math.isnan(report.mean_abs_correlation)
    assert any("7 of 8" in problem for problem in report.problems)


def test_report_is_printable() -> None:
    text = str(embedding_report(normal(64, 8)))
    for words in ("64 samples x 8 dimensions", "std", "dead dimensions   0 of 8", "unit-norm"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120
    assert text == text.strip()


def test_report_is_frozen_and_leaves_no_graph() -> None:
    z = normal(64, 8).requires_grad_()
    report = embedding_report(z)
    assert not report.std.requires_grad
    assert isinstance(effective_rank(z), float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.samples = 1


def test_input_is_not_written() -> None:
    z = normal(64, 8)
    before = z.clone()
    embedding_report(z)
    effective_rank(z, center=True)
    assert torch.equal(z, before)


def test_more_dimensions_than_a_quantile_takes() -> None:
    """`torch.quantile` refuses more than 2^24 elements; embeddings are far from that."""
    assert embedding_report(normal(4, 8192)).dimensions == 8192


def test_scalars_for_a_logger() -> None:
    report = embedding_report(PROBLEMS["dead dimensions"][1]())
    scalars = report.as_dict()
    assert all(type(value) is float for value in scalars.values())
    quantiles = dict(report.std_quantiles)
    for name, probability in {"min": 0, "p5": 0.05, "p25": 0.25, "median": 0.5}.items():
        assert scalars[f"std_{name}"] == quantiles[probability]
    for name, probability in {"p75": 0.75, "p95": 0.95, "max": 1}.items():
        assert scalars[f"std_{name}"] == quantiles[probability]
    for name in ("effective_rank", "dead_dimensions", "mean_abs_correlation", "samples"):
        assert scalars[name] == getattr(report, name)
    assert (scalars["unit_norm"], scalars["problems"], len(scalars)) == (0, 1, 13)


@pytest.mark.parametrize("shape", [(64, 20), (20, 64)], ids=str)
def test_singular_values(shape: tuple[int, int]) -> None:
    values = torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)
    found = embedding_report(1e3 * of_singular_values(values, *shape)).singular_values
    assert found.shape == (20,)
    torch.testing.assert_close(found[:4], 1e3 * values)
    assert not found[4:].any()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_does_not_overflow(scale: float) -> None:
    z = normal(32, 8)
    assert effective_rank(scale * z) == pytest.approx(effective_rank(z))


def test_autocast_changes_nothing() -> None:
    z = normal(64, 8).float()
    expected = embedding_report(z).as_dict()
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding_report(z).as_dict() == expected


# Matplotlib's dependencies warn of their own.
@NEEDS_MATPLOTLIB
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_report_is_plottable(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    report = embedding_report(oracles.embeddings(1, 64, 8)[0])
    std = report.plot()
    figure = std.figure
    assert figure.axes[0] is std
    spectrum = figure.axes[1]
    np.testing.assert_array_equal(std.lines[0].get_ydata(), np.sort(report.std.numpy())[::-1])
    expected = report.singular_values / report.singular_values[0]
    np.testing.assert_allclose(spectrum.lines[0].get_ydata(), expected.numpy())
    assert spectrum.lines[1].get_xdata()[0] == report.effective_rank
    assert "effective rank" in spectrum.get_title()
    figure.savefig(tmp_path / "report.png")
    plt.close(figure)
    assert (tmp_path / "report.png").stat().st_size > 1000


# Likewise.
@NEEDS_MATPLOTLIB
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("z", [torch.zeros(4, 3), torch.full((4, 3), math.nan), normal(2, 1)])
def test_plot_of_the_worst(z: Tensor, tmp_path: Path) -> None:
    """In a figure of its own, and on axes that are given, as a part of a larger one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2)
    assert embedding_report(z).plot(ax=axes[1, 0]) is axes[1, 0]
    assert [len(one.lines) for one in axes.flat] == [0, 0, 2, 0]
    for number, drawn in enumerate((figure, embedding_report(z).plot().figure)):
        drawn.savefig(tmp_path / f"{number}.png")
        plt.close(drawn)


def test_public_names() -> None:
    assert set(diagnostics.__all__) == {
        *("EmbeddingMonitor", "EmbeddingReport", "TermGradient"),
        *("effective_rank", "embedding_report", "term_gradients"),
    }
    assert isinstance(embedding_report(normal(4, 2)), EmbeddingReport)
