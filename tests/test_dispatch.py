"""Which implementation serves a call, and what is said where the one asked for cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import oracles
import pytest
import torch

from vicreg_losses import CovarianceLoss, VICRegLoss, _compat, _dispatch, functional
from vicreg_losses._request import Request

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **environment: str) -> str:
    """Runs code in a fresh interpreter without TRITON_INTERPRET, and returns what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REFUSED = """
import torch
from vicreg_losses import CovarianceLoss, VarianceLoss, VICRegLoss, VISRegLoss, functional

z = torch.randn(2, 8, 4)
for ask in (
    lambda: functional.sliced_sketch_loss(z, impl="triton"),
    lambda: VISRegLoss(impl="triton")(z),
    lambda: functional.variance_loss(z, impl="triton"),
    lambda: functional.center_loss(z, impl="triton"),
    lambda: functional.covariance_loss(z, impl="triton"),
    lambda: VarianceLoss(impl="triton")(z),
    lambda: CovarianceLoss(impl="triton")(z),
    lambda: VICRegLoss(impl="triton")(z),
):
    try:
        ask()
    except RuntimeError as error:
        print(error)
"""


def test_triton_on_a_cpu_says_why_not() -> None:
    lines = run(REFUSED).splitlines()
    assert len(lines) == 8
    reason = "Triton is not installed" if not _has_triton() else "TRITON_INTERPRET=1"
    for line in lines:
        assert line.startswith("impl='triton' cannot run: ")
        assert reason in line or "a CPU" in line
        assert line.endswith("Use impl='auto' or impl='torch'.")


def test_triton_is_not_loaded_before_it_is_asked_for() -> None:
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from vicreg_losses import VICRegLoss\n"
        "VICRegLoss()(torch.randn(2, 8, 4, requires_grad=True)).backward()\n"
        "print(before or 'triton' not in sys.modules, 'vicreg_losses.kernels' in sys.modules)"
    )
    assert run(code).split() == ["True", "False"]


def _has_triton() -> bool:
    return _dispatch._obstacle("cuda") == ""


needs_triton = pytest.mark.skipif(not _has_triton(), reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("name", ["variance_loss", "covariance_loss", "sliced_sketch_loss"])
def test_float64_is_refused(name: str) -> None:
    z = torch.randn(8, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"no kernels for float64.*impl='auto' or impl='torch'"):
        getattr(functional, name)(z, impl="triton")
    with pytest.raises(RuntimeError, match="no kernels for float64"):
        getattr(functional, name)([z.float(), z], impl="triton")


@needs_triton
def test_other_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no Triton for a device of type 'meta'"):
        functional.covariance_loss(torch.empty(8, 4, device="meta"), impl="triton")


@needs_triton
@pytest.mark.parametrize(("arch", "fits"), [("sm_75", False), ("gfx90a", False), ("sm_86", True)])
def test_old_chips_are_refused(arch: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vicreg_losses.kernels import launch

    monkeypatch.setattr(launch, "target", lambda device: launch.Target(arch, 40, 65536))
    obstacle = _dispatch._obstacle_of_chip("cuda", 0)
    assert obstacle == "" if fits else arch in obstacle


@needs_triton
def test_a_sketch_beside_a_covariance_is_refused() -> None:
    request = Request(covariance="auto", sketch="wasserstein", impl="triton")
    with pytest.raises(RuntimeError, match="expected a covariance or a sketch, got both"):
        _dispatch.resolve(request, [torch.zeros(8, 4)])


def test_auto_is_torch_on_a_cpu() -> None:
    z = oracles.embeddings(2, 9, 30, dtype=torch.float32)
    request = Request(covariance="auto")
    assert _dispatch.resolve(request, [z]) is request
    assert torch.equal(CovarianceLoss()(z), CovarianceLoss(impl="torch")(z))


def test_chips_that_auto_trusts_have_a_recorded_green_run() -> None:
    recorded = set()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        record = json.loads(path.read_text())
        if record.get("tests", {}).get("green"):
            recorded.add(record["machine"]["arch"])
    assert recorded >= _dispatch.MEASURED


@needs_triton
@pytest.mark.parametrize(
    ("shape", "dtype", "request_"),
    [
        ((8, 4), torch.float64, Request(center=True)),
        ((65536, 2, 1), torch.float32, Request(center=True)),
        ((8, 4), torch.float32, Request(covariance="auto", sketch="wasserstein")),
    ],
    ids=["float64", "views", "covariance and sketch"],
)
def test_auto_leaves_to_pytorch_what_kernels_refuse(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    request_: Request,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also on a measured chip; a stand-in, as only the device, dtype and shape are read."""
    monkeypatch.setattr(_dispatch, "_is_measured", lambda index: True)

    def impl(request: Request, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        z = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape)
        return _dispatch.resolve(request, [z]).impl

    assert impl(request_, shape, dtype) == "auto"
    assert impl(Request(center=True), (8, 4), torch.float32) == "triton"


@needs_triton
@pytest.mark.parametrize(
    ("dtypes", "setting", "parts"),
    [
        ([torch.float32], "highest", 2),
        ([torch.float32], "high", 1),
        ([torch.float32], "medium", 1),
        ([torch.float16], "highest", 1),
        ([torch.bfloat16], "highest", 1),
        ([torch.float16, torch.bfloat16], "highest", 1),
        ([torch.bfloat16, torch.float32], "highest", 2),
        ([torch.bfloat16, torch.float32], "high", 1),
    ],
    ids=str,
)
def test_operands_follow_the_precision_that_was_set(
    dtypes: list[torch.dtype], setting: str, parts: int
) -> None:
    views = [torch.zeros(8, 4, dtype=dtype) for dtype in dtypes]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        request = _dispatch.resolve(Request(covariance="auto", impl="triton"), views)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (request.impl, request.parts) == ("triton", parts)


def test_precision_set_by_the_newer_interface() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has no fp32_precision")
    code = (
        "import torch\n"
        "from vicreg_losses import _compat\n"
        "for setting in ('tf32', 'ieee'):\n"
        "    torch.backends.cuda.matmul.fp32_precision = setting\n"
        "    print(_compat.float32_products_are_exact())"
    )
    assert run(code).split() == ["False", "True"]
    assert _compat.float32_products_are_exact()


@needs_triton
def test_vicreg_takes_kernels_for_its_regularizers() -> None:
    z = oracles.embeddings(2, 12, 20).bfloat16()
    terms = VICRegLoss(impl="triton").terms(z)
    others = VICRegLoss().terms(z)
    assert torch.equal(terms.invariance, others.invariance)
    assert not torch.equal(terms.covariance, others.covariance)  # of rounded operands
    torch.testing.assert_close(terms.covariance, others.covariance, rtol=1e-3, atol=0)
    torch.testing.assert_close(terms.variance, others.variance, rtol=1e-6, atol=0)
