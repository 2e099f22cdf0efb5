"""The pages under docs/migration: each argument of the peers against ours, value and gradient."""

import re
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import variants
from needed import needs
from torch import Tensor, nn
from variants import differentiated, relative, sample

from vicreg_losses import LeJEPALoss, SlicedSketchLoss, VICRegLoss, VISRegLoss, functional

PAGES = Path(__file__).resolve().parents[1] / "docs" / "migration"
EXACT, FLOAT32_CONSTANTS = 1e-10, 1e-6
TWO_VIEWS = [(2, 6, 15, 9), (2, 21, 20, 16), (2, 200, 8, 33)]
CROPS = [(3, 10, 7, 12), (6, 50, 24, 40)]
needs_lightly = needs("lightly")
needs_metric_learning = needs("pytorch_metric_learning")


def assert_same(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    z: Tensor,
    tolerance: float = EXACT,
) -> None:
    found, wanted = differentiated(ours, z), differentiated(theirs, z)
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < tolerance


def with_their_draw(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A loss of lightly, at the place in the global generator where :func:`directions` looks."""

    def call(z: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return loss(z)

    return call


def directions(d: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        w = torch.randn(d, k, dtype=dtype)
    return w / w.norm(dim=0)


def views_of(loss: nn.Module, num_global: int) -> Callable[[Tensor], Tensor]:
    """Two stacks, as lightly's composites take them, global views first."""
    return with_their_draw(lambda z: loss(global_proj=z[:num_global], local_proj=z[num_global:]))


vicreg_options = pytest.mark.parametrize(
    ("weights", "eps"), [((25.0, 25.0, 1.0), 1e-4), ((3.0, 7.0, 0.5), 1e-2)]
)


class TestLightly:
    pytestmark = needs_lightly

    @pytest.mark.parametrize("shape", TWO_VIEWS, ids=str)
    @vicreg_options
    def test_vicreg(
        self, shape: tuple[int, ...], weights: tuple[float, float, float], eps: float
    ) -> None:
        from lightly.loss import VICRegLoss as Theirs

        names = dict(zip(("lambda_param", "mu_param", "nu_param"), weights, strict=True))
        theirs, ours = Theirs(**names, eps=eps), VICRegLoss(*weights, eps=eps)
        z = sample(shape)[0]
        assert_same(ours, lambda z: theirs(*z), z)
        local = VICRegLoss(*weights, eps=eps, gather_distributed=False)
        assert_same(local, lambda z: theirs(*z), z)

    @pytest.mark.parametrize("shape", CROPS, ids=str)
    def test_features_of_slots(self, shape: tuple[int, ...]) -> None:
        """(N, P, D): P slots are P views, and the covariances of two views are added."""
        from lightly.loss import VICRegLoss as Theirs

        def ours(z: Tensor) -> Tensor:
            a, b = (part.transpose(0, 1) for part in variants.matched(z))
            distance = functional.invariance_loss([a.flatten(0, 1), b.flatten(0, 1)])
            variance = functional.variance_loss(a) + functional.variance_loss(b)
            covariance = functional.covariance_loss(a) + functional.covariance_loss(b)
            return 25 * distance + 12.5 * variance + covariance

        assert_same(ours, lambda z: Theirs()(*variants.matched(z)), sample(shape)[0])

    @pytest.mark.parametrize("shape", [*TWO_VIEWS, *CROPS], ids=str)
    @pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (8, 4.5)])
    def test_sigreg(self, shape: tuple[int, ...], knots: int, t_max: float) -> None:
        from lightly.loss.lejepa_loss import SIGReg

        z, k = sample(shape)[0], shape[3]
        theirs = SIGReg(knots=knots, t_max=t_max, num_vectors=k)
        ours = SlicedSketchLoss(
            k, "epps_pulley", knots=knots, t_max=t_max, directions=directions(shape[2], k)
        )
        assert_same(ours, with_their_draw(theirs), z, FLOAT32_CONSTANTS)

    @pytest.mark.parametrize(("shape", "num_global"), list(product(CROPS, (1, 2))), ids=str)
    def test_lejepa(self, shape: tuple[int, ...], num_global: int) -> None:
        from lightly.loss import LeJEPALoss as Theirs

        k = shape[3]
        theirs = Theirs(0.3, sigreg_num_vectors=k, sigreg_knots=12, sigreg_t_max=2.5)
        ours = LeJEPALoss(0.3, num_slices=k, knots=12, t_max=2.5, num_global=num_global)
        w = directions(shape[2], k)
        assert_same(
            lambda z: ours(z, directions=w),
            views_of(theirs, num_global),
            sample(shape)[0],
            FLOAT32_CONSTANTS,
        )

    @pytest.mark.parametrize(("shape", "num_global"), list(product(CROPS, (1, 2))), ids=str)
    def test_visreg(self, shape: tuple[int, ...], num_global: int) -> None:
        """The same but for what is added to sigma, which is in proportion to that."""
        from lightly.loss import VISRegLoss as Theirs

        k, z = shape[3], sample(shape)[0]
        w, parts = directions(shape[2], k), (0.5, 2.0, 0.7)
        names = dict(zip(("lambda_scale", "lambda_shape", "lambda_center"), parts, strict=True))
        ours = VISRegLoss(0.4, k, *parts, num_global=num_global)
        value = ours(z, directions=w)
        smallest = z.std(1, correction=0).min().item()
        for eps in (1e-4, 1e-3):
            theirs = views_of(Theirs(0.4, num_slices=k, **names, eps=eps), num_global)
            difference = abs(theirs(z) / value - 1).item()
            assert 0.01 * eps < difference < 4 * eps / smallest
        same_eps = views_of(Theirs(0.4, num_slices=k, **names, eps=1e-6), num_global)
        assert_same(lambda z: ours(z, directions=w), same_eps, z, 1e-5)

    def test_components(self) -> None:
        from lightly.loss import VISRegLoss as Theirs

        shape = CROPS[1]
        z, k = sample(shape)[0], shape[3]
        torch.manual_seed(7)
        theirs = Theirs(num_slices=k).forward_components(global_proj=z[:2], local_proj=z[2:])
        ours = VISRegLoss(num_global=2).terms(z, directions=directions(shape[2], k))
        pairs = zip(ours, (theirs.pred, theirs.scale, theirs.shape, theirs.center), strict=True)
        assert max(relative(one, other) for one, other in pairs) < 1e-3

    @pytest.mark.parametrize("shape", [*TWO_VIEWS, *CROPS], ids=str)
    def test_functions(self, shape: tuple[int, ...]) -> None:
        from lightly.loss import lejepa_loss, vicreg_loss, visreg_loss

        z, k = sample(shape)[0], shape[3]
        one = z[0]
        assert_same(
            lambda x: functional.variance_loss(x, eps=1e-3),
            lambda x: vicreg_loss.variance_loss(x, 1e-3),
            one,
        )
        assert_same(functional.covariance_loss, vicreg_loss.covariance_loss, one)
        assert_same(
            lambda z: functional.invariance_loss([z[0], z[1]]),
            lambda z: vicreg_loss.invariance_loss(z[0], z[1]),
            z,
        )
        assert_same(functional.center_loss, visreg_loss.visreg_center_loss, z)
        squared = {"form": "squared"}
        assert_same(
            lambda z: functional.variance_loss(z, **squared), visreg_loss.visreg_scale_loss, z, 1e-4
        )
        assert_same(
            lambda z: functional.invariance_loss(z, form="center", num_global=2),
            lambda z: lejepa_loss.lejepa_invariance_loss(all_proj=z, global_proj=z[:2]),
            z,
        )
        for eps in (1e-4, 0.1):
            w = directions(shape[2], k)
            assert_same(
                lambda z, eps=eps, w=w: functional.sliced_sketch_loss(1e-6 / eps * z, directions=w),
                with_their_draw(
                    lambda z, eps=eps: visreg_loss.visreg_shape_loss(z, num_slices=k, eps=eps)
                ),
                z,
                FLOAT32_CONSTANTS,
            )

    def test_float32_is_rounding(self) -> None:
        from lightly.loss import VICRegLoss as Theirs

        z = sample((2, 64, 40, 1))[0].float()
        assert_same(VICRegLoss(), lambda z: Theirs()(*z), z, 1e-5)


