"""``python -m benchmarks.compile_gate``: compile every kernel for every chip, without a driver.

The launches are recorded from the library itself, run on tensors without data; each distinct one is
compiled for the chip it was planned for, and its machine code is read. A chip fails on spilled
registers, on local memory, on a matrix product without tensor-core instructions, and on more
shared memory than it has.
"""

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vicreg_losses import _fused
from vicreg_losses._request import Request
from vicreg_losses.kernels import directions, launch
from vicreg_losses.kernels.launch import Target

CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108),
    "sm_90": (GPUTarget("cuda", 90, 32), 132),
    "sm_100": (GPUTarget("cuda", 100, 32), 148),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),
}
# Instructions of the tensor cores in machine code.
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
# One of each class of block shapes: tiny, both forms small, split, and large.
SHAPES = [
    (1, 40, 1),  # sizes of 1 are compile-time constants
    (1, 2, 3),
    (2, 40, 24),
    (1, 256, 8192),
    (1, 4096, 256),
    (1, 2048, 8192),
    (2, 4096, 2048),
    (1, 16384, 512),
    (1, 8192, 16384),
    (1, 16384, 8192),
]
# Likewise (V, N, D, K) for the sketch: each length of its networks, and the library's sort.
SKETCHES = [
    (1, 40, 1, 1),
    (2, 200, 24, 70),
    (10, 1024, 256, 4096),
    (1, 2048, 256, 4096),
    (1, 4096, 256, 4096),
    (1, 8192, 256, 4096),
    (1, 16384, 256, 4096),
    (8, 50000, 10000, 2500),
]
# Bytes that a thread of a kernel may spill: the longest network, once, when the row is sorted.
SPILLS = {"_sort_kernel": 64}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRODUCTS = {"_inner_kernel", "_gradient_kernel", "_sketch_gradient_kernel"}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel as one launch specialises it."""

    chip: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int
    registers: int | None

    @property
    def label(self) -> str:
        """What tells it from others."""
        left_out = ("AMD", "PLACES", "LOCAL")
        flags = {k: v for k, v in self.constants if k.isupper() and k not in left_out}
        tile = [str(flags.pop(name)) for name in ("ROWS", "COLUMNS", "DEPTH") if name in flags]
        rest = [f"{name.lower()}={int(value)}" for name, value in flags.items() if name != "BAND"]
        types = {dict(self.signature).get(name) for name in ("z_ptr", "out_ptr")} - {None}
        return " ".join(["x".join(tile), *rest, *sorted(t.strip("*") for t in types if t)])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the machine code of a variant needs."""

    chip: str
    kernel: str
    label: str
    registers: int
    spilled_bytes: int
    local_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    faults: tuple[str, ...]


def variants(
    chip: str,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    sketches: Sequence[tuple[int, int, int, int]] = SKETCHES,
) -> list[Variant]:
    """Every distinct launch of the library on a chip, over shapes, dtypes, forms and terms."""
    target = Target(chip, CHIPS[chip][1], launch.SHARED[chip])
    found: dict[Variant, None] = {}

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.setdefault(_specialised(chip, kernel, args, options))

    with (
        mock.patch.object(_fused, "target", return_value=target),
        mock.patch.object(launch, "target", return_value=target),
        mock.patch.object(launch, "call", record),
    ):
        for shape in shapes:
            for dtype in DTYPES:
                for request in _requests(dtype):
                    _step(request, torch.empty(shape, dtype=dtype, device="meta"))
        for *shape, slices in sketches:
            for dtype in DTYPES[:2]:
                for request in _sketch_requests(dtype, slices):
                    _step(request, torch.empty(shape, dtype=dtype, device="meta"))
            counter = torch.empty((), dtype=torch.int64, device="meta")
            directions.draw(counter, counter, 0, shape[2], slices)
    return list(found)


def _requests(dtype: torch.dtype) -> Iterator[Request]:
    for parts in (1, 2) if dtype == torch.float32 else (1,):
        yield Request(covariance="auto", impl="triton", parts=parts)
        yield Request("hinge", covariance="auto", impl="triton", parts=parts)
    yield Request("hinge", center=True, impl="triton")
    yield Request("squared", center=True, impl="triton")


def _sketch_requests(dtype: torch.dtype, slices: int) -> Iterator[Request]:
    for parts in (1, 2) if dtype == torch.float32 else (1,):
        common = {"impl": "triton", "parts": parts, "slices": slices}
        yield Request(sketch="wasserstein", **common)
        yield Request("squared", center=True, sketch="wasserstein", **common)
        for knots in (17, 3, 40) if slices < 256 else (17,):
            yield Request(sketch="epps_pulley", knots=knots, **common)


