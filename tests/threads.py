"""Ranks as threads of one process, with the part of torch.distributed that losses use.

A world starts in a millisecond, so that thousands can be tried. Whatever a backend would only
answer by a hang or by garbage, ranks in different collectives or messages of different shapes, is
an error here.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from vicreg_losses import _collectives, _compat

T = TypeVar("T")
NAME = "threads"
_here = threading.local()


class _Exchange:
    """Where the ranks of one world put and read messages.

    One barrier for each message: a slot is written again only after the next but one, by when all
    have read it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[list[Any]] = [[None] * size, [None] * size]


@dataclass(eq=False)
class Group:
    """A process group as one of its ranks sees it.

    Attributes:
        rank: this one.
        size: how many.
        sent: the collectives so far.
    """

    rank: int
    size: int
    exchange: _Exchange
    sent: list[str] = field(default_factory=list)
    group_name: str = NAME

    def tell(self, collective: str, x: Any) -> list[Any]:
        """What all ranks have put in, in their order."""
        slots = self.exchange.slots[len(self.sent) % 2]
        self.sent.append(collective)
        tensor = isinstance(x, Tensor)
        what = (collective, x.shape, x.dtype) if tensor else (collective,)
        slots[self.rank] = (what, x.detach().clone() if tensor else x)
        self.exchange.barrier.wait()
        heard = list(slots)
        if any(other != what for other, _ in heard):
            raise RuntimeError(f"the ranks differ: {[other for other, _ in heard]}")
        return [message for _, message in heard]


class Distributed:
    """In place of the module ``torch.distributed``."""

    ProcessGroup = Group

    class _Default:
        @property
        def WORLD(self) -> Group:
            return here()

    group = _Default()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return hasattr(_here, "group")

    def get_world_size(self, group: Group) -> int:
        return group.size

    def get_rank(self, group: Group) -> int:
        return group.rank

    def all_reduce(self, x: Tensor, group: Group) -> None:
        x.copy_(torch.stack(group.tell("all_reduce", x)).sum(0))

    def all_gather_into_tensor(self, out: Tensor, x: Tensor, group: Group) -> None:
        out.copy_(torch.cat(group.tell("all_gather", x)))

    def all_to_all_single(self, out: Tensor, x: Tensor, group: Group) -> None:
        heard = group.tell("all_to_all", x)
        out.copy_(torch.cat([y.chunk(group.size)[group.rank] for y in heard]))

    def all_gather_object(self, out: list[Any], x: Any, group: Group) -> None:
        out[:] = group.tell("all_gather_object", x)


def here() -> Group:
    """The group of this thread."""
    group: Group = _here.group
    return group


@contextmanager
def installed() -> Iterator[None]:
    """Lets the library take threads for ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_collectives, "dist", Distributed())
        patch.setattr(_compat, "resolve_group", lambda name: here())
        patch.setattr(_compat, "has_cpu_backend", lambda group: True)
        yield


def run(size: int, work: Callable[[int], T]) -> list[T]:
    """Results of ``work(rank)`` of all ranks; or the first error of any."""
    exchange = _Exchange(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        torch.set_num_threads(1)  # of this thread
        _here.group = Group(rank, size, exchange)
        try:
            results[rank] = work(rank)
            _here.group.tell("end", None)  # nobody waits for this rank
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    started = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:  # those of the others, who waited in vain, come of it
        causes = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        raise (causes or errors)[0]
    return results
