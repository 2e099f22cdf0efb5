"""What every test runs under: poisoned memory, one thread, reproducible Hypothesis."""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # the tests of kernels run without it, on machines that have no more than a GPU
    settings = None

# Deterministic mode needs this on CUDA, before the first cuBLAS call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton's kernels run on CPU tensors then; it is read when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# One thread: the tensors are small, and on a busy machine OpenMP threads that wait for each other's
# cores are ten times slower than one alone. The tests of threaded code ask for `two_threads`.
torch.set_num_threads(1)

if settings is not None:
    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, print_blob=True, database=None
    )
    settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def poisoned_empty_memory() -> Iterator[None]:
    """Fills `torch.empty` with NaN (integers: their maximum), so a read of unwritten memory shows.

    PyTorch does so in deterministic mode, which also turns nondeterministic operators into errors.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Lets PyTorch, and the library, use two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="marked gpu: needs a CUDA device, none found")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    """The script of the reference trainer, as a module."""
    return import_module("pretrain")


@pytest.fixture
def run(pretrain: ModuleType, tmp_path: Path) -> Callable[..., int]:
    """Runs that script with arguments, into ``tmp_path / "out"``, and gives back its status."""

    def main(*arguments: object) -> int:
        return pretrain.main(["--out", str(tmp_path / "out"), *map(str, arguments)])

    return main


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Without inductor's pool of compiling processes, which takes longer to start than it saves."""
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()
