"""What is measured over ranks: pairs of losses, and their check against one process."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import vicreg_losses as vl
from benchmarks import distributed_published, published

Loss = Callable[[Tensor, Tensor | None], Tensor]

# Relative, in float64: sums in another order; a wrong convention has tenths.
EXACT = 1e-9


class Case(NamedTuple):
    """One comparison; N samples of V views on each rank.

    Attributes:
        loss: "covariance", "vicreg", "wasserstein", "epps_pulley" or "visreg".
        views, samples, dimensions, slices: V, N, D, K.
        quick: whether the short table has it.
        options: of ours.
    """

    loss: str
    views: int
    samples: int
    dimensions: int
    slices: int = 0
    quick: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.views, self.samples, self.dimensions

    @property
    def own_slices(self) -> bool:
        """Whether our ranks have slices of their own, as those of VISReg's trainer."""
        return self.options.get("slices") == "per_rank"


CASES = (
    Case("covariance", 1, 256, 2048),
    Case("covariance", 1, 1024, 256),
    Case("covariance", 1, 1024, 1024, quick=False),
    Case("vicreg", 2, 256, 1024),
    Case("vicreg", 2, 256, 2048, quick=False),
    Case("wasserstein", 1, 256, 256, 1024),
    Case("wasserstein", 1, 256, 256, 1024, options={"slices": "per_rank"}),
    Case("wasserstein", 1, 256, 1024, 1024, quick=False),
    Case("epps_pulley", 1, 256, 256, 1024),
    Case("visreg", 2, 256, 256, 1024),
    Case("visreg", 2, 256, 1024, 1024, quick=False),
)


def unit_directions(case: Case, generator: torch.Generator) -> Tensor:
    w = torch.randn(
        case.dimensions, case.slices, generator=generator, device=generator.device
    )  # fmt: skip
    return w / w.norm(dim=0, keepdim=True)


def published_loss(case: Case, device: torch.device) -> Loss:
    """Gathers everything; draws its slices where none are given, VISReg's ranks their own."""
    own = case.loss in ("wasserstein", "visreg")
    generator = torch.Generator(device).manual_seed(1 + own * dist.get_rank())

    formula = getattr(
        distributed_published, {"wasserstein": "sliced_wasserstein"}.get(case.loss, case.loss)
    )

    def loss(z: Tensor, w: Tensor | None) -> Tensor:
        if not case.slices:
            return formula(z)
        return formula(z, unit_directions(case, generator) if w is None else w)

    return loss


def our_loss(case: Case) -> Loss:
    """Ours, which draws its slices where none are given."""
    simple = {"covariance": vl.CovarianceLoss, "vicreg": vl.VICRegLoss}
    if case.loss in simple:
        module = simple[case.loss](**case.options)
        return lambda z, w: module(z)
    if case.loss == "visreg":
        sketch = vl.VISRegLoss(num_slices=case.slices, **case.options)
    else:
        sketch = vl.SlicedSketchLoss(case.slices, case.loss, **case.options)
    return lambda z, w: sketch(z, directions=w)


def samples_of(case: Case, rank: int) -> Tensor:
    """Correlated and off-centre, and differently distributed on each rank."""
    z = torch.randn(case.shape, generator=torch.Generator().manual_seed(rank))
    return (1 + 0.3 * rank) * (0.8 * z + 0.3 * z.roll(1, -1)) + 0.1 * (1 + rank)


def directions_of(case: Case, rank: int) -> Tensor | None:
    if not case.slices:
        return None
    return unit_directions(case, torch.Generator().manual_seed(1000 + rank))


def truth(case: Case, own: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Value, and gradient for this rank's samples times W: one process, the concatenated batch.

    With slices of each rank's own the loss is that of all of them.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    z = torch.cat([samples_of(case, other) for other in range(size)], 1).to(dtype)
    z.requires_grad_()
    formulas: dict[str, Callable[..., Tensor]] = {
        "covariance": published.covariance,
        "vicreg": published.vicreg,
        "wasserstein": published.sliced_wasserstein,
        "epps_pulley": published.epps_pulley,
        "visreg": published.visreg_loss,
    }
    several = [directions_of(case, other) for other in range(size if own else 1)]
    w = [torch.cat([x.to(dtype) for x in several if x is not None], 1)] if case.slices else []
    value = formulas[case.loss](z, *w)
    value.backward()
    assert z.grad is not None
    begin = rank * case.samples
    return value.detach(), size * z.grad[:, begin : begin + case.samples]


def over_ranks(
    loss: Loss, case: Case, own: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean over ranks of the value, and this rank's gradient."""
    z = samples_of(case, dist.get_rank()).to(device, dtype).requires_grad_()
    w = directions_of(case, dist.get_rank() if own else 0)
    value = loss(z, None if w is None else w.to(device, dtype))
    value.backward()
    assert z.grad is not None
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).cpu(), z.grad.cpu()


def distance(pair: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """The larger relative error of value and gradient, in norm."""
    each = [(x - true).norm() / true.norm() for x, true in zip(pair, right, strict=True)]
    return torch.stack(each).max()


def checked(case: Case, sides: dict[str, Loss], device: torch.device) -> dict[str, float]:
    """Errors of both sides in float32; an exception, on all ranks, if either is wrong.

    In float64 they must agree with one process to ``EXACT``. In float32 neighbours in a sort change
    places, in plain PyTorch too, so its own error there is the yardstick.
    """
    errors = {}
    for side, loss in sides.items():
        own = case.loss in ("wasserstein", "visreg") if side == "published" else case.own_slices
        right = truth(case, own)
        exact = distance(over_ranks(loss, case, own, torch.float64, device), right)
        single = distance(over_ranks(loss, case, own, torch.float32, device), right)
        plain = distance(truth(case, own, torch.float32), right)
        worst = torch.stack((exact, single, plain)).to(device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        exact, single, plain = worst.unbind()
        errors[side] = float(single)
        if not (exact <= EXACT and single <= 4 * plain + 1e-5):
            raise RuntimeError(
                f"refusing to report {case.loss} {case.shape} over {dist.get_world_size()} ranks: "
                f"{side} is {float(exact):.1e} away from one process in float64, and "
                f"{float(single):.1e} in float32, where plain PyTorch is {float(plain):.1e}."
            )
    return errors
