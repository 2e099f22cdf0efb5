"""What one rank of many sends, computes and holds, measured without data and without ranks.

Fake tensors on a CUDA device, over a group that does nothing: shapes, messages and storages are
those of a real run, and a step that reads data, or copies it from the host, is an error.
"""

import functools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vicreg_losses import _collectives, _evaluate, _sharded, distributed
from vicreg_losses._plan import _REQUESTS

SAMPLES, SLICES = 256, 4096
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "alltoall_base_": "all_to_all",
}
# These build a tensor from host data, which on a GPU is a copy that waits for it.
FROM_HOST = torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor


class HostData(TorchFunctionMode):
    """Refuses tensors made of numbers of the host, which dispatch does not show."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in FROM_HOST:
            data = args[-1] if function is Tensor.new_tensor else args[0]
            assert isinstance(data, Tensor), f"{function.__name__} of host data"
        return function(*args, **(kwargs or {}))


class Trace(TorchDispatchMode):
    """Counts operations, messages, and the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []
        self.operations = self.now = self.peak = 0
        self.live: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function.namespace == "c10d":
            sent = args[0][0] if function._opname == "allreduce_" else args[1]
            self.messages.append((COLLECTIVES[function._opname], sent.numel() * sent.itemsize))
        self.operations += function.namespace != "prim"
        out = function(*args, **(kwargs or {}))
        known = {id(x.untyped_storage()) for x in given}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        assert all(x.device.type == "cuda" for x in given + made), f"{function} meets the host"
        for storage in (x.untyped_storage() for x in made):
            if id(storage) not in known and id(storage) not in self.live:
                self._add(storage)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.live[key] = size
        self.now += size

        def end() -> None:
            self.now -= self.live.pop(key)

        weakref.finalize(storage, end)


@dataclass(frozen=True)
class Case:
    term: str
    ranks: int
    dimensions: int
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()
    samples: int = SAMPLES  # of this rank, of at most SAMPLES
    rank: int = 0
    keep: bool = True
    slices: int = SLICES

    @property
    def views(self) -> int:
        return 2 if _REQUESTS[self.term].invariance else 1

    def plan(self) -> distributed.Plan:
        return distributed.plan(
            self.term,
            SAMPLES,
            self.dimensions,
            slices=self.slices,
            views=self.views,
            ranks=self.ranks,
            dtype=self.dtype,
            **dict(self.options),
        )


@dataclass
class Measured:
    forward: list[tuple[str, int]] = field(default_factory=list)
    backward: list[tuple[str, int]] = field(default_factory=list)
    operations: int = 0
    flops: int = 0
    memory: int = 0


@contextmanager
def world(ranks: int, rank: int = 0) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def measure(case: Case) -> Measured:
    """Both passes of one call, on one rank."""
    with world(case.ranks, case.rank) as group:
        _collectives.limit_samples(group, SAMPLES)
        options = dict(case.options)
        request = _REQUESTS[case.term]._replace(
            gathers=True,
            world=case.ranks,
            group=group.group_name,
            wire="bfloat16" if case.dtype == torch.bfloat16 else "",
            exchange=options.get("exchange", "auto"),
            own_slices=options.get("per_rank", False),
        )
        if request.covariance:
            request = request._replace(covariance=options.get("strategy", "auto"))
        return _measure(_sharded if case.ranks > 1 else _evaluate, request, case)


def _measure(backend: Any, request: Any, case: Case) -> Measured:
    shape = case.views, case.samples, case.dimensions
    with FakeTensorMode():
        z = [torch.empty(shape[1:], dtype=case.dtype, device="cuda") for _ in range(shape[0])]
        w = torch.empty(case.dimensions, case.slices, device="cuda") if request.sketch else None
        upstream = [torch.empty((), device="cuda") for _ in range(request.terms())]
        found, count = Measured(), request.terms()
        in_place = {torch.ops.aten.baddbmm_: _product}  # unknown to PyTorch's counter
        counter = FlopCounterMode(display=False, custom_mapping=in_place)
        with counter as flops, HostData(), Trace() as trace:
            out = backend.evaluate(request, z, w, case.keep)
            found.forward, trace.messages = trace.messages, []
            if case.keep:
                values, residue = out[:count], out[count:]
                slope = backend.gradient(request, shape, values, residue, upstream, z, case.dtype)
                assert slope.shape == shape
        found.backward, found.operations = trace.messages, trace.operations
        found.flops, found.memory = flops.get_total_flops(), trace.peak
    return found


def _product(total: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * math.prod(left) * right[-1]


measured = functools.cache(measure)


def differences(case: Case, found: Measured) -> set[str]:
    """In what a run is not as planned."""
    plan = case.plan()
    planned = [(message.collective, message.size) for message in plan.messages]
    wrong = {
        "messages": found.forward != planned,
        "backward": found.backward != [],
        "flops": not abs(found.flops - plan.flops) <= 0.02 * found.flops,
        # PyTorch's allocator rounds and splits by about as much as a plan may be too small.
        "memory": not 0.9 * found.memory <= plan.memory <= 1.25 * found.memory,
    }
    return {name for name, is_so in wrong.items() if is_so}