class TestMetricLearning:
    pytestmark = needs_metric_learning

    @pytest.mark.parametrize("shape", TWO_VIEWS, ids=str)
    @vicreg_options
    def test_vicreg(
        self, shape: tuple[int, ...], weights: tuple[float, float, float], eps: float
    ) -> None:
        from pytorch_metric_learning.losses import VICRegLoss as Theirs

        names = ("invariance_lambda", "variance_mu", "covariance_v")
        theirs = Theirs(**dict(zip(names, weights, strict=True)), eps=eps)
        z = sample(shape)[0]
        ours = VICRegLoss(*weights, eps=eps)
        assert_same(ours, lambda z: theirs(z[0], ref_emb=z[1]), z)
        terms = ours.terms(z)
        variances = sum(part.mean() for part in theirs.variance_loss(*z))
        assert relative(terms.invariance, theirs.invariance_loss(*z).mean()) < EXACT
        assert relative(terms.variance, variances) < EXACT
        assert relative(terms.covariance, theirs.covariance_loss(*z)) < EXACT


class TestFormulas:
    """solo-learn and the official code are no packages that could be installed here."""

    @pytest.mark.parametrize("shape", TWO_VIEWS, ids=str)
    def test_solo_learn(self, shape: tuple[int, ...]) -> None:
        z, w = sample(shape)
        assert_same(VICRegLoss(25, 2 * 25, 1), lambda z: variants.pseudo_code(z, w), z)
        assert relative(VICRegLoss()(z), variants.pseudo_code(z, w)) > 1e-3
        for ours, theirs in (
            (functional.variance_loss, variants.hinge),
            (functional.covariance_loss, variants.cov),
        ):
            assert_same(lambda z, f=ours: 2 * f(z), lambda z, f=theirs: f(z[0]) + f(z[1]), z)

    @pytest.mark.parametrize("shape", TWO_VIEWS, ids=str)
    def test_official(self, shape: tuple[int, ...]) -> None:
        z, w = sample(shape)
        assert_same(VICRegLoss(), lambda z: variants.official(z, w), z)
        share = ((shape[1] - 1) / (variants.CONFIGURED_BATCH - 1)) ** 2
        assert_same(VICRegLoss(25, 25, share), lambda z: variants.official_short_batch(z, w), z)


