"""Run from an empty folder by the Python of a fresh environment: is what it imports the wheel?"""

import importlib.util
import pathlib
import sys

import torch

import vicreg_losses
import vicreg_losses.kernels

package = pathlib.Path(vicreg_losses.__file__).parent
assert package.is_relative_to(sys.argv[1]), f"imported from {package}"
assert importlib.util.find_spec("kernels") is None, "a top-level 'kernels' was installed"
assert (package / "py.typed").is_file(), "no py.typed"
z = torch.randn(8, 4, requires_grad=True)
vicreg_losses.VarianceLoss()(z).backward()
assert z.grad is not None
print("imported:", vicreg_losses.__version__)
