"""The modules: what they hold, show, store and accept, and that composites are their terms."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracles
import pytest
import torch
from oracles import error, unit_directions, value_and_grad
from torch import Tensor, nn

import vicreg_losses
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

V, N, D, K = 2, 10, 6, 7
W = unit_directions(D, K).double()


@dataclass(frozen=True)
class Case:
    """A module with options of its own, and its function with the same ones."""

    cls: type[nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    function: str = ""

    def __call__(self, **more: Any) -> nn.Module:
        return self.cls(**{**self.options, **more})

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    @property
    def shown(self) -> dict[str, Any]:
        return {k: v for k, v in self.options.items() if not isinstance(v, Tensor)}


PLAIN = [
    Case(VarianceLoss, {}, "variance_loss"),
    Case(VarianceLoss, {"gamma": 0.5, "eps": 0.01}, "variance_loss"),
    Case(VarianceLoss, {"form": "squared"}, "variance_loss"),
    Case(CovarianceLoss, {}, "covariance_loss"),
    Case(CovarianceLoss, {"strategy": "gram"}, "covariance_loss"),
    Case(InvarianceLoss, {}, "invariance_loss"),
    Case(InvarianceLoss, {"form": "center", "num_global": 1}, "invariance_loss"),
]
SKETCHES = [
    Case(SlicedSketchLoss, {"num_slices": K}, "sliced_sketch_loss"),
    Case(SlicedSketchLoss, {"num_slices": K, "quantiles": "exact", "slices": "per_rank"}),
    Case(SlicedSketchLoss, {"num_slices": K, "statistic": "epps_pulley", "knots": 9, "t_max": 4.0}),
]
COMPOSITES = [
    Case(VICRegLoss, {"invariance": 5.0, "variance": 3.0, "covariance": 2.0, "gamma": 0.9}),
    Case(VISRegLoss, {"num_slices": K, "weight": 0.6, "scale": 2.0, "shape": 3.0, "center": 0.5}),
    Case(VISRegLoss, {"num_slices": K, "num_global": 1, "quantiles": "exact", "seed": 4}),
    Case(LeJEPALoss, {"num_slices": K, "weight": 0.3, "knots": 5, "t_max": 2.0, "num_global": 1}),
]
SLICED = [*SKETCHES, *COMPOSITES[1:]]
ALL = [*PLAIN, *SKETCHES, *COMPOSITES]
each_case = pytest.mark.parametrize("case", ALL, ids=str)


def embeddings(dtype: torch.dtype = torch.float64) -> Tensor:
    return oracles.embeddings(V, N, D, seed=1, dtype=dtype)


def assert_same_now_and_next(one: nn.Module, other: nn.Module, z: Tensor) -> None:
    """Bitwise equal values, over three steps of the slices."""
    for _ in range(3):
        assert torch.equal(one(z), other(z))


@each_case
def test_repr_shows_what_was_chosen(case: Case) -> None:
    assert repr(case()).startswith(f"{case.cls.__name__}(")
    for name, value in case.shown.items():
        assert f"{name}={value!r}" in repr(case())
    assert "impl='torch'" in repr(case(impl="torch"))
    assert "reduction='sum'" in repr(case(reduction="sum"))
    assert "gather_distributed=False" in repr(case(gather_distributed=False))


@each_case
def test_repr_can_be_typed(case: Case) -> None:
    """What is shown is a call that makes the same loss."""
    module = case(gather_distributed=False)
    again = eval(repr(module), {**vars(vicreg_losses)})
    assert repr(again) == repr(module)
    assert_same_now_and_next(module, again, embeddings())


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: saved_and_loaded(module, weights_only=False),
    ],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
@each_case
def test_copies_continue(case: Case, copied: Callable[[nn.Module], nn.Module]) -> None:
    module, z = case(), embeddings()
    module(z)  # one step, so that a copy that starts over shows
    reference = case()
    reference(z)
    assert repr(copied(module)) == repr(module)
    assert_same_now_and_next(copied(module), reference, z)


def saved_and_loaded(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_copies_do_not_share_their_step() -> None:
    module = SlicedSketchLoss(K)
    teacher = copy.deepcopy(module)
    module(embeddings())
    assert (int(module.step), int(teacher.step)) == (1, 0)


@each_case
def test_state_dict(case: Case) -> None:
    """Strictly loadable, without pickled code, and of the slices alone."""
    module, z = case(), embeddings()
    module(z)
    state = saved_and_loaded(module.state_dict(), weights_only=True)
    assert set(state) == ({"seed", "step"} if case in SLICED else set())
    fresh = case()
    fresh.load_state_dict(state, strict=True)
    assert_same_now_and_next(module, fresh, z)
    if case in SLICED:
        with pytest.raises(RuntimeError, match="Missing key"):
            case().load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        case().load_state_dict({**state, "other": torch.zeros(())}, strict=True)


CASTS = [nn.Module.double, nn.Module.float, nn.Module.half, nn.Module.bfloat16, nn.Module.cpu]


@pytest.mark.parametrize("cast", CASTS, ids=lambda cast: cast.__name__)
@each_case
def test_casts_of_the_module_change_nothing(
    case: Case, cast: Callable[[nn.Module], nn.Module]
) -> None:
    """As `model.bfloat16()` does to a loss inside of it."""
    for dtype in (torch.float32, torch.float64):
        assert_same_now_and_next(cast(case()), case(), embeddings(dtype))


@pytest.mark.parametrize("cast", CASTS, ids=lambda cast: cast.__name__)
def test_casts_keep_fixed_directions(cast: Callable[[nn.Module], nn.Module]) -> None:
    fixed, z = SlicedSketchLoss(directions=W), embeddings()
    assert torch.equal(cast(SlicedSketchLoss(directions=W))(z), fixed(z))
    assert torch.equal(fixed(z), functional.sliced_sketch_loss(z, directions=W))
    assert "directions" not in fixed.state_dict()


@each_case
def test_views_may_come_in_every_way(case: Case) -> None:
    z = embeddings()
    stacked, listed = z.clone().requires_grad_(), [v.clone().requires_grad_() for v in z]
    value = case()(stacked)
    (gradient,) = torch.autograd.grad(value, stacked)
    for arguments in ((listed,), (tuple(listed),), tuple(listed)):
        same = case()(*arguments)
        assert torch.equal(same, value)
        assert torch.equal(torch.stack(torch.autograd.grad(same, listed)), gradient)
    if not (case.cls is InvarianceLoss or case in COMPOSITES):
        assert torch.equal(case()(z[0]), case()(z[:1]))
        assert torch.equal(case()([z[0]]), case()(z[:1]))


@pytest.mark.parametrize("case", [*PLAIN, SKETCHES[0]], ids=str)
def test_module_equals_function(case: Case) -> None:
    z, options = embeddings(), {**case.options}
    if case is SKETCHES[0]:
        options["directions"] = W
    by_module = value_and_grad(case.cls(**options), z)
    by_function = value_and_grad(lambda x: getattr(functional, case.function)(x, **options), z)
    assert all(map(torch.equal, by_module, by_function))


@each_case
def test_common_options_change_nothing_on_one_process(case: Case) -> None:
    for options in (
        {"reduction": "sum"},
        {"gather_distributed": False},
        {"impl": "torch"},
        {"process_group": None},
    ):
        assert_same_now_and_next(case(**options), case(), embeddings())
        assert all(getattr(case(**options), name) == value for name, value in options.items())


@each_case
def test_inside_a_trained_module(case: Case) -> None:
    """Found by `state_dict`, `to` and `train`, without parameters for the optimizer."""
    trainer = nn.ModuleDict({"head": nn.Sequential(nn.Linear(D, D), case())}).double()
    assert not list(case().parameters())
    z = embeddings()
    trainer["head"](z).backward()
    assert trainer["head"][0].weight.grad.isfinite().all()
    again = nn.ModuleDict({"head": nn.Sequential(nn.Linear(D, D), case())}).double()
    again.load_state_dict(trainer.state_dict(), strict=True)
    assert_same_now_and_next(trainer["head"], again["head"], z)
    trainer.eval()
    assert not trainer["head"][1].training
    assert torch.equal(trainer["head"](z), trainer["head"](z))


@each_case
def test_training_and_evaluation_have_the_same_value(case: Case) -> None:
    z = embeddings()
    assert torch.equal(case().eval()(z), case().train()(z))


def weighted_functions(module: nn.Module, z: Tensor) -> list[tuple[float, Tensor]]:
    """The terms of a composite as public functions, with their weights."""
    if isinstance(module, VICRegLoss):
        return [
            (module.invariance, functional.invariance_loss(z)),
            (module.variance, functional.variance_loss(z, gamma=module.gamma, eps=module.eps)),
            (module.covariance, V * functional.covariance_loss(z)),
        ]
    weight = module.weight
    closeness = functional.invariance_loss(z, form="center", num_global=module.num_global)
    if isinstance(module, LeJEPALoss):
        statistic = {"statistic": "epps_pulley", "knots": module.knots, "t_max": module.t_max}
        sketch = functional.sliced_sketch_loss(z, directions=W, **statistic)
        return [(1 - weight, closeness), (weight, sketch)]
    shape = functional.sliced_sketch_loss(z, directions=W, quantiles=module.quantiles)
    return [
        (1 - weight, closeness),
        (weight * module.scale, functional.variance_loss(z, form="squared")),
        (weight * module.shape, shape),
        (weight * module.center, functional.center_loss(z)),
    ]


each_composite = pytest.mark.parametrize("case", COMPOSITES, ids=str)


def along(module: nn.Module) -> dict[str, Tensor]:
    return {} if isinstance(module, VICRegLoss) else {"directions": W}


@each_composite
def test_composite_is_the_weighted_sum_of_functions(case: Case) -> None:
    """In another order of float64 additions."""
    module = case()
    value, gradient = value_and_grad(lambda x: module(x, **along(module)), embeddings())
    sum_value, sum_gradient = value_and_grad(
        lambda x: sum(weight * term for weight, term in weighted_functions(module, x)), embeddings()
    )
    assert error(value, sum_value) < 1e-14
    assert error(gradient, sum_gradient) < 1e-13


@each_composite
def test_each_term_of_a_composite_can_be_differentiated(case: Case) -> None:
    module = case()
    expected = [term for _, term in weighted_functions(module, embeddings())]
    terms = module.terms(embeddings(), **along(module))
    assert len(terms) == len(expected)
    for i, term in enumerate(terms):
        assert term.shape == ()
        assert error(term, expected[i]) < 1e-14
        gradient = value_and_grad(lambda x, i=i: module.terms(x, **along(module))[i], embeddings())
        alone = value_and_grad(lambda x, i=i: weighted_functions(module, x)[i][1], embeddings())
        assert error(gradient[1], alone[1]) < 1e-13


@each_composite
def test_logging_the_terms_takes_no_second_pass(case: Case) -> None:
    """`total` of one call of `terms` is `forward`: the same bits, graph and step of the slices."""
    module, same, z = case(), case(), embeddings()
    for _ in range(3):
        by_terms = value_and_grad(lambda x: module.total(module.terms(x)), z)
        assert all(map(torch.equal, by_terms, value_and_grad(same, z)))
    assert all(map(torch.equal, module.state_dict().values(), same.state_dict().values()))


def test_names_of_the_terms() -> None:
    z = embeddings()
    assert VICRegLoss().terms(z)._fields == ("invariance", "variance", "covariance")
    assert VISRegLoss(num_slices=K).terms(z)._fields == ("invariance", "scale", "shape", "center")
    assert LeJEPALoss(num_slices=K).terms(z)._fields == ("invariance", "sketch")


WARNED = [
    Case(VarianceLoss),
    Case(CovarianceLoss),
    *SKETCHES[:1],
    *COMPOSITES[1:2],
    Case(VICRegLoss),
]


@pytest.mark.parametrize("case", WARNED, ids=str)
def test_unit_norm_rows_warn_once_for_each_module(case: Case) -> None:
    unit = nn.functional.normalize(embeddings(), dim=-1)
    for _ in range(2):
        module = case()
        with pytest.warns(UserWarning, match="length 1") as caught:
            module(unit)
        assert len(caught) == 1
        module(unit)  # warnings are errors


@each_case
def test_other_embeddings_do_not_warn(case: Case) -> None:
    """Not scaled rows, not one unit row of many, not invariance, not a fitting gamma."""
    unit, z = nn.functional.normalize(embeddings(), dim=-1), embeddings()
    z[0, 0] = unit[0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case()(z)
        case()(D**0.5 * unit)
        InvarianceLoss()(unit)
        VarianceLoss(gamma=D**-0.5)(unit)
        VICRegLoss(gamma=D**-0.5)(unit)
