"""A typed program of a user: ``mypy --strict`` must pass it against the installed wheel.

It runs too. Every public name is here (tests/test_release.py looks).
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import vicreg_losses
from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    LeJEPATerms,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VICRegTerms,
    VISRegLoss,
    VISRegTerms,
    diagnostics,
    distributed,
    functional,
)

if sys.version_info >= (3, 11):
    from typing import assert_type
elif TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value: object, kind: object) -> object:
        """Do nothing, as the function of Python 3.11 does."""
        return value


class Trainer:
    """Holds a loss as a user's class would."""

    def __init__(self, regularizer: nn.Module, objective: VICRegLoss) -> None:
        self.regularizer = regularizer
        self.objective = objective

    def step(self, first: Tensor, second: Tensor) -> Tensor:
        """The weighted terms, and a regularizer as any module."""
        terms = self.objective.terms(first, second)
        assert_type(terms, VICRegTerms)
        extra: Tensor = self.regularizer(first, second)
        return self.objective.total(terms) + extra


def unit_columns(dimensions: int, slices: int) -> Tensor:
    """Directions of one's own."""
    return nn.functional.normalize(torch.randn(dimensions, slices), dim=0)


def modules(views: Sequence[Tensor], directions: Tensor) -> Tensor:
    """One tensor, several, a list, or one of all views; every option by its name."""
    first, second = views
    stacked = torch.stack(list(views))
    losses = [
        VarianceLoss(gamma=1.0, eps=1e-4, form="hinge").forward(first),
        CovarianceLoss(strategy="auto", reduction="sum").forward(first, second),
        InvarianceLoss(form="center", num_global=None).forward(views),
        SlicedSketchLoss(num_slices=8, statistic="epps_pulley", knots=9).forward(stacked),
        SlicedSketchLoss(directions=directions).forward(first, directions=None),
    ]
    assert_type(losses, list[Tensor])
    return torch.stack(losses).sum()


def composites(views: Sequence[Tensor], directions: Tensor) -> Tensor:
    """Terms by name, and their sums."""
    vicreg, visreg, lejepa = VICRegLoss(25, 25, 1), VISRegLoss(num_slices=8), LeJEPALoss()
    a = assert_type(vicreg.terms(views), VICRegTerms)
    b = assert_type(visreg.terms(views, directions=directions), VISRegTerms)
    c = assert_type(lejepa.terms(*views, directions=directions), LeJEPATerms)
    assert_type(a.invariance, Tensor)
    assert_type(b.scale + b.shape + b.center, Tensor)
    assert_type(c.sketch, Tensor)
    total = vicreg.total(a) + visreg.total(b) + lejepa.total(c)
    return assert_type(total, Tensor) + Trainer(VarianceLoss(), vicreg).step(views[0], views[1])


def functions(views: Sequence[Tensor], directions: Tensor) -> Tensor:
    """The functions take what the modules take, as one argument."""
    losses = (
        functional.variance_loss(views[0], gamma=1.0),
        functional.center_loss(views),
        functional.covariance_loss(list(views), strategy="gram"),
        functional.invariance_loss(torch.stack(list(views)), num_global=None),
        functional.sliced_sketch_loss(views, directions=directions, quantiles="exact"),
    )
    assert_type(losses, tuple[Tensor, Tensor, Tensor, Tensor, Tensor])
    return torch.stack(losses).sum()


def across_ranks(z: Tensor) -> str:
    """Without a process group: a world of one."""
    distributed.limit_samples(64)
    assert_type(distributed.world_size(), int)
    assert_type(distributed.all_gather(z), Tensor)
    assert_type(distributed.all_gather_ragged(z), Tensor)
    statistics = assert_type(distributed.batch_statistics(z), distributed.BatchStatistics)
    assert_type(statistics.mean, Tensor)
    cost = assert_type(distributed.plan("covariance", 64, 32, ranks=8), distributed.Plan)
    return str(cost)


def diagnose(z: Tensor) -> list[str]:
    """Numbers for a log."""
    rank: float = assert_type(diagnostics.effective_rank(z), float)
    report = assert_type(diagnostics.embedding_report(z), diagnostics.EmbeddingReport)
    pulls = diagnostics.term_gradients(VISRegLoss(num_slices=8), z, -z)
    assert_type(pulls, dict[str, diagnostics.TermGradient])
    assert_type(pulls["scale"].gradient_norm, float)
    return [f"{rank:.1f} {report.std_median:.2f}", str(report)]


def watch(z: Tensor) -> dict[str, float]:
    """A running report."""
    monitor = diagnostics.EmbeddingMonitor(every=1, samples=16)
    scalars = assert_type(monitor.update(z), dict[str, float] | None)
    monitor.load_state_dict(monitor.state_dict())
    return {} if scalars is None else scalars


def callbacks() -> list[object]:
    """What a Trainer of Lightning is given."""
    from vicreg_losses.lightning import EmbeddingMonitorCallback

    return [EmbeddingMonitorCallback("projector", every=50, samples=512)]


def main() -> None:
    """Run it all once."""
    views = [torch.randn(16, 8, requires_grad=True) for _ in range(2)]
    directions = unit_columns(8, 4)
    total = modules(views, directions) + composites(views, directions)
    total = total + functions(views, directions)
    torch.autograd.backward(total)  # ``Tensor.backward`` has no types in PyTorch
    print(assert_type(vicreg_losses.__version__, str), across_ranks(views[0]), *diagnose(views[0]))
    print(watch(views[0]))


if __name__ == "__main__":
    main()
