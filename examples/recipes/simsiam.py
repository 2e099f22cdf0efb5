"""SimSiam on lightly's modules, with one line of vicreg-losses.

    python examples/recipes/simsiam.py              # with the line
    python examples/recipes/simsiam.py --without    # without it

lightly's projector ends in ``BatchNorm1d(affine=False)``, so the standard deviations of ``z`` are 1
and ``VarianceLoss`` of it is zero. What ``z`` loses there is rank, hence ``CovarianceLoss``.
lightly's own example returns ``z.detach()``, of which no loss has a gradient; here the arguments of
the criterion are detached instead.
"""

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from shared import SIZE, arguments, batches_of_views, show
from torch import Tensor, nn

from vicreg_losses import CovarianceLoss


class SimSiam(nn.Module):
    """A ResNet-18, a projector and a predictor; an image gives its projection and prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.projector = SimSiamProjectionHead(512, 512, 128)
        self.predictor = SimSiamPredictionHead(128, 64, 128)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(self.backbone(x))
        return z, self.predictor(z)


def main(argv: list[str] | None = None) -> SimSiam:
    """Train, and return the network."""
    options = arguments(argv, "SimSiam")
    transform = SimSiamTransform(input_size=SIZE, hf_prob=0.0, gaussian_blur=0.0)  # for digits
    batches = batches_of_views(options, transform)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SimSiam().to(device)
    criterion = NegativeCosineSimilarity()
    regularizer = CovarianceLoss()  # once
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)

    for epoch in range(options.epochs):
        for step, (x0, x1) in enumerate(batches):
            z0, p0 = model(x0.to(device))
            z1, p1 = model(x1.to(device))
            loss = 0.5 * (criterion(p0, z1.detach()) + criterion(p1, z0.detach()))
            if not options.without:
                loss = loss + 0.04 * regularizer(z0, z1)  # the one line
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                show(epoch, step, loss, z0)
    return model


if __name__ == "__main__":
    main()
