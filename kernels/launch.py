"""The chip behind a device, and the call of a kernel."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton


class Target(NamedTuple):
    """What the block shapes depend on.

    Attributes:
        arch: "sm_90", "gfx942" and so on; "interpreter" on a CPU.
        processors: streaming multiprocessors (compute units).
        shared: most shared memory of one program, in bytes.
    """

    arch: str
    processors: int
    shared: int


# Their matrix instructions take small 16-bit numbers for 0.
REFUSED = ("gfx908", "gfx90a")
# Most shared memory of a program, in bytes.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


def target(device: torch.device) -> Target:
    """The chip behind a device; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return Target("interpreter", 4, 1 << 40)
    return _accelerator(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _accelerator(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        shared = SHARED.get(arch, 65536)
    else:
        arch = f"sm_{properties.major}{properties.minor}"
        shared = getattr(properties, "shared_memory_per_block_optin", SHARED.get(arch, 101376))
    return Target(arch, properties.multi_processor_count, shared)


def is_amd(device: torch.device) -> bool:
    """Whether the chip is one of AMD's."""
    return target(device).arch.startswith("gfx")


def is_interpreted(kernel: Any) -> bool:
    """Whether ``TRITON_INTERPRET=1`` was set when the kernel was defined."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def call(
    kernel: Any, grid: tuple[int, ...], *args: Any, registers: int | None = None, **options: Any
) -> None:
    """Launch a kernel on the device of its first argument.

    Args:
        kernel: what to launch.
        grid: number of programs along each axis.
        *args: tensors, numbers, or ``None`` for what this variant does not read.
        registers: of a thread, at most, on NVIDIA's chips.
        **options: compile-time arguments, ``num_warps``, ``num_stages``.
    """
    if registers and not (torch.version.hip or is_interpreted(kernel)):
        options["maxnreg"] = registers
    with on_device(args[0].device):
        kernel[grid](*args, enable_fp_fusion=True, **options)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
