"""The arrows between the files, read from their imports, and what an import costs."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vicreg_losses"

# Which files of the package each file may import: itself never, and nothing that may import it.
PRIMITIVES = {"_parallel", "_sort", "_torch", "_epps_pulley", "_slices"}
ARROWS: dict[str, set[str]] = {
    "_compat": set(),
    "_checks": {"_compat"},
    "_parallel": set(),
    "_slices": {"_parallel"},
    "_sort": {"_parallel"},
    "_torch": {"_parallel", "_sort"},
    "_request": set(),
    "_epps_pulley": {"_parallel", "_torch"},
    "_deviations": {"_compat", "_request", "_torch"},
    "_fusible": {"_compat", "_epps_pulley", "_torch"},
    "_evaluate": {"_request", "_deviations", "_fusible", *PRIMITIVES},
    "_fused": {"_request", "_epps_pulley", "_torch", "kernels"},
    "_collectives": {"_compat"},
    "_moments": {"_collectives", "_torch"},
    "_strategy": {"_request"},
    "_sharded_sketch": {"_request", "_collectives", "_moments", *PRIMITIVES},
    "_sharded_covariance": {"_collectives", "_moments", "_sharded_sketch", "_torch"},
    "_sharded": {
        "_request",
        "_collectives",
        "_deviations",
        "_evaluate",
        "_moments",
        "_sharded_covariance",
        "_sharded_sketch",
        "_strategy",
        *PRIMITIVES,
    },
    "_plan": {
        "_checks",
        "_collectives",
        "_moments",
        "_request",
        "_sharded_covariance",
        "_strategy",
        "_torch",
    },
    "_dispatch": {
        "_checks",
        "_compat",
        "_request",
        "_evaluate",
        "_fused",
        "_sharded",
        "_slices",
        "kernels",
    },
    "_opaque": {"_collectives", "_compat", "_request", "_dispatch", "_evaluate", "_torch"},
    "_ops": {
        "_compat",
        "_opaque",
        "_request",
        "_deviations",
        "_evaluate",
        "_dispatch",
        *PRIMITIVES,
    },
    "_options": {"_checks", "_collectives", "_dispatch", "_request"},
    "distributed": {
        "_checks",
        "_collectives",
        "_deviations",
        "_compat",
        "_moments",
        "_opaque",
        "_plan",
        *PRIMITIVES,
    },
    "functional": {
        "_checks",
        "_collectives",
        "_dispatch",
        "_options",
        "_request",
        "_opaque",
        "_ops",
        "_slices",
    },
    "modules": {"_checks", "_collectives", "_options", "_request", "_opaque", "_ops", "functional"},
    "composites": {"_checks", "_options", "_request", "_ops", "functional", "modules"},
    "_report": {"_checks"},
    "_monitor": {"_checks", "_report"},
    "diagnostics": {"_checks", "_monitor", "_report"},
    "lightning": {"diagnostics"},
    "__init__": {"composites", "diagnostics", "distributed", "functional", "modules"},
}
FOREIGN = {
    "__init__": set(),
    "_sort": {"numpy", "torch"},
    **{name: {"torch", "numpy"} for name in PRIMITIVES},
    "_report": {"torch", "matplotlib"},
}


def sources() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute names of what a file imports, from inside functions too, and the statement."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                assert node.level == 1, f"{path.name} reaches above its package"
                base = f"vicreg_losses.{base}".rstrip(".")
            if base == "vicreg_losses":
                yield from ((f"{base}.{alias.name}", node) for alias in node.names)
            else:
                yield base, node


def tops(path: Path) -> set[str]:
    """Top-level names that a file imports, without the standard library's."""
    return {name.split(".")[0] for name, _ in imports(path)} - set(sys.stdlib_module_names)


def ours(path: Path) -> set[str]:
    names = (name.split(".") for name, _ in imports(path))
    return {parts[1] for parts in names if parts[0] == "vicreg_losses" and len(parts) > 1}


def test_table_has_every_file_and_no_cycle() -> None:
    assert set(sources()) == set(ARROWS)
    done: set[str] = {"kernels"}
    while len(done) <= len(ARROWS):
        ready = {name for name, targets in ARROWS.items() if targets <= done} - done
        assert ready, f"a cycle among {set(ARROWS) - done}"
        done |= ready


@pytest.mark.parametrize("name", ARROWS)
def test_arrows(name: str) -> None:
    assert ours(sources()[name]) <= ARROWS[name]


@pytest.mark.parametrize("name", ARROWS)
def test_dependencies(name: str) -> None:
    """PyTorch; numpy in the primitives; matplotlib to draw."""
    assert tops(sources()[name]) - {"vicreg_losses"} <= FOREIGN.get(name, {"torch"})


@pytest.mark.parametrize("name", sorted(PRIMITIVES | {"_evaluate", "_fused"}))
def test_primitives_know_no_autograd_and_no_collectives(name: str) -> None:
    path = sources()[name]
    assert not any("distributed" in imported for imported, _ in imports(path))
    tree = ast.parse(path.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"autograd", "distributed", "requires_grad_", "backward", "Function"}


def test_kernels_import_torch_triton_and_themselves() -> None:
    files = sorted((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for name in names or [node.module]:
                    assert name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}


def test_public_files_alone_are_used_outside() -> None:
    """Examples show what users can type, and nothing imports examples, benchmarks or tests."""
    private = {name for name in ARROWS if name.startswith("_") and name != "__init__"}
    for path in sorted((ROOT / "examples").glob("**/*.py")):
        assert not ours(path) & private, path
    outside = {"examples", "benchmarks", "tests"}
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not tops(path) & outside, path


def test_oracles_share_nothing_with_the_library() -> None:
    assert "vicreg_losses" not in tops(ROOT / "tests" / "oracles.py")


def test_no_file_is_long() -> None:
    folders = [PACKAGE, *(ROOT / name for name in ("kernels", "tests", "examples", "benchmarks"))]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 350, path


def run(code: str) -> str:
    """Runs code in a fresh interpreter and returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# An entry of None in sys.modules makes `import` raise ImportError.
BLOCKED = """
import sys

for name in ("triton", "matplotlib", "rich", "sklearn", "torchvision", "hypothesis", "pytest"):
    sys.modules[name] = None

import torch
from vicreg_losses import LeJEPALoss, VICRegLoss, VISRegLoss, diagnostics

z = torch.randn(2, 16, 8, requires_grad=True)
for loss in (VICRegLoss(), VISRegLoss(num_slices=8), LeJEPALoss(num_slices=8)):
    loss(z).backward()
print(diagnostics.embedding_report(z))
try:
    VICRegLoss(impl="triton")
except RuntimeError as error:
    print(error)
"""


def test_optional_packages_are_optional() -> None:
    printed = run(BLOCKED)
    assert "effective rank" in printed
    assert "impl='triton' cannot run" in printed


# What a process has before and after the import: modules, and state that is everybody's.
IMPORTED = """
import sys, threading, torch

def state():
    return [
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.distributed.is_initialized(),
        threading.active_count(),
    ]

before, modules = state(), set(sys.modules)
import vicreg_losses
assert state() == before
print(*(set(sys.modules) - modules))
"""


def test_import_loads_nothing_heavy_and_sets_nothing() -> None:
    """No Triton in particular, but for what `import torch` itself loads of it."""
    more = {name.split(".")[0] for name in run(IMPORTED).split()}
    assert more - set(sys.stdlib_module_names) <= {"vicreg_losses", "torch", "numpy"}
