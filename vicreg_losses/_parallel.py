"""Run a function over blocks of rows in the threads that PyTorch may use."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# OpenMP's threads spin for milliseconds after a GEMM: short work gains nothing from other threads.
_BLOCKS_FOR_A_THREAD = 16


def for_each_block(
    make_worker: Callable[[], Callable[[int, int], None]], rows: int, rows_per_block: int
) -> None:
    """Call ``worker(begin, end)`` for all blocks of rows, in parallel where there are several.

    Each thread makes a worker of its own, which may so keep scratch memory from block to block. A
    worker should spend its time where the GIL is released (numpy and torch operations) and touch
    only its own rows. The pool lives for one call: one that outlives a ``fork`` hangs in the child.

    Args:
        make_worker: called once in each thread; returns what to call with a half-open row range.
        rows: the number of rows in all.
        rows_per_block: the size of a block; the last one may be smaller.
    """
    todo = deque((i, min(i + rows_per_block, rows)) for i in range(0, rows, rows_per_block))
    threads = min(torch.get_num_threads(), len(todo) // _BLOCKS_FOR_A_THREAD)
    inference = torch.is_inference_mode_enabled()  # thread-local, so the threads must be told

    def take() -> tuple[int, int] | None:
        try:
            return todo.popleft()
        except IndexError:  # nothing left
            return None

    def run() -> None:
        with torch.inference_mode(inference):
            worker = make_worker()
            # First come, first served: beside spinning threads the cores have unequal shares.
            while (block := take()) is not None:
                worker(*block)

    if threads <= 1:
        run()
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(run) for _ in range(1, threads)]
        run()
        for other in others:
            other.result()
