"""What compiled code is given as plain operations: the same losses, with nothing opaque in it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch._inductor.config
from functorch.compile import make_boxed_func
from oracles import Loss, Term, error, float32_errors, truth, value_and_grad
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from vicreg_losses import (
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    _compat,
    _opaque,
    functional,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")
# As in test_values: two float64 orders of evaluation, and terms that vanish.
FLOAT64 = 1e-10
VANISHING = 1e-3
# Half an ulp of float32.
U = 2.0**-24

TERMS = {str(term): term for term in oracles.ALL_TERMS}
each_term = pytest.mark.parametrize("name", TERMS)


def compiled(loss: Loss, backend: str = "aot_eager") -> Loss:
    return torch.compile(loss, backend=backend, fullgraph=True)


def library(term: Term, z: Tensor) -> Loss:
    """The public function; a compiler may not draw the directions."""
    options = dict(term.options)
    if term.sketch:
        options["directions"] = oracles.unit_directions(z.shape[-1], 13).to(z.dtype)
    return lambda z: getattr(functional, term.function)(z, **options)


def operators(loss: Loss, z: Tensor) -> set[str]:
    """Names of the library's operators that compiled code of value and gradient calls."""
    found: set[str] = set()

    def collect(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            # One that writes to its argument is an argument itself.
            called = [str(node.target), *map(str, node.args[:1])]
            found.update(name.split(".")[1] for name in called if name.startswith("vicreg_losses."))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=collect)
    value_and_grad(torch.compile(loss, backend=backend, fullgraph=True), z)
    return found


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 5, 16), (3, 33, 20), (2, 129, 7)], ids=str)
@each_term
def test_float64(name: str, shape: tuple[int, int, int]) -> None:
    term = TERMS[name]
    v, n, d = shape
    z = oracles.embeddings(max(v, term.min_views), n, d, seed=n)
    value, gradient = value_and_grad(compiled(library(term, z)), z)
    true_value, true_gradient = truth(term.oracle(), z)
    assert error(value, true_value, VANISHING) <= FLOAT64
    assert error(gradient, true_gradient, VANISHING) <= FLOAT64


