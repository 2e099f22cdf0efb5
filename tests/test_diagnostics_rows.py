"""Which rows the monitor of a running training keeps: whose, of which steps, and no older ones."""

import pytest
import torch
from test_diagnostics_monitor import rows_of, views_of

from vicreg_losses.diagnostics import EmbeddingMonitor


@pytest.mark.parametrize("count", [1, 2, 4])
def test_buffer_has_one_view_of_each_sample(count: int) -> None:
    """In turns, so that views that agree do not count as samples that do."""
    monitor = EmbeddingMonitor(every=1, samples=64)
    views = views_of(count, 10, 3)
    monitor.update(*views)
    rows = rows_of(monitor)
    assert len(rows) == 10
    expected = torch.cat([view[i::count] for i, view in enumerate(views)])
    assert torch.equal(rows, expected)


def test_latest_rows_stay() -> None:
    """A ring: batches that do not divide the buffer, and single batches that are larger."""
    monitor = EmbeddingMonitor(every=1, samples=10)
    given = []
    for step, n in enumerate((4, 4, 4, 0, 3, 1)):
        z = views_of(1, n, 2, step)[0]
        given.append(z)
        monitor.update(z)
        assert torch.equal(rows_of(monitor), torch.cat(given)[-10:])
    large = views_of(1, 33, 2, 99)[0]
    monitor.update(large)
    assert torch.equal(rows_of(monitor), large[:10])


def test_rows_are_those_of_the_last_steps_before_a_report() -> None:
    """A network that moves reads as spread; so the buffer is filled as late as can be."""
    monitor = EmbeddingMonitor(every=50, samples=32)
    for step in range(50):
        scalars = monitor.update(torch.full((16, 4), float(step)))
    assert rows_of(monitor).unique().tolist() == [48, 49]
    one_batch = EmbeddingMonitor(every=50, samples=16)
    for step in range(50):
        scalars = one_batch.update(torch.full((16, 4), float(step)))
    assert scalars is not None
    assert scalars["std_max"] == 0
    assert scalars["effective_rank"] == pytest.approx(1)


def test_collapse_is_seen_where_the_last_batch_is_small() -> None:
    """The small one ends the epoch and asks for the report; rows of 50 steps before stay out."""
    monitor = EmbeddingMonitor(every=50, samples=512)
    for step in range(1, 151):
        n = 512 if step % 50 else 40
        scalars = monitor.update(step / 50 + 1e-4 * views_of(1, n, 8, step)[0])
        if step % 50 == 0:
            assert scalars is not None
            assert scalars["samples"] == 512
            assert monitor.report is not None
            assert "collapse" in monitor.report.problem_kinds, step


def test_no_row_is_older_than_a_step_that_was_left_out() -> None:
    """With batches so small that the buffer cannot be filled: fewer rows then, not old ones."""
    monitor = EmbeddingMonitor(every=10, samples=64)
    for step in range(1, 31):
        n = 2 if step % 10 in (0, 9, 8) else 64
        scalars = monitor.update(torch.full((n, 4), float(step)))
        if step % 10 == 0:
            assert scalars is not None
            assert scalars["samples"] == 6
            assert rows_of(monitor).unique().tolist() == [step - 2, step - 1, step]
