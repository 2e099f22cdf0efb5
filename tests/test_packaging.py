"""The names that users import, under which the package is installed."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vicreg_losses

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    "vicreg_losses": [
        "VarianceLoss",
        "CovarianceLoss",
        "SlicedSketchLoss",
        "InvarianceLoss",
        "VICRegLoss",
        "VISRegLoss",
        "LeJEPALoss",
        "VICRegTerms",
        "VISRegTerms",
        "LeJEPATerms",
        "functional",
        "diagnostics",
        "distributed",
        "__version__",
    ],
    "vicreg_losses.functional": [
        "variance_loss",
        "center_loss",
        "covariance_loss",
        "sliced_sketch_loss",
        "invariance_loss",
    ],
    "vicreg_losses.distributed": ["all_gather", "all_gather_ragged", "batch_statistics"],
    "vicreg_losses.diagnostics": [
        "effective_rank",
        "embedding_report",
        "EmbeddingReport",
        "EmbeddingMonitor",
        "TermGradient",
        "term_gradients",
    ],
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names]
)
def test_public_names(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    assert callable(value) or name in ("functional", "diagnostics", "distributed", "__version__")
    if callable(value):
        assert value.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("module", [name for name in PUBLIC if name != "vicreg_losses"])
def test_all_names_exist(module: str) -> None:
    imported = importlib.import_module(module)
    assert set(PUBLIC[module]) <= set(imported.__all__)
    assert all(hasattr(imported, name) for name in imported.__all__)


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab.]\w+)?", vicreg_losses.__version__)
    try:
        installed = importlib.metadata.version("vicreg-losses")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == vicreg_losses.__version__


def test_types_are_announced() -> None:
    assert (Path(vicreg_losses.__file__).parent / "py.typed").is_file()


def test_kernels_are_part_of_the_package() -> None:
    kernels = importlib.import_module("vicreg_losses.kernels")
    assert kernels.__name__ == "vicreg_losses.kernels"


@pytest.mark.skipif(not (ROOT / "kernels").is_dir(), reason="not a source tree")
def test_kernels_are_refused_under_a_name_of_others() -> None:
    command = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError: import vicreg_losses.kernels, not 'kernels'" in done.stderr