def _step(request: Request, z: torch.Tensor) -> None:
    """Forward and backward of all terms."""
    w = z.new_empty((z.shape[2], request.slices), dtype=torch.float32) if request.slices else None
    outputs = _fused.evaluate(request, [z], w, keep=True)
    count = request.terms()
    values, residue = outputs[:count], outputs[count:]
    shape = (z.shape[0], z.shape[1], z.shape[2])
    _fused.gradient(request, shape, values, residue, values, [z], z.dtype)
    if z.shape[1] <= 256 or not request.sketch:  # without a gradient long networks have room
        _fused.evaluate(request, [z], w, keep=False)


def _specialised(chip: str, kernel: Any, args: Any, options: dict[str, Any]) -> Variant:
    """What Triton's launcher would compile: ones are constants, multiples of 16 are known."""
    options = dict(options)
    warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
    registers = options.pop("registers", None)
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    constexpr = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, divisible = {}, {}, []
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            # Tickets are a view past the first; allocations are aligned.
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(place)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(place)
    module = kernel.fn.__module__.rsplit(".", 1)[-1]
    return Variant(
        chip,
        f"{module}.{kernel.fn.__name__}",
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        warps,
        stages,
        registers,
    )


def compiled(variant: Variant) -> Compiled:
    """Compile a variant and read what it needs."""
    module, name = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"vicreg_losses.kernels.{module}"), name)
    source = ASTSource(
        fn=kernel,
        signature=dict(variant.signature),
        constexprs={(kernel.arg_names.index(n),): v for n, v in variant.constants},
        attrs={(place,): [["tt.divisibility", 16]] for place in variant.divisible},
    )
    options: dict[str, Any] = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": True,
    }
    if variant.registers and not variant.chip.startswith("gfx"):
        options["maxnreg"] = variant.registers
    result = triton.compile(source, target=CHIPS[variant.chip][0], options=options)
    shared = result.metadata.shared
    if variant.chip.startswith("gfx"):
        text = result.asm["amdgcn"]
        number = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
            for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        }
        registers = number["vgpr_count"]
        spilled, local = 4 * number["vgpr_spill_count"], number["private_segment_fixed_size"]
    else:
        text, registers, local = _disassembled(result.asm["cubin"])
        spilled = 4 * len(re.findall(r"\b(?:LDL|STL)\b", text))
    products_in = TENSOR_CORES[variant.chip]
    used = len(re.findall(rf"\b{products_in}\w*", text))
    faults = []
    if variant.chip.startswith("gfx") and not _writes_are_awaited(text):
        faults.append("a ticket is taken before all threads have waited for their writes")
    if max(spilled, local) > SPILLS.get(name, 0):
        faults.append(f"spills {spilled} B, local memory {local} B")
    if shared > launch.SHARED[variant.chip]:
        faults.append(f"{shared} B of shared memory, over {launch.SHARED[variant.chip]}")
    if name in PRODUCTS and not used:
        faults.append(f"no {products_in}")
    return Compiled(
        variant.chip,
        variant.kernel,
        variant.label,
        registers,
        spilled,
        local,
        shared,
        used,
        tuple(faults),
    )


def _writes_are_awaited(text: str) -> bool:
    """Whether, in AMD's code, a wait and a barrier are between each write and the next ticket."""
    awaited = passed = True
    for line in text.splitlines():
        if "global_store" in line or "buffer_store" in line:
            awaited = passed = False
        elif "s_waitcnt vmcnt(0)" in line:
            awaited = True
        elif "s_barrier" in line:
            passed = awaited
        elif "_atomic_add" in line and not passed:
            return False
    return True


def _disassembled(cubin: bytes) -> tuple[str, int, int]:
    """Machine code, registers and bytes of local memory (stack and local) of NVIDIA's format."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run(
                [tools / tool, *flags, file.name], capture_output=True, check=True
            ).stdout.decode()
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return text, int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_gate", description=__doc__)
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, default=None, help="also write the table here")
    options = parser.parse_args()
    shapes = SHAPES[:1] + SHAPES[4:5] if options.quick else SHAPES
    sketches = SKETCHES[1:2] if options.quick else SKETCHES
    work = [v for chip in options.chip or CHIPS for v in variants(chip, shapes, sketches)]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(compiled, work, chunksize=4))
    table = Table(title=f"triton {triton.__version__}: {len(results)} kernels")
    columns = ("chip", "kernel", "variant", "registers", "spilled", "local", "shared", "mma")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for r in results:
        style = "red" if r.faults else None
        cells = (r.registers, r.spilled_bytes, r.local_bytes, r.shared_bytes)
        numbers = (*cells, r.tensor_core_instructions)
        table.add_row(r.chip, r.kernel, r.label, *map(str, numbers), style=style)
    console = Console(width=140)
    console.print(table)
    for r in results:
        for fault in r.faults:
            console.print(f"{r.chip} {r.kernel} {r.label}: {fault}")
    if options.json:
        record = {"triton": triton.__version__, "kernels": [dataclasses.asdict(r) for r in results]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if any(r.faults for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