@pytest.mark.parametrize("page", ["solo-learn", "vicreg"])
def test_diff_is_well_formed(page: str, tmp_path: Path) -> None:
    """Git reads it, and each hunk has as many lines as it says."""
    blocks = re.findall(r"^```diff\n(.*?)^```", (PAGES / f"{page}.md").read_text(), re.M | re.S)
    (diff,) = (block for block in blocks if block.startswith("--- a/"))
    done = subprocess.run(
        ["git", "apply", "--numstat", "-"],
        input=diff,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    added, removed, _ = done.stdout.split()
    assert int(removed) > int(added) > 1


def arguments(of: Any) -> set[str]:
    import inspect

    return set(inspect.signature(of).parameters)


@pytest.mark.parametrize("name", ["VICRegLoss", "SIGReg", "LeJEPALoss", "VISRegLoss"])
def test_page_names_every_argument_of_lightly(name: str) -> None:
    lejepa = pytest.importorskip("lightly.loss.lejepa_loss", reason="lightly is not installed")
    import lightly.loss

    theirs = lejepa.SIGReg if name == "SIGReg" else getattr(lightly.loss, name)
    text = (PAGES / "lightly.md").read_text()
    assert not {word for word in arguments(theirs) if not re.search(rf"\b{word}\b", text)}


def test_page_names_every_argument_of_metric_learning() -> None:
    losses = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
    )
    text = (PAGES / "pytorch-metric-learning.md").read_text()
    found = arguments(losses.VICRegLoss) - {"kwargs"}
    assert not {word for word in found if not re.search(rf"\b{word}\b", text)}
