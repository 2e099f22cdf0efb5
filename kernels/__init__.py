"""Fused Triton kernels of vicreg_losses.

The folder is installed as ``vicreg_losses.kernels``. The top-level import name ``kernels`` belongs
to another package, so it is refused here.
"""

if __name__ != "vicreg_losses.kernels":
    raise ImportError(f"import vicreg_losses.kernels, not {__name__!r}")
