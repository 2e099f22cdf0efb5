"""SimCLR on lightly's modules, with one line of vicreg-losses.

    python examples/recipes/simclr.py              # with the line
    python examples/recipes/simclr.py --without    # without it

NT-Xent normalises the projections itself, and the line takes them before that. lightly's head ends
in ``BatchNorm1d`` with weights, which are the standard deviations of ``z``: ``CovarianceLoss``
decorrelates ``z``, but alone shrinks them too, and ``VarianceLoss`` holds them at 1.
"""

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from shared import SIZE, arguments, batches_of_views, show
from torch import Tensor, nn

from vicreg_losses import CovarianceLoss, VarianceLoss


class SimCLR(nn.Module):
    """A ResNet-18 and a projector; an image gives its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.projector = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


def main(argv: list[str] | None = None) -> SimCLR:
    """Train, and return the network."""
    options = arguments(argv, "SimCLR")
    transform = SimCLRTransform(input_size=SIZE, hf_prob=0.0, gaussian_blur=0.0)  # for digits
    batches = batches_of_views(options, transform)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SimCLR().to(device)
    criterion = NTXentLoss()
    variance, covariance = VarianceLoss(), CovarianceLoss()  # once
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)

    for epoch in range(options.epochs):
        for step, (x0, x1) in enumerate(batches):
            z0, z1 = model(x0.to(device)), model(x1.to(device))
            loss = criterion(z0, z1)
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
