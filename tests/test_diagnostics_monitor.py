"""The monitor of a running training: when, at what cost, and after a resume."""

import copy
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vicreg_losses import VICRegLoss
from vicreg_losses.diagnostics import EmbeddingMonitor, embedding_report

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "monitor_cost.json"


def views_of(count: int, n: int, d: int, seed: int = 0) -> list[Tensor]:
    """Views of independent normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, n, d, generator=generator))


def rows_of(monitor: EmbeddingMonitor) -> Tensor:
    rows = monitor.state_dict()["rows"]
    assert isinstance(rows, Tensor)
    return rows


def test_reports_when_due() -> None:
    monitor = EmbeddingMonitor(every=5, samples=16)
    z = views_of(2, 8, 4)
    due = [monitor.update(*z) is not None for _ in range(15)]
    assert due == 3 * [False, False, False, False, True]


def test_forms_of_views_are_one() -> None:
    views = views_of(3, 12, 4)
    reports = []
    for given in (views, [views], [torch.stack(views)], [tuple(views)]):
        monitor = EmbeddingMonitor(every=1, samples=8)
        reports.append(monitor.update(*given))
    assert all(report == reports[0] for report in reports)


def test_report_is_that_of_the_rows() -> None:
    monitor = EmbeddingMonitor(every=4, samples=32)
    for step in range(4):
        scalars = monitor.update(views_of(1, 8, 5, step)[0])
    expected = embedding_report(torch.cat([views_of(1, 8, 5, step)[0] for step in range(4)]))
    assert scalars == pytest.approx(expected.as_dict(), rel=1e-12)
    assert monitor.report is not None
    assert str(monitor.report) == str(expected)


class Recorder(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[str]]:
    with Recorder() as recorder:
        yield recorder.names


def test_most_steps_run_nothing_and_none_but_the_report_waits() -> None:
    monitor = EmbeddingMonitor(every=10, samples=24)
    views = views_of(2, 8, 4)
    waits = {"_local_scalar_dense.default", "nonzero.default", "item.default"}
    for step in range(1, 11):
        with recorded() as names:
            monitor.update(*views)
        assert bool(names) == (step > 6), step  # 3 batches of 8, and one
        assert bool(waits & set(names)) == (step == 10), step


@pytest.mark.gpu
def test_no_step_waits_for_a_gpu_but_that_of_the_report() -> None:
    monitor = EmbeddingMonitor(every=4, samples=24)
    views = torch.stack(views_of(2, 8, 4)).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            assert monitor.update(views) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = monitor.update(views)
    expected = embedding_report(rows_of(monitor).cpu())
    assert found == pytest.approx(expected.as_dict(), rel=1e-5)


def test_memory_is_fixed() -> None:
    monitor = EmbeddingMonitor(every=2, samples=16)
    monitor.update(*views_of(2, 8, 4))
    monitor.update(*views_of(2, 8, 4))
    buffer = monitor._rows
    assert buffer is not None
    assert (buffer.shape, buffer.dtype) == ((16, 4), torch.float32)
    for seed in range(20):
        monitor.update(*views_of(2, 5, 4, seed))
    assert monitor._rows is buffer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    monitor = EmbeddingMonitor(every=1, samples=32)
    z = views_of(1, 32, 4)[0].to(dtype)
    assert monitor.update(z) == embedding_report(z).as_dict()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert rows_of(monitor).dtype == wide


def test_no_graph_is_kept_and_nothing_is_changed() -> None:
    monitor = EmbeddingMonitor(every=2, samples=8)
    z = views_of(1, 8, 4)[0].requires_grad_()
    before = z.detach().clone()
    y = 2 * z
    state = torch.get_rng_state()
    monitor.update(y)
    monitor.update(y)
    assert torch.equal(torch.get_rng_state(), state)
    assert not rows_of(monitor).requires_grad
    y.sum().backward()
    assert torch.equal(z.detach(), before)


def test_rows_are_copies() -> None:
    monitor = EmbeddingMonitor(every=1, samples=8)
    z = views_of(1, 8, 4)[0]
    monitor.update(z)
    expected = z.clone()
    z.zero_()
    assert torch.equal(rows_of(monitor), expected)


def test_inference_mode_and_training_share_a_monitor() -> None:
    monitor = EmbeddingMonitor(every=1, samples=8)
    z = views_of(1, 8, 4)[0]
    with torch.inference_mode():
        monitor.update(2 * z)
    assert monitor.update(z) == embedding_report(z).as_dict()
    with torch.inference_mode():
        assert monitor.update(2 * z) == embedding_report(2 * z).as_dict()


def test_autocast_changes_nothing() -> None:
    z = views_of(1, 64, 8)[0]
    with torch.autocast("cpu", torch.bfloat16):
        scalars = EmbeddingMonitor(every=1, samples=64).update(z)
    assert scalars == embedding_report(z).as_dict()


def test_beside_a_compiled_step() -> None:
    layer, loss = nn.Linear(4, 6), VICRegLoss()
    monitor = EmbeddingMonitor(every=2, samples=16)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), loss(layer(x), layer(x + 1))

    compiled = torch.compile(forward, backend="eager")
    for _ in range(2):
        z, value = compiled(views_of(1, 16, 4)[0])
        scalars = monitor.update(z)
        value.backward()
    assert scalars == pytest.approx(embedding_report(z).as_dict())


def test_correlation_of_many_dimensions_is_of_some() -> None:
    """Of 512, evenly spaced among the living; the rest of the report is of all."""
    z = views_of(1, 16, 1030)[0]
    z[:, 3:9] = 0
    scalars = EmbeddingMonitor(every=1, samples=16).update(z)
    assert scalars is not None
    alive = torch.cat([z[:, :3], z[:, 9:]], 1)
    some = alive[:, torch.linspace(0, 1023, 512).long()]
    expected = embedding_report(some).mean_abs_correlation
    assert scalars["mean_abs_correlation"] == pytest.approx(expected, rel=1e-6)
    assert scalars["dead_dimensions"] == 6
    assert scalars["effective_rank"] == embedding_report(z).effective_rank


def test_collapse_is_seen() -> None:
    monitor = EmbeddingMonitor(every=3, samples=64)
    for step in range(3):
        monitor.update(5 + 1e-5 * torch.stack(views_of(2, 32, 8, step)))
    assert monitor.report is not None
    assert "collapse" in monitor.report.problem_kinds
    assert "low rank" not in monitor.report.problem_kinds or monitor.report.effective_rank < 2


def test_non_finite_rows_are_told() -> None:
    monitor = EmbeddingMonitor(every=1, samples=8)
    z = views_of(1, 8, 4)[0]
    z[2, 1] = math.inf
    scalars = monitor.update(z)
    assert scalars is not None
    assert math.isnan(scalars["effective_rank"])
    assert monitor.report is not None
    assert monitor.report.problem_kinds == ("non-finite",)


def test_too_few_rows_for_a_report() -> None:
    """A rank of a ragged batch may have none."""
    monitor = EmbeddingMonitor(every=1, samples=8)
    assert monitor.update(torch.zeros(0, 4)) is None
    assert monitor.update(torch.zeros(1, 4)) is None
    assert monitor.update(torch.zeros(1, 4)) is not None


def test_resume_is_exact(tmp_path: Path) -> None:
    """At every step of a window, through a file that holds no code; to a rounding of float32."""
    batches = [torch.stack(views_of(2, 7, 4, seed)) for seed in range(24)]
    whole = EmbeddingMonitor(every=6, samples=20)
    expected = [whole.update(batch) for batch in batches]
    for stop in range(14):
        first = EmbeddingMonitor(every=6, samples=20)
        found = [first.update(batch) for batch in batches[:stop]]
        torch.save(first.state_dict(), tmp_path / "monitor.pt")
        second = EmbeddingMonitor(every=6, samples=20)
        second.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
        found += [second.update(batch) for batch in batches[stop:]]
        for got, want in zip(found, expected, strict=True):
            assert got == (want and pytest.approx(want, rel=1e-6)), stop


def test_state_of_a_larger_buffer_keeps_the_latest_rows() -> None:
    large, small = EmbeddingMonitor(1, samples=16), EmbeddingMonitor(1, samples=4)
    for step in range(3):
        large.update(views_of(1, 8, 2, step)[0])
    small.load_state_dict(large.state_dict())
    assert torch.equal(rows_of(small), rows_of(large)[-4:])


@pytest.mark.parametrize("state", [{}, {"step": 3}, [], {"step": 3, "rows": None, "x": 1}], ids=str)
def test_foreign_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="state: expected the keys 'rows' and 'step', got"):
        EmbeddingMonitor().load_state_dict(state)


def test_copies_and_pickles() -> None:
    monitor = EmbeddingMonitor(every=2, samples=8)
    z = views_of(1, 8, 4)[0]
    monitor.update(z)
    expected = copy.deepcopy(monitor).update(z)
    assert expected is not None
    assert pickle.loads(pickle.dumps(monitor)).update(z) == expected


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"every": 2.0}, TypeError, "every: expected an int, got float"),
        ({"samples": 1}, ValueError, "samples: expected at least 2, got 1"),
        ({"samples": "many"}, TypeError, "samples: expected an int, got str"),
    ],
)
def test_bad_arguments(arguments: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        EmbeddingMonitor(**arguments)


def test_bad_embeddings() -> None:
    monitor = EmbeddingMonitor()
    with pytest.raises(TypeError, match=r"embeddings: expected a torch.Tensor, got list"):
        monitor.update([[1.0]], torch.zeros(2, 3))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="embeddings: expected at least one view, got none"):
        monitor.update()
    with pytest.raises(ValueError, match="embeddings: expected views of one shape"):
        monitor.update(torch.zeros(4, 3), torch.zeros(5, 3))


def test_another_layer_is_refused() -> None:
    monitor = EmbeddingMonitor(every=1, samples=8)
    monitor.update(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="embeddings: expected 3 dimensions as before, got 5"):
        monitor.update(torch.zeros(4, 5))


def test_recorded_cost_is_under_one_percent() -> None:
    steps = json.loads(RESULT.read_text())["steps"]
    resnet = next(figures for name, figures in steps.items() if name.startswith("ResNet-18"))
    assert resnet["steps_with"] >= 200
    assert resnet["share_percent"] < 1
