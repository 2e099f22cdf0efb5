"""Samples in memory or in files, those that cannot be decoded, and the batches made of them."""

from __future__ import annotations

import bisect
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

Samples = Dataset[tuple[Tensor, int]]
Files = ConcatDataset[tuple[Tensor, int]]
Batch = tuple[Tensor, Tensor]
UNREADABLE_SHARE = 0.01


class DataError(Exception):
    """The data cannot be used; the message is one line and names what was asked for."""


class Unreadable:
    """The images that could not be decoded, in memory that loader processes share.

    Attributes:
        found: For each image of the data set, 1 if it could not be decoded, uint8. Its maximum over
            ranks is that of all ranks; the images that they have not read yet are 0.
    """

    def __init__(self, files: Files | None, used: int) -> None:
        self._files, self._used = files, used
        self.found = torch.zeros(len(files) if files else 1, dtype=torch.uint8).share_memory_()

    def count(self) -> int:
        """Number of distinct images that this rank and its loader processes could not decode."""
        return int(self.found.sum(dtype=torch.int64))

    def first(self) -> str | None:
        """Path of the first one, in the order of the folder, or None."""
        return self._path(int(self.found.argmax())) if self.count() else None

    def check(self, total: int | None = None) -> None:
        """Refuse a data set of which more than 1 % cannot be decoded.

        Args:
            total: Number of such images on all ranks; None: on this one.

        Raises:
            DataError: It is more than 1 % of the images in use.
        """
        total = self.count() if total is None else total
        if total <= UNREADABLE_SHARE * self._used:
            return
        found = f"{total} of {self._used} images ({total / self._used:.1%})"
        where = self.first() or "read by another rank"
        raise DataError(
            f"{found} cannot be read, more than {UNREADABLE_SHARE:.0%}; the first: {where}"
            + self._reason()
        )

    def _path(self, row: int) -> str:
        dataset, own_row = self._locate(row)
        if hasattr(dataset, "samples"):
            return str(dataset.samples[own_row][0])
        return f"number {own_row} of {type(dataset).__name__}"

    def _locate(self, row: int) -> tuple[Any, int]:
        assert self._files
        sizes = [0, *self._files.cumulative_sizes]
        part = bisect.bisect_right(sizes, row) - 1
        return self._files.datasets[part], row - sizes[part]

    def _reason(self) -> str:
        """What the decoder says about the first one."""
        if self.count():
            dataset, row = self._locate(int(self.found.argmax()))
            try:
                dataset[row]
            except Exception as error:  # a decoder raises whatever it likes
                return f" ({one_line(error)})"
        return ""


class InMemory(Samples):
    """Samples in one tensor, so that a batch is one indexing of it.

    Attributes:
        images: (N, C, S, S), uint8.
        labels: (N,), int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.images[row], int(self.labels[row])

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch, as ``DataLoader`` asks for it."""
        return self.images[rows], self.labels[rows]


class Decoded(Samples):
    """Some rows of a data set of files, which are decoded as they are asked for.

    In place of an image that cannot be decoded comes the next one that can, so that batches keep
    their size, and do not depend on which process has read what before.
    """

    def __init__(self, files: Files, rows: Sequence[int], unreadable: Unreadable) -> None:
        self.files, self.rows, self.unreadable = files, rows, unreadable

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self.rows):
            raise IndexError(index)  # which ends a loop over the samples
        for offset in range(len(self.rows)):
            row = self.rows[(index + offset) % len(self.rows)]
            try:
                return self.files[row]
            except Exception:  # a decoder raises whatever it likes
                self.unreadable.found[row] = 1
                self.unreadable.check()
        raise DataError(f"none of {len(self.rows)} images can be read")


def shuffled_batches(
    samples: Samples, batch: int, seed: int, first: int, workers: int, part: slice = slice(None)
) -> DataLoader[Batch]:
    """Whole batches of an epoch, from number ``first`` on, in an order that ``seed`` alone sets.

    Args:
        samples: What the batches are made of.
        batch: Size of a batch of all ranks.
        seed: Of the epoch's order.
        first: Number of batches to leave out, for a run that continues.
        workers: Loader processes; they live for this epoch, as the next has another order.
        part: This rank's rows of each batch.

    Returns:
        Batches of images (rows, C, S, S) uint8 and labels (rows,) int64, in pinned memory where
        there is a GPU. Iterating raises ``DataError`` if too many images cannot be decoded.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    whole = order[: len(samples) // batch * batch].view(-1, batch)[first:, part]
    return _batches(samples, whole.tolist(), workers)


def ordered_batches(samples: Samples, batch: int, workers: int) -> DataLoader[Batch]:
    """All samples in their order, to evaluate on; the last batch may be smaller."""
    rows = [part.tolist() for part in torch.arange(len(samples)).split(batch)]
    return _batches(samples, rows, workers)


def _batches(samples: Samples, rows: list[list[int]], workers: int) -> DataLoader[Batch]:
    return _Batches(
        samples,
        batch_sampler=rows,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


class _Batches(DataLoader[Batch]):
    """A loader that raises the ``DataError`` of its processes in one line."""

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from super().__iter__()
        except DataError as error:
            # Without the traceback, whose frames refer to the error: left to the garbage collector,
            # the loader would wait for its processes in vain.
            text = str(error.with_traceback(None))
            # A process hands an error on as a traceback in text, which ends in type and message.
            raise DataError(text.rstrip().rpartition("DataError: ")[2]) from None


def _collate(batch: Batch | list[tuple[Tensor, int]]) -> Batch:
    """Samples in memory come as a batch already."""
    return batch if isinstance(batch, tuple) else tuple(default_collate(batch))


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach all processes, to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def one_line(error: Exception) -> str:
    """What an error says, without what may follow in further lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]
