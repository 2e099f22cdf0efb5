"""Which term is winning: weighted values that add up, and lengths of gradients, term by term."""

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from vicreg_losses import LeJEPALoss, VICRegLoss, VISRegLoss
from vicreg_losses.diagnostics import term_gradients

Z = oracles.embeddings(2, 24, 6)
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "vicreg": VICRegLoss,
    "visreg": lambda: VISRegLoss(num_slices=8),
    "lejepa": lambda: LeJEPALoss(num_slices=8),
}
each = pytest.mark.parametrize("name", OBJECTIVES)


@each
def test_values_add_up_to_the_loss(name: str) -> None:
    objective = OBJECTIVES[name]()
    found = term_gradients(objective, Z)
    assert tuple(found) == objective.terms(Z)._fields
    total = sum(term.value for term in found.values())
    assert total == pytest.approx(OBJECTIVES[name]()(Z).item(), rel=1e-9)


def test_gradients_are_those_of_each_term_alone() -> None:
    found = term_gradients(VICRegLoss(3, 5, 7), Z)
    alone = {"invariance": (3, 0, 0), "variance": (0, 5, 0), "covariance": (0, 0, 7)}
    for name, weights in alone.items():
        z = Z.clone().requires_grad_()
        VICRegLoss(*weights)(z).backward()
        assert z.grad is not None
        assert found[name].gradient_norm == pytest.approx(z.grad.norm().item(), rel=1e-9)


@each
def test_forms_of_views_are_one(name: str) -> None:
    objective = OBJECTIVES[name]()
    first = term_gradients(objective, Z)
    for given in (tuple(Z), (list(Z),)):
        for term, expected in zip(
            term_gradients(objective, *given).values(), first.values(), strict=True
        ):
            assert term == pytest.approx(expected, rel=1e-9)


@each
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_disturbed(name: str, training: bool) -> None:
    """Neither the slices of the training nor its gradients nor its modes."""
    objective = OBJECTIVES[name]().train(training)
    z = Z.clone().requires_grad_()
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    term_gradients(objective, z)
    with torch.inference_mode():
        term_gradients(objective, z)
    assert objective.training == training
    assert all(torch.equal(value, state[key]) for key, value in objective.state_dict().items())
    assert z.grad is None
    assert torch.equal(z.detach(), Z)


def test_mode_is_restored_after_an_error() -> None:
    objective = VICRegLoss()
    with pytest.raises(ValueError, match="embeddings: expected at least 2 views"):
        term_gradients(objective, Z[0])
    assert objective.training


def test_small_gradients_of_16_bits_are_not_lost() -> None:
    objective = VICRegLoss(1e-6, 1, 1)
    found = term_gradients(objective, Z.half())["invariance"]
    expected = term_gradients(objective, Z.half().float())["invariance"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert found.gradient_norm > 0


def test_term_without_weight_pulls_at_nothing() -> None:
    assert term_gradients(VICRegLoss(25, 0, 1), Z)["variance"] == (0, 0)


def test_stuck_hinge_has_a_value_and_little_gradient() -> None:
    """What the function is for."""
    collapsed = term_gradients(VICRegLoss(25, 25, 1), 1e-5 * Z)["variance"]
    spread = term_gradients(VICRegLoss(25, 25, 1), 0.5 * Z)["variance"]
    assert collapsed.value > spread.value
    assert collapsed.gradient_norm < 0.01 * spread.gradient_norm


class Own(nn.Module):
    """An objective of a user."""

    def terms(self, z: Tensor) -> Any:
        return VICRegLoss().terms(z)

    def total(self, terms: Any) -> Tensor:
        return 2 * terms.invariance + terms.variance - 3 * terms.covariance


class Constant(Own):
    """With a term that depends on no embedding."""

    def terms(self, z: Tensor) -> Any:
        return super().terms(z)._replace(invariance=Z.new_tensor(4.0))


def test_objectives_of_users() -> None:
    found = term_gradients(Own(), Z)
    ours = term_gradients(VICRegLoss(2, 1, 3), Z)
    for name, sign in {"invariance": 1, "variance": 1, "covariance": -1}.items():
        assert found[name].value == pytest.approx(sign * ours[name].value, rel=1e-9)
        assert found[name].gradient_norm == pytest.approx(ours[name].gradient_norm, rel=1e-9)


def test_constant_term_has_a_value_and_no_gradient() -> None:
    found = term_gradients(Constant(), Z)
    assert found["invariance"] == (8, 0)
    rest = term_gradients(Own(), Z)
    assert [found[name] for name in ("variance", "covariance")] == [
        rest[name] for name in ("variance", "covariance")
    ]


def test_frozen_children_stay_frozen() -> None:
    objective = Own()
    objective.frozen = nn.BatchNorm1d(Z.shape[-1]).eval()
    term_gradients(objective, Z)
    assert objective.training
    assert not objective.frozen.training
