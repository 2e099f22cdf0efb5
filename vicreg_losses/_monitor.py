"""A report on the embeddings of a running training, at a cost that one forgets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._report import EmbeddingReport, double, report_of

# All pairs of 8,192 dimensions would be most of the cost.
_MOST_CORRELATED = 512


class EmbeddingMonitor:
    """The report of :func:`embedding_report` every so many steps of a training.

    ``update`` belongs into the training step, outside of what is compiled. In the last steps before
    a report is due it copies rows into a buffer, detached, on the device of the embeddings; in all
    others it counts. Only the step of the report waits for the device.

    The buffer takes one view of each sample, in turns, so that no sample counts twice: with batches
    of N samples it is filled in the last ``samples / N`` steps and one more, as the last batch of
    an epoch may be small. A step that is left out empties it, so that rows are always of successive
    steps; where batches shrink by more, the report has fewer rows, not old ones. Its size bounds
    what is read: the effective rank is at most min(``samples``, D), so values compare at one size
    only. While the buffer is filled the network moves, and embeddings that move as one
    read as spread: choose ``samples`` of a few batches at most. The memory is ``samples`` times D
    numbers of float32 (float64 for float64).

    In a process group each rank reports on its own rows; nothing is communicated.

    Args:
        every: steps from one report to the next.
        samples: rows of the buffer, from 2.

    Attributes:
        report: the latest :class:`EmbeddingReport`, whose ``mean_abs_correlation`` is that of 512
            dimensions at most, evenly spaced among those alive; ``None`` before the first.

    Raises:
        TypeError, ValueError: for arguments that are no such whole numbers.

    Examples:
        >>> monitor = EmbeddingMonitor(every=2, samples=64)
        >>> z = torch.eye(4)
        >>> monitor.update(z, z)
        >>> round(monitor.update(z, z)["effective_rank"], 6)
        4.0
    """

    def __init__(self, every: int = 50, samples: int = 512) -> None:
        _checks.integer("every", every, 1)
        _checks.integer("samples", samples, 2)
        self.every, self.samples = every, samples
        self.report: EmbeddingReport | None = None
        self._step = 0
        self._rows: Tensor | None = None  # (samples, D), a ring
        self._written = 0

    def update(self, *views: Tensor | Sequence[Tensor]) -> dict[str, float] | None:
        """Count a step, and report where one is due.

        Args:
            *views: embeddings as the losses take them: one (N, D) tensor, several, a list of them,
                or one (V, N, D) tensor; any floating dtype and device, with or without a gradient.

        Returns:
            dict | None: the scalars of :meth:`EmbeddingReport.as_dict` where a report is due, and
            ``None`` elsewhere, or with fewer than two rows in the buffer.

        Raises:
            TypeError, ValueError: for anything but embeddings, or another D than before.
        """
        given: Any = views[0] if len(views) == 1 else views
        tensors = _checks.embeddings(given, min_samples=0)
        dimensions = tensors[0].shape[-1]
        if self._rows is not None and self._rows.shape[1] != dimensions:
            raise ValueError(
                f"embeddings: expected {self._rows.shape[1]} dimensions as before, got "
                f"{dimensions}; use one monitor for each layer."
            )
        self._step += 1
        to_go = -self._step % self.every
        if (to_go - 1) * tensors[0].shape[-2] < self.samples:
            self._keep(tensors)
        else:
            self._written = 0
        if to_go or self._rows is None or self._written < 2:
            return None
        filled = self._rows[: min(self._written, self.samples)]
        self.report = report_of(double(filled), _MOST_CORRELATED)
        return self.report.as_dict()

    def state_dict(self) -> dict[str, Any]:
        """The step and the rows, oldest first; ``report`` is not among them."""
        rows = self._rows
        if rows is not None:
            rows = rows[: min(self._written, self.samples)].roll(-(self._written % self.samples), 0)
        return {"step": self._step, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; of more rows than ``samples`` the latest are kept.

        Raises:
            ValueError: for anything but the result of :meth:`state_dict`.
        """
        if not isinstance(state, Mapping) or set(state) != {"step", "rows"}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected the keys 'rows' and 'step', got {got}.")
        self._step, self._rows, self._written = state["step"], None, 0
        if state["rows"] is not None:
            self._write(state["rows"][-self.samples :])

    @torch.no_grad()
    def _keep(self, tensors: tuple[Tensor, ...]) -> None:
        views = tensors[0].unbind() if tensors[0].dim() == 3 else tensors
        count = min(views[0].shape[0], self.samples)
        rows = [view[i : count : len(views)] for i, view in enumerate(views)]
        self._write(torch.cat(rows))

    def _write(self, rows: Tensor) -> None:
        ring = self._ring(rows)
        place = self._written % self.samples
        first = rows[: self.samples - place]
        ring[place : place + len(first)].copy_(first)
        ring[: len(rows) - len(first)].copy_(rows[len(first) :])
        self._written += len(rows)

    def _ring(self, like: Tensor) -> Tensor:
        if self._rows is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            # Inference tensors could not be written in training.
            with torch.inference_mode(False):
                self._rows = torch.zeros(
                    self.samples, like.shape[1], dtype=dtype, device=like.device
                )
        elif self._rows.device != like.device:
            self._rows = self._rows.to(like.device)
        return self._rows
