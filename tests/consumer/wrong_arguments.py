"""A user's mistakes: ``mypy --strict`` must find each, so that it is known to look."""

import torch

from vicreg_losses import VarianceLoss, VICRegLoss, VISRegLoss, diagnostics, distributed, functional

z = torch.randn(8, 4)
VarianceLoss(gamma="1")  # error: arg-type
VarianceLoss().forward(3)  # error: arg-type
VICRegLoss().total(z)  # error: arg-type
VISRegLoss().terms(z, direction=z)  # error: call-arg
correlated = VISRegLoss().terms(z, z).covariance  # error: attr-defined
functional.variance_loss(z, 1.0)  # error: call-arg
functional.sliced_sketch_loss(z, num_slices="64")  # error: arg-type
functional.barlow_loss(z)  # error: attr-defined
distributed.all_gather([z])  # error: arg-type
text: str = diagnostics.effective_rank(z)  # error: assignment
