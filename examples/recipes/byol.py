"""BYOL on lightly's modules, with one line of vicreg-losses.

    python examples/recipes/byol.py              # with the line
    python examples/recipes/byol.py --without    # without it

The line takes the online projections ``z``: the targets have no gradient. BYOL's loss normalises
its predictions itself and the projector ends in a linear layer, so the scale of ``z`` is free.
``VarianceLoss`` holds it up, but alone along few directions; ``CovarianceLoss`` spreads ``z``, but
alone shrinks it. lightly's own example returns the prediction alone; here ``z`` is returned too.
"""

import copy

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.byol_transform import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
)
from lightly.utils.scheduler import cosine_schedule
from shared import SIZE, arguments, batches_of_views, show
from torch import Tensor, nn

from vicreg_losses import CovarianceLoss, VarianceLoss


class BYOL(nn.Module):
    """A ResNet-18, a projector and a predictor, and the moving average of the first two."""

    def __init__(self) -> None:
        super().__init__()
        backbone = torchvision.models.resnet18()
        backbone.fc = nn.Identity()
        self.online = nn.Sequential(backbone, BYOLProjectionHead(512, 1024, 256))
        self.predictor = BYOLPredictionHead(256, 1024, 256)
        self.target = copy.deepcopy(self.online)
        deactivate_requires_grad(self.target)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.online(x)
        return z, self.predictor(z), self.target(x)


def main(argv: list[str] | None = None) -> BYOL:
    """Train, and return the networks."""
    options = arguments(argv, "BYOL")
    view = {"input_size": SIZE, "hf_prob": 0.0, "gaussian_blur": 0.0}  # for digits
    transform = BYOLTransform(BYOLView1Transform(**view), BYOLView2Transform(**view))
    batches = batches_of_views(options, transform)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BYOL().to(device)
    criterion = NegativeCosineSimilarity()
    variance, covariance = VarianceLoss(), CovarianceLoss()  # once
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)

    for epoch in range(options.epochs):
        for step, (x0, x1) in enumerate(batches):
            done = epoch * len(batches) + step
            momentum = cosine_schedule(done, options.epochs * len(batches), 0.99, 1.0)
            update_momentum(model.online, model.target, momentum)
            z0, p0, t0 = model(x0.to(device))
            z1, p1, t1 = model(x1.to(device))
            loss = 0.5 * (criterion(p0, t1) + criterion(p1, t0))
            if not options.without:
                loss = loss + variance(z0, z1) + 0.04 * covariance(z0, z1)  # the one line
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                show(epoch, step, loss, z0)
    return model


if __name__ == "__main__":
    main()
