"""Functions run on several ranks: processes with gloo, started once and used by many tests.

Each rank runs with one thread, poisoned memory and warnings as errors, like the tests themselves.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MOST = 4
# How long a collective waits for the other ranks: they share a few cores with other work.
PATIENCE = timedelta(seconds=60)


class Failure(NamedTuple):
    """What a rank raised."""

    kind: str
    message: str
    trace: str


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()


_workers: list[_Worker] = []


def outcomes(
    function: Callable[..., Any], world: int, *args: Any, joined: bool = True, timeout: float = 90
) -> list[Any]:
    """What ``function(rank, world, *args)`` returns on each rank, or a :class:`Failure`.

    Args:
        function: of a module's top level.
        world: number of ranks, at most 4.
        args: as they go through pickle.
        joined: whether the ranks are a group already; otherwise the function calls :func:`join`.
        timeout: seconds, after which all processes are killed.
    """
    while len(_workers) < MOST:
        _workers.append(_Worker())
    heard: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pending = {}
        for rank, worker in enumerate(_workers[:world]):
            task = pickle.dumps((function, rank, world, args, joined, folder))
            worker.connection.send_bytes(task)
            pending[worker.connection] = rank
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                _give_up(f"ranks {sorted(pending.values())} hung for {timeout} s")
            for connection in ready:
                rank = pending.pop(connection)
                try:
                    heard[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    _give_up(f"rank {rank} died")
    return [heard[rank] for rank in range(world)]


def run(function: Callable[..., Any], world: int, *args: Any, **options: Any) -> list[Any]:
    """As :func:`outcomes`, with a failure of any rank as a failure of the test."""
    heard = outcomes(function, world, *args, **options)
    failed = [f"rank {r}:\n{x.trace}" for r, x in enumerate(heard) if isinstance(x, Failure)]
    assert not failed, "\n".join(failed)
    return heard


def join(rank: int, world: int, name: str = "store") -> None:
    """Become a rank of a world; ``name`` tells those apart that one function makes."""
    store = f"file://{os.environ['RANKS_FOLDER']}/{name}"
    dist.init_process_group("gloo", store, timeout=PATIENCE, rank=rank, world_size=world)


def refusal(call: Callable[[], object]) -> str:
    """Type and text of the error that a call raises, or an empty string."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _give_up(reason: str) -> None:
    while _workers:
        _workers.pop().kill()
    raise AssertionError(reason)


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    # As torch.use_deterministic_algorithms, which takes seconds to import what compiles.
    torch._C._set_deterministic_algorithms(True)
    warnings.simplefilter("error")
    # As in pyproject.toml: Dynamo of torch < 2.15, of itself.
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps(_work(*pickle.loads(task)))
        except BaseException as error:
            failure = Failure(type(error).__name__, str(error), traceback.format_exc())
            answer = pickle.dumps(failure)
        connection.send_bytes(answer)


def _work(
    function: Callable[..., Any],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    joined: bool,
    folder: str,
) -> Any:
    os.environ["RANKS_FOLDER"] = folder
    try:
        if joined:
            join(rank, world)
        answer = function(rank, world, *args)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another one waits for its messages
        return answer
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
