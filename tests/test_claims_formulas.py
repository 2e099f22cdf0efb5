"""What the scripts of the papers' claims measure, and the data that they make."""

from collections.abc import Callable

import oracles
import pytest
import threads
import torch
from claim_scripts import NEEDS, module
from torch import Tensor, nn

from vicreg_losses import SlicedSketchLoss

pytestmark = NEEDS


@pytest.mark.parametrize(
    ("power", "word"), [(1.0, "vanishes"), (0.1, "stays"), (-0.1, "stays"), (-1.0, "grows")]
)
def test_a_gradient_is_named_by_its_power_of_the_scale(power: float, word: str) -> None:
    norms = module("gradient_norm")
    assert norms.slope(1e-4**power, 1e-2**power) == pytest.approx(power)
    assert norms.behaviour(power) == word


def batch_norm(z: Tensor, eps: float) -> Tensor:
    return (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + eps).sqrt()


def barlow_oracle(z: Tensor, eps: float) -> Tensor:
    a, b = batch_norm(z, eps)
    c = torch.einsum("ni,nj->ij", a, b) / len(a)
    weights = torch.full_like(c, 5e-3).fill_diagonal_(1)
    return ((c - torch.eye(len(c), dtype=c.dtype)).square() * weights).sum()


def pooled_oracle(z: Tensor, w: Tensor) -> Tensor:
    pooled = z.flatten(0, 1)[None]
    return 25 * oracles.variance(pooled, form="squared") + oracles.covariance(pooled)


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "VICReg, official": lambda z, w: oracles.vicreg(z, (0.0, 25.0, 1.0)),
    "VICReg, squared and pooled": pooled_oracle,
    "Barlow Twins, lightly": lambda z, w: barlow_oracle(z, 1e-5),
    "SIGReg": oracles.epps_pulley,
    "VISReg": lambda z, w: oracles.visreg(z, w, weight=1.0),
    "VISReg, scale alone": lambda z, w: oracles.variance(z, form="squared"),
    "VISReg, shape alone": oracles.sliced_wasserstein,
}


