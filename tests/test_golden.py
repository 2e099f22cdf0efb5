"""The oracle, functions, modules and composites against what the published codes return.

Tolerances: everything is float64, and one evaluation order against another differs by the number
of summands times 1e-16; views centred at 10 times their spread, or with a spread of 1e-3 that
divides the gradient, lose at most three digits of that: 1e-10 leaves room and still sees a wrong N.
The visreg and sigreg codes held constants in float32 (6e-8 relative), which the residuals they are
subtracted from amplify to a few 1e-7: 1e-6.
"""

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from oracles import error, truth, value_and_grad
from torch import Tensor

from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    functional,
)

FILES = sorted((Path(__file__).parent / "data").glob("*.npz"))
VICREG_WEIGHTS = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
EXACT, FLOAT32_CONSTANTS = 1e-10, 1e-6


@pytest.fixture(params=FILES, ids=[path.stem for path in FILES])
def golden(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """One golden file as tensors."""
    with np.load(request.param) as file:
        return {key: torch.tensor(file[key]) for key in file.files}


def vicreg_gradient(golden: dict[str, Tensor], term: str) -> Tensor:
    """(2, N, D) published gradient of a VICReg term."""
    if term == "total":
        return sum(w * vicreg_gradient(golden, t) for t, w in VICREG_WEIGHTS.items())
    return torch.stack([golden[f"vicreg_grad_{view}_{term}"] for view in "xy"])


def assert_golden(
    computed: tuple[Tensor, Tensor], value: Tensor, gradient: Tensor, tolerance: float
) -> None:
    """Compares a computed (value, gradient) with a published one."""
    assert error(computed[0], value) <= tolerance
    assert error(computed[1], gradient) <= tolerance


def test_golden_files_are_here() -> None:
    assert len(FILES) == 8


@pytest.mark.parametrize("term", ["invariance", "variance", "covariance", "total"])
def test_oracle_is_published_vicreg(golden: dict[str, Tensor], term: str) -> None:
    formula = {
        "invariance": oracles.invariance,
        "variance": oracles.variance,
        "covariance": lambda z: 2 * oracles.covariance(z),
        "total": oracles.vicreg,
    }[term]
    computed = truth(formula, golden["z"][:2])
    assert_golden(computed, golden[f"vicreg_{term}"], vicreg_gradient(golden, term), EXACT)


@pytest.mark.parametrize("name", ["visreg", "sigreg"])
def test_oracle_is_published_sketch(golden: dict[str, Tensor], name: str) -> None:
    directions = golden[f"{name}_directions"]
    computed = truth(
        {
            "visreg": lambda z: oracles.visreg(z, directions, weight=1.0),
            "sigreg": lambda z: oracles.epps_pulley(z, directions),
        }[name],
        golden["z"],
    )
    published = golden[f"{name}_loss"], golden[f"{name}_grad"]
    assert_golden(computed, *published, FLOAT32_CONSTANTS)


@pytest.mark.parametrize("term", ["invariance", "variance", "covariance"])
def test_functions_are_published_vicreg(golden: dict[str, Tensor], term: str) -> None:
    function = {
        "invariance": functional.invariance_loss,
        "variance": functional.variance_loss,
        "covariance": lambda z: 2 * functional.covariance_loss(z),
    }[term]
    computed = value_and_grad(function, golden["z"][:2])
    assert_golden(computed, golden[f"vicreg_{term}"], vicreg_gradient(golden, term), EXACT)


@pytest.mark.parametrize("term", ["invariance", "variance", "covariance"])
def test_modules_are_published_vicreg(golden: dict[str, Tensor], term: str) -> None:
    module = {
        "invariance": InvarianceLoss(),
        "variance": VarianceLoss(),
        "covariance": CovarianceLoss(),
    }[term]
    scale = 2 if term == "covariance" else 1
    computed = value_and_grad(lambda z: scale * module(z[0], z[1]), golden["z"][:2])
    assert_golden(computed, golden[f"vicreg_{term}"], vicreg_gradient(golden, term), EXACT)


def test_composite_is_published_vicreg(golden: dict[str, Tensor]) -> None:
    loss = VICRegLoss()
    computed = value_and_grad(lambda z: loss(z[0], z[1]), golden["z"][:2])
    assert_golden(computed, golden["vicreg_total"], vicreg_gradient(golden, "total"), EXACT)
    terms = loss.terms(golden["z"][0], golden["z"][1])
    for name in VICREG_WEIGHTS:
        assert error(getattr(terms, name), golden[f"vicreg_{name}"]) <= EXACT


@pytest.mark.parametrize("through", ["function", "module"])
def test_terms_are_published_visreg(golden: dict[str, Tensor], through: str) -> None:
    fixed = {"directions": golden["visreg_directions"]}
    sketch = {
        "function": lambda z: functional.sliced_sketch_loss(z, **fixed),
        "module": SlicedSketchLoss(**fixed),
    }[through]

    def loss(z: Tensor) -> Tensor:
        shape = sketch(z)
        return functional.variance_loss(z, form="squared") + shape + functional.center_loss(z)

    computed = value_and_grad(loss, golden["z"])
    assert_golden(computed, golden["visreg_loss"], golden["visreg_grad"], FLOAT32_CONSTANTS)


def test_composite_is_published_visreg(golden: dict[str, Tensor]) -> None:
    loss = VISRegLoss(weight=1.0)
    computed = value_and_grad(
        lambda z: loss(*z, directions=golden["visreg_directions"]), golden["z"]
    )
    assert_golden(computed, golden["visreg_loss"], golden["visreg_grad"], FLOAT32_CONSTANTS)


@pytest.mark.parametrize("through", ["function", "module", "composite"])
def test_library_is_published_sigreg(golden: dict[str, Tensor], through: str) -> None:
    fixed = {"directions": golden["sigreg_directions"]}
    options = {"statistic": "epps_pulley", "knots": 17, "t_max": 3.0}
    loss = {
        "function": lambda z: functional.sliced_sketch_loss(z, **options, **fixed),
        "module": SlicedSketchLoss(**options, **fixed),
        "composite": lambda z: LeJEPALoss(weight=1.0)(*z, **fixed),
    }[through]
    computed = value_and_grad(loss, golden["z"])
    assert_golden(computed, golden["sigreg_loss"], golden["sigreg_grad"], FLOAT32_CONSTANTS)