@pytest.mark.parametrize("knots", [2, 3, 4, 5, 6, 9, 18, 40, 66])
def test_every_number_of_knots(knots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harmonics are products of earlier ones, in a pattern of their number."""
    monkeypatch.setattr(_opaque, "_FUSED_KNOTS", knots)
    term = oracles.sketch_term("epps_pulley", "epps_pulley", knots=knots, t_max=4.0)
    z = oracles.embeddings(2, 12, 6)
    value, gradient = value_and_grad(compiled(library(term, z)), z)
    true_value, true_gradient = truth(term.oracle(), z)
    assert error(value, true_value) <= FLOAT64
    assert error(gradient, true_gradient) <= FLOAT64


@pytest.mark.parametrize("shape", [(2, 257, 31), (1, 32768, 5)], ids=str)
@pytest.mark.parametrize("name", ["variance-hinge", "covariance-auto", "epps_pulley"])
def test_inductor_is_as_good_as_plain(name: str, shape: tuple[int, int, int]) -> None:
    """Twice plain PyTorch's float32 error and four roundings of the result, as for eager code.

    PyTorch adds sums of a few numbers, inductor one after the other.
    """
    term, z = TERMS[name], oracles.embeddings(*shape, dtype=torch.float32)
    value, gradient = value_and_grad(compiled(library(term, z), "inductor"), z)
    true_value, true_gradient = truth(term.oracle(), z)
    plain_value, plain_gradient = float32_errors(term.oracle(), z)
    assert error(value, true_value) <= 2 * plain_value + 4 * U
    assert error(gradient, true_gradient) <= 2 * plain_gradient + 4 * U


def test_inductor_keeps_a_large_offset_apart() -> None:
    """A constant column has no variance and no gradient; the others have those of no offset.

    At an offset of 2^20 the numbers are multiples of 1/8: so are those without it.
    """
    z = (8 * oracles.embeddings(1, 300, 6)).round() / 8
    z[..., 0] = 0.125
    loss = compiled(VarianceLoss(form="squared"), "inductor")
    value, gradient = value_and_grad(loss, (z + 2.0**20).float())
    true_value, true_gradient = truth(partial(oracles.variance, form="squared"), z)
    assert gradient[..., 0].count_nonzero() == 0
    assert error(value, true_value) <= 16 * U
    assert error(gradient, true_gradient) <= 16 * U


def test_first_sample_far_from_the_rest() -> None:
    """Sums are about it; at 2^20 standard deviations of the rest it is most of the variance."""
    z = oracles.embeddings(1, 300, 6)
    z[:, 0] *= 2.0**20
    z = z.float()
    options = {"form": "squared"}
    value, gradient = value_and_grad(compiled(VarianceLoss(**options), "inductor"), z)
    true_value, true_gradient = truth(partial(oracles.variance, **options), z.double())
    assert error(value, true_value) <= 16 * U
    assert error(gradient, true_gradient) <= 16 * U


@pytest.mark.skipif(not _compat.TRACES_FUNCTIONS, reason="needs PyTorch 2.13: opaque before")
def test_compilers_see_no_opaque_operator_where_operations_are_plain() -> None:
    z = oracles.embeddings(2, 9, 6, dtype=torch.float32)
    directions = oracles.unit_directions(6, 5)
    epps_pulley = SlicedSketchLoss(statistic="epps_pulley", directions=directions)
    for loss in (VarianceLoss(), VICRegLoss(), epps_pulley):
        assert operators(loss, z) == {"same_world_"}
    assert operators(VarianceLoss(gather_distributed=False), z) == set()
    visreg = VISRegLoss(num_slices=5)
    assert operators(lambda z: visreg(z, directions=directions), z) == {
        "same_world_",
        "wasserstein_",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["gram", "wasserstein", "epps_pulley"])
def test_the_rest_is_opaque(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    z = oracles.embeddings(2, 9, 6, dtype=dtype)
    directions = oracles.unit_directions(6, 5)
    if case == "gram":
        loss: Loss = lambda z: functional.covariance_loss(z, strategy="gram")  # noqa: E731
    else:
        loss = SlicedSketchLoss(statistic=case, directions=directions)  # with many projections
        monkeypatch.setattr(_opaque, "CHUNK", 2 * 9 * 5 - 1)
    assert operators(loss, z) == {"evaluate", "gradient"}
    value, gradient = value_and_grad(compiled(loss), z)
    eager_value, eager_gradient = value_and_grad(loss, z)
    assert error(value, eager_value) <= 4 * U
    assert error(gradient, eager_gradient) <= 4 * U


def test_product_by_blocks_of_rows() -> None:
    """From 256 dimensions on."""
    z = oracles.embeddings(1, 320, 300)
    value, gradient = value_and_grad(compiled(functional.covariance_loss), z)
    true_value, true_gradient = truth(oracles.covariance, z)
    assert error(value, true_value) <= FLOAT64
    assert error(gradient, true_gradient) <= FLOAT64


def test_more_knots_than_one_loop_can_serve_are_opaque() -> None:
    z = oracles.embeddings(2, 9, 6, dtype=torch.float32)
    directions = oracles.unit_directions(6, 5)
    loss = SlicedSketchLoss(statistic="epps_pulley", directions=directions, knots=18)
    assert operators(loss, z) == {"evaluate", "gradient"}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["variance-squared", "covariance-feature", "epps_pulley"])
def test_inductor_keeps_what_is_not_finite(name: str, bad: float) -> None:
    """A value that is not finite never comes with a finite gradient."""
    z = oracles.embeddings(2, 40, 6, dtype=torch.float32)
    loss = compiled(library(TERMS[name], z), "inductor")
    z[0, 3, 2] = bad
    value, gradient = value_and_grad(loss, z)
    assert not value.isfinite()
    assert not gradient.isfinite().all()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_compiled_calls_leave_the_embeddings_alone(mode: Callable[[], Any]) -> None:
    directions = oracles.unit_directions(6, 5)
    visreg = partial(VISRegLoss(), directions=directions)
    for loss in (VarianceLoss(), VICRegLoss(), visreg):
        for dtype in (torch.float32, torch.float16):
            z = oracles.embeddings(2, 9, 6, dtype=dtype)
            before = z.clone()
            with mode():
                compiled(loss)(z)
                compiled(loss)(list(z))
            assert torch.equal(z, before)


def test_export_of_any_number_of_samples() -> None:
    """Smaller and larger than the number of dimensions."""
    samples = torch.export.Dim("samples", min=2, max=4096)
    views = tuple(oracles.embeddings(2, 9, 6, dtype=torch.float32))
    dynamic = {"views": ({0: samples}, {0: samples})}
    program = torch.export.export(VICRegLoss(), views, dynamic_shapes=dynamic).module()
    for n in (4, 20):
        z = oracles.embeddings(2, n, 6, dtype=torch.float32)
        assert error(program(*z), VICRegLoss()(z)) <= 4 * U


def test_many_numbers_of_samples_take_few_graphs() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(functional.covariance_loss, backend=counter, fullgraph=True)
    for n in (100, 300, 400, 520, 650, 800, 900, 1030, 1500):
        loss(oracles.embeddings(1, n, 1200))
    assert counter.frame_count <= 3
