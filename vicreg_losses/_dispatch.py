"""Which implementation of the primitives serves a call."""

from types import ModuleType

from . import _torch
from ._checks import one_of

IMPLEMENTATIONS = ("auto", "torch", "triton")


def resolve(impl: str) -> ModuleType:
    """The module of primitives for ``impl``.

    A named implementation is honoured or refused with the reason; only "auto" chooses.
    """
    one_of("impl", impl, IMPLEMENTATIONS)
    if impl == "triton":
        raise RuntimeError(
            "impl='triton' cannot run: this version of vicreg_losses has no Triton kernels. "
            "Use impl='auto' or impl='torch'."
        )
    return _torch
