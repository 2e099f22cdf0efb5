"""Several ranks where programs are unusual: what is passed, used, asked for, and out of range."""

import math
import os
from typing import Any

import pytest
import torch
from pool import refusal, run
from torch import Tensor, nn

from vicreg_losses import (
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    _collectives,
    _compat,
    distributed,
    functional,
)

SIZES = (3, 5)


def share(rank: int, dimensions: int = 4, views: int = 2) -> tuple[Tensor, Tensor]:
    """This rank's samples, and those of all."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(views, sum(SIZES), dimensions, generator=generator, dtype=torch.float64)
    return whole.split(SIZES, 1)[rank].contiguous(), whole


def parameters(rank: int, world: int) -> tuple[bool, str]:
    """Embeddings that are a Parameter themselves, as a memory bank."""
    z, whole = share(rank)
    value = functional.covariance_loss(nn.Parameter(z), strategy="gram")
    alone = functional.covariance_loss(whole, gather_distributed=False)
    bank = nn.Parameter(z[0])
    ragged = torch.equal(distributed.all_gather_ragged(bank), whole[0])
    close = torch.allclose(value, alone, rtol=1e-10, atol=0)
    return close and ragged, refusal(lambda: distributed.all_gather(bank))


def test_parameters() -> None:
    for right, unequal in run(parameters, 2):
        assert right
        assert "samples: 3 on rank 0; 5 on rank 1" in unequal


def of_something_else(rank: int, world: int) -> list[bool]:
    """Derivatives by a factor of the loss, by torch.func; and many backward passes at once."""
    z, _ = share(rank)
    right = []
    for name in ("variance_loss", "sliced_sketch_loss", "invariance_loss"):
        options = {"generator_seed": 0, "num_slices": 8} if name == "sliced_sketch_loss" else {}

        def loss(x: Tensor, name: str = name, options: dict[str, Any] = options) -> Tensor:
            return getattr(functional, name)(x, **options)

        by_factor = torch.func.grad(lambda a, f=loss: a * f(z))(torch.ones(()).double())
        right.append(torch.equal(by_factor, loss(z)))
    for module in (VarianceLoss(), SlicedSketchLoss(4)):
        leaf = z.clone().requires_grad_()
        value = module(leaf)
        (one,) = torch.autograd.grad(value, leaf, retain_graph=True)
        scales = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
        (many,) = torch.autograd.grad(value, leaf, scales, is_grads_batched=True)
        right.append(torch.allclose(many, scales.view(-1, 1, 1, 1) * one, rtol=1e-12, atol=0))
    return right


def test_derivatives_of_something_else() -> None:
    assert run(of_something_else, 2) == [[True] * 5] * 2


def used_by_one(rank: int, world: int) -> list[float]:
    """Compiled steps in which only the first rank uses a result of all."""
    z = share(rank)[0][:, :3].contiguous()
    heard = []
    for loss in (functional.variance_loss, lambda x: distributed.all_gather(x[0]).std()):

        def step(x: Tensor, loss: Any = loss) -> Tensor:
            value = loss(x)
            return value if rank == 0 else x.sum()

        torch._dynamo.reset()
        with torch.no_grad():
            heard.append(torch.compile(step, backend="aot_eager", fullgraph=True)(z).item())
    torch._dynamo.reset()
    return heard


def test_compiled_results_that_one_rank_uses() -> None:
    """The others must send their part all the same."""
    run(used_by_one, 2, timeout=240)


def large(rank: int, world: int) -> list[bool]:
    """Embeddings whose squares are in float32's range, but not the sum of all."""
    z = 5e18 * share(rank)[0].float()
    losses = (InvarianceLoss(), VICRegLoss(), LeJEPALoss(num_slices=4))
    terms = [losses[0](z), losses[1].terms(z).invariance, losses[2].terms(z).invariance]
    return [bool(term.isfinite()) for term in terms]


def test_the_range_is_that_of_one_rank() -> None:
    assert run(large, 2) == [[True] * 3] * 2


def off_the_cpu(rank: int, world: int) -> list[Any]:
    """In a group without a CPU's backend, on a device for which nobody waits: a stand-in.

    Of each call: its error or how far the value is from that of all samples; and meetings so far.
    """
    meetings = []
    gather = _collectives.all_gather

    def counted(x: Tensor, group: Any) -> Tensor:
        if x.dtype == torch.int64:
            meetings.append(1)
        return gather(x, group)

    def call(sizes: tuple[int, int]) -> tuple[float | str, int]:
        whole = torch.randn(1, sum(sizes), 4, generator=torch.Generator().manual_seed(1)).double()
        alone = functional.variance_loss(whole, gather_distributed=False)
        try:
            value = functional.variance_loss(whole.split(sizes, 1)[rank])
        except RuntimeError as error:
            return str(error), len(meetings)
        return (value - alone).abs().item(), len(meetings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_collectives, "_CPU", torch.device("meta"))
        patch.setattr(_compat, "has_cpu_backend", lambda group: False)
        patch.setattr(_collectives, "all_gather", counted)
        heard = [call(sizes) for sizes in ((3, 5), (5, 2), (4, 6))]
        distributed.limit_samples(8)
        return [*heard, call((4, 6)), call((8, 0))]


def test_off_the_cpu_ranks_meet_once() -> None:
    for rank, (first, ragged, larger, limited, empty) in enumerate(run(off_the_cpu, 2)):
        assert first == (pytest.approx(0, abs=1e-12), 1)
        for later in (ragged, limited, empty):
            assert later == (pytest.approx(0, abs=1e-12), 1)
        if rank == 0:  # what the other one has left out
            assert math.isnan(larger[0])
        else:
            assert "expected at most 5 samples on a rank" in larger[0]
            assert "got 6" in larger[0]


def test_slices_off_the_cpu_are_looked_at_once() -> None:
    """Later the host would wait for the device at every call."""
    for device, later in (("cpu", 16), ("meta", 0)):
        directions = torch.empty(6, 9, device=device)
        assert _collectives.looked_at(directions, True).numel() == 54
        assert _collectives.looked_at(directions, False).numel() == later


def asked_wrongly(rank: int, world: int) -> dict[str, str]:
    z, _ = share(rank)
    said = {"group": refusal(lambda: functional.center_loss(z, process_group=3))}
    os.environ["VICREG_LOSSES_DEBUG"] = str(rank)
    try:
        said["debug"] = refusal(lambda: functional.center_loss(z))
    finally:
        del os.environ["VICREG_LOSSES_DEBUG"]
    return said


def test_wrong_settings_are_named() -> None:
    for said in run(asked_wrongly, 2):
        assert said["group"].startswith("TypeError: process_group: expected a ProcessGroup")
        assert "VICREG_LOSSES_DEBUG: False on rank 0; True on rank 1" in said["debug"]


@pytest.mark.parametrize("samples", [1, 64])
def test_a_limit_is_of_no_effect_on_one_process(samples: int) -> None:
    distributed.limit_samples(samples)
    assert functional.variance_loss(torch.zeros(8, 4)).isfinite()