@pytest.mark.parametrize("r", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_gradients_are_those_of_the_formulas(name: str, r: float) -> None:
    norms = module("gradient_norm")
    z, w = norms.embeddings(0) * r, norms.directions(0)
    measured = norms.gradient_norm(norms.losses(w)[name], z)
    expected = norms.gradient_norm(lambda x: NORMS[name](x, w), z)
    assert measured == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("r", [1e-4, 1e-2, 10.0])
def test_the_norm_of_sliced_wasserstein_is_the_closed_form(r: float) -> None:
    norms = module("gradient_norm")
    z, w = norms.embeddings(0) * r, norms.directions(0)
    p = z @ w
    targets = oracles.normal_quantiles(norms.SAMPLES)[p.argsort(1).argsort(1)]
    gradient = (p - targets) @ w.T * 2 / p.numel()
    expected = gradient.norm(dim=2).mean().item()
    assert norms.gradient_norm(norms.losses(w)["sliced Wasserstein"], z) == pytest.approx(expected)


def test_barlow_without_eps_grows_as_one_over_the_scale() -> None:
    norms = module("gradient_norm")
    z, loss = norms.embeddings(0), norms.barlow
    measured = norms.gradient_norm(loss, z)
    assert norms.gradient_norm(loss, z * 1e-3) == pytest.approx(1e3 * measured)
    n = norms.SAMPLES
    unbiased = lambda x: barlow_oracle(x * ((n - 1) / n) ** 0.5, 0.0)  # noqa: E731
    assert norms.gradient_norm(unbiased, z) == pytest.approx(measured, rel=0.05)


def test_the_long_tail_has_exact_counts() -> None:
    hard = module("hard_data")
    counts = [400, 240, 144, 86, 52, 31, 19, 11, 7, 4]
    assert hard.tail_counts(400, 10) == counts
    assert hard.tail_counts(20, 10)[-1] == 1
    labels = torch.arange(10).repeat(400)[torch.randperm(4000)]
    tail = hard.long_tailed(labels)
    assert labels[tail].bincount().tolist() == counts
    assert len(tail.unique()) == sum(counts)
    assert all(n > 100 for n in counts[hard.GROUPS["many"]])
    assert all(20 <= n <= 100 for n in counts[hard.GROUPS["medium"]])
    assert all(n < 20 for n in counts[hard.GROUPS["few"]])
    assert sum(len(counts[part]) for part in hard.GROUPS.values()) == 10


def test_low_rank_images_have_few_components() -> None:
    hard, trainer = module("hard_data"), module("trainer")
    data = trainer.load("digits", trainer.SCALES["quick"])
    projected = hard.low_rank(data)
    assert projected.train.dtype == torch.uint8
    assert projected.test.shape == data.test.shape
    for images, originals in ((projected.train, data.train), (projected.test, data.test)):
        kept, all_of_it = (shares(x, hard.COMPONENTS) for x in (images, originals))
        assert kept > 0.9 > 0.75 > all_of_it  # but for the rounding to gray values


def shares(images: Tensor, components: int) -> float:
    """Part of the variance in the first principal components."""
    x = images.double().flatten(1)
    powers = torch.linalg.svdvals(x - x.mean(0)).square()
    return float(powers[:components].sum() / powers.sum())


def test_recalls_are_means_over_classes_not_images() -> None:
    hard = module("hard_data")
    labels = torch.arange(10).repeat(20)
    features = nn.functional.one_hot(labels, 10).double()
    test_labels = torch.cat([torch.zeros(90, dtype=torch.long), torch.arange(10)])
    test = nn.functional.one_hot(test_labels, 10).double()
    test[test_labels == 0] = features[9]  # all of class 0, which is most of the images, is missed
    found = hard.recalls(features, labels, test, test_labels)
    assert found["probe"] == pytest.approx(0.9)
    assert found["many"] == pytest.approx(2 / 3)
    assert found["few"] == 1


@pytest.mark.parametrize("world", [2, 4])
def test_own_slices_of_ranks_are_as_many_slices_of_one_process(world: int) -> None:
    """The ground of slices.py, which lets one process stand for four ranks."""
    slices = 6
    z = oracles.embeddings(2, 4 * world, 5)
    parts = z.chunk(world, dim=1)
    drawn = [
        SlicedSketchLoss(slices, slices="per_rank").next_directions(z, r) for r in range(world)
    ]
    whole = z.clone().requires_grad_()
    value = SlicedSketchLoss(directions=torch.cat(drawn, 1))(whole)
    (expected,) = torch.autograd.grad(value, whole)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        mine = parts[rank].clone().requires_grad_()
        found = SlicedSketchLoss(slices, slices="per_rank", reduction="sum")(mine)
        return found.detach(), torch.autograd.grad(found, mine)[0]

    with threads.installed():
        results = threads.run(world, work)
    for rank, (found, gradient) in enumerate(results):
        torch.testing.assert_close(found, value.detach())
        torch.testing.assert_close(gradient, expected.chunk(world, dim=1)[rank])


def test_the_noise_of_the_gradient_falls_with_the_slices() -> None:
    z = oracles.embeddings(1, 64, 16, dtype=torch.float32)
    few, many = (module("slices").gradient_noise(z, k, seed=0, draws=200) for k in (8, 32))
    assert few / many == pytest.approx(4, rel=0.2)


def test_spreads_of_known_embeddings() -> None:
    trainer = module("trainer")
    even = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert trainer.unit_spread(even) == pytest.approx(1, abs=0.02)
    direction = torch.arange(8.0)
    assert trainer.unit_spread(even * 1e-3 + direction) < 0.01
    assert trainer.effective_rank(even[:, :1] + direction) == pytest.approx(1)


def test_the_features_of_a_gpu_run_are_a_resnet50s() -> None:
    backbone, width = module("trainer").large()
    assert backbone.eval()(torch.rand(1, 1, 28, 28)).shape == (1, width)
