"""The benchmark over ranks at tiny sizes; what it refuses; that the page shows what it prints."""

import csv
import json
import sys
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessRaisedException

pytest.importorskip("rich", reason="rich is not installed")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # `pytest` alone does not

from benchmarks import distributed as benchmark
from benchmarks import distributed_model as model
from benchmarks.distributed_cases import Case

PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
TINY = (
    Case("covariance", 1, 4, 12),
    Case("covariance", 1, 12, 4),
    Case("vicreg", 2, 6, 5),
    Case("wasserstein", 1, 6, 5, 7),
    Case("wasserstein", 1, 6, 5, 7, options={"slices": "per_rank"}),
    Case("epps_pulley", 1, 6, 5, 7),
    Case("visreg", 2, 6, 5, 7),
    Case("vicreg", 2, 6, 5, quick=False),
)


def test_quick_run_over_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    arguments = ["--ranks", "2", "--quick", "--seconds", "0.01", "--backend", "gloo"]
    benchmark.main([*arguments, "--out", str(tmp_path)], TINY)
    printed = capsys.readouterr().out
    assert "MEASURED over gloo" in printed
    assert benchmark.NOT_MEASURED in printed
    record = json.loads((tmp_path / "distributed.json").read_text())
    assert record["gpu"] == benchmark.NOT_MEASURED
    rows = record["measured"]
    assert [row["dimensions"] for row in rows] == [c.dimensions for c in TINY if c.quick]
    assert [row["by"] for row in rows[:2]] == ["gram", "feature"]
    assert all(row["published_ms"] > 0 < row["ours_ms"] for row in rows)
    with (tmp_path / "measured.csv").open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    with (tmp_path / "model.csv").open() as file:
        assert all("MODEL" in row["kind"] for row in csv.DictReader(file))
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_gradient_is_not_reported() -> None:
    """Half of the right one: of a trainer that adds, where the benchmark's averages."""
    wrong = Case("covariance", 1, 4, 12, options={"reduction": "sum"})
    with pytest.raises(ProcessRaisedException, match="refusing to report covariance"):
        benchmark.run(2, "gloo", [wrong], 0.01)


def cells(line: str) -> list[str]:
    """Of a row of a Markdown table, without the padding."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page_shows_the_tables_that_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--ranks"])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    titles = [f"MODEL, D = {dimensions}" for dimensions in model.DIMENSIONS]
    ends = [*(printed.index(title) for title in titles[1:]), len(printed)]
    page = [cells(line) for line in PAGE.read_text().splitlines()]
    for title, end in zip(titles, ends, strict=True):
        table = [line for line in printed[printed.index(title) + 1 : end] if line]
        assert len(table) == 2 + len(model.TERMS) * len(model.RANKS)
        begin = page.index([title.removeprefix("MODEL, ") + ":"]) + 2
        shown = page[begin : begin + len(table)]
        assert [shown[0], *shown[2:]] == [cells(table[0]), *map(cells, table[2:])]


def test_page_marks_what_is_no_measurement() -> None:
    page = PAGE.read_text()
    assert "**A MODEL, not a measurement**" in page
    assert "**Not yet measured on a GPU**" in page
    measured = page.split("## Cost, measured")[1].split("## ")[0]
    assert "MODEL" not in measured
    header = [f" {column} " for column in ("loss", "ranks", "ours by", "ratio")]
    assert all(column in measured for column in header)


@pytest.mark.parametrize(
    ("term", "ranks", "dimensions", "sent", "milliseconds", "memory"),
    [  # bytes, network, products and sorts by hand; two views of VICReg
        ("VICReg", 8, 8192, 352e6, 12.7, 671e6),
        ("VICReg", 512, 2048, 6.43e9, 151.1, 6.46e9),
        ("Wasserstein", 64, 2048, 264e6, 15.59, 2.05e9),
        ("Wasserstein", 4096, 256, 2.147e9, 595, 119e9),
    ],
)
def test_published_costs(
    term: str, ranks: int, dimensions: int, sent: float, milliseconds: float, memory: float
) -> None:
    cost = model.published(term, ranks, dimensions)
    assert cost.sent == pytest.approx(sent, rel=5e-3)
    assert 1e3 * cost.seconds == pytest.approx(milliseconds, rel=5e-3)
    assert cost.memory == pytest.approx(memory, rel=5e-3)
