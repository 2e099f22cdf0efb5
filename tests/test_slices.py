"""The random slices: whose they are, when they change, and that they are what they should be."""

import math
import random
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vicreg_losses import LeJEPALoss, SlicedSketchLoss, VISRegLoss, _opaque, _slices, functional

K, D = 9, 6
MODULES: dict[str, Callable[..., nn.Module]] = {
    "wasserstein": lambda seed=0, num_slices=K: SlicedSketchLoss(num_slices, seed=seed),
    "epps_pulley": lambda seed=0, num_slices=K: SlicedSketchLoss(
        num_slices, statistic="epps_pulley", seed=seed
    ),
    "VISRegLoss": lambda seed=0, num_slices=K: VISRegLoss(num_slices=num_slices, seed=seed),
    "LeJEPALoss": lambda seed=0, num_slices=K: LeJEPALoss(num_slices=num_slices, seed=seed),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def embeddings(dtype: torch.dtype = torch.float32, v: int = 2) -> Tensor:
    return oracles.embeddings(v, 12, D, dtype=dtype)


def draw(seed: int = 0, step: int = 0, dimensions: int = D, slices: int = K) -> Tensor:
    return _slices.draw_directions(torch.tensor(seed), torch.tensor(step), dimensions, slices)


def values(module: nn.Module, steps: int) -> list[float]:
    return [module(embeddings()).item() for _ in range(steps)]


@each_module
def test_each_step_and_each_seed_has_its_own(make: Callable[..., nn.Module]) -> None:
    sequences = [values(make(seed), 5) for seed in range(4)]
    assert len({value for sequence in sequences for value in sequence}) == 20
    assert values(make(2), 5) == sequences[2]


@each_module
def test_state_is_seed_and_step(make: Callable[..., nn.Module]) -> None:
    module = make(seed=5)
    values(module, 3)
    assert module.state_dict() == {"seed": torch.tensor(5), "step": torch.tensor(3)}


@each_module
def test_a_resumed_run_continues(make: Callable[..., nn.Module]) -> None:
    """Also in a module that was built with another seed."""
    uninterrupted = values(make(seed=5), 6)
    module = make(seed=5)
    assert values(module, 3) == uninterrupted[:3]
    resumed = make(seed=1)
    values(resumed, 1)
    resumed.load_state_dict(module.state_dict())
    assert values(resumed, 3) == uninterrupted[3:]


@each_module
def test_evaluation_keeps_the_step(make: Callable[..., nn.Module]) -> None:
    uninterrupted, module = values(make(), 3), make()
    assert values(module, 1) == uninterrupted[:1]
    module.eval()
    assert values(module, 3) == [uninterrupted[1]] * 3
    module.train()
    assert values(module, 2) == uninterrupted[1:]


@each_module
def test_no_grad_advances_as_training_does(make: Callable[..., nn.Module]) -> None:
    module = make()
    with torch.no_grad():
        values(module, 2)
    assert module.step == 2
    with torch.inference_mode():
        values(module, 1)
    assert module.step == 3
    module(embeddings().requires_grad_()).backward()
    assert module.step == 4


@each_module
def test_torch_func_advances_as_training_does(make: Callable[..., nn.Module]) -> None:
    captured, trained = make(), make()
    for _ in range(2):
        z = embeddings().requires_grad_()
        trained(z).backward()
        assert torch.equal(torch.func.grad(captured)(z.detach()), z.grad)
    assert captured.step == trained.step


@each_module
def test_bad_input_does_not_advance_the_step(make: Callable[..., nn.Module]) -> None:
    module = make()
    z = embeddings()
    for wrong in ([z[0], z[0][:, :1]], z[0].long(), z[:, :1], "z", torch.zeros(2, 2, 2, 2)):
        with pytest.raises((TypeError, ValueError)):
            module(wrong)
    assert module.step == 0
    assert values(module, 1) == values(make(), 1)


@pytest.mark.parametrize("make", [MODULES["VISRegLoss"], MODULES["LeJEPALoss"]])
def test_explicit_directions_do_not_advance_the_step(make: Callable[..., nn.Module]) -> None:
    module = make()
    module(embeddings(), directions=oracles.unit_directions(D, 3))
    assert module.step == 0


LOSSES: dict[str, Callable[[], object]] = {
    **{name: lambda make=make: make()(embeddings()) for name, make in MODULES.items()},
    "unseeded": lambda: functional.sliced_sketch_loss(embeddings(), num_slices=K),
    "seeded": lambda: functional.sliced_sketch_loss(embeddings(), num_slices=K, generator_seed=1),
}


@pytest.mark.parametrize("call", LOSSES.values(), ids=LOSSES.keys())
def test_global_generators_are_neither_advanced_nor_read(call: Callable[[], object]) -> None:
    def states() -> Sequence[object]:
        numpy_state = np.random.get_state()
        return [
            torch.get_rng_state().tolist(),
            torch.initial_seed(),
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        ]

    before = states()
    call()
    assert states() == before


@each_module
def test_the_global_seed_has_no_influence(make: Callable[..., nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = values(make(), 2)
        torch.manual_seed(2)
        assert values(make(), 2) == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_and_number_of_views_has_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []

    def record(*arguments: object) -> Tensor:
        drawn.append(original(*arguments))
        return drawn[-1].clone()

    original = _opaque.draw_directions
    monkeypatch.setattr(_opaque, "draw_directions", record)
    for make in MODULES.values():
        drawn.clear()
        for z in (embeddings(torch.float32, 2), embeddings(dtype, 2), embeddings(dtype, 5)):
            make(seed=3)(z)
        assert len(drawn) == 3
        assert drawn[0].dtype == torch.float32
        assert all(torch.equal(other, drawn[0]) for other in drawn)


def test_seeded_function_repeats_and_unseeded_does_not() -> None:
    z = embeddings()
    seeded = [functional.sliced_sketch_loss(z, num_slices=K, generator_seed=s) for s in (7, 7, 8)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert len({functional.sliced_sketch_loss(z, num_slices=K).item() for _ in range(5)}) == 5
    assert SlicedSketchLoss(K, generator_seed=7)(z) == seeded[0]


def test_module_with_a_generator_seed_repeats() -> None:
    module = SlicedSketchLoss(K, generator_seed=7)
    assert len(set(values(module, 3))) == 1


def test_value_converges_to_that_of_many_slices() -> None:
    """Means of K slices spread by K^-1/2: what independent slices do, and equal ones do not."""
    z = embeddings(torch.float64)[0]

    def spread(num_slices: int) -> float:
        module = SlicedSketchLoss(num_slices)
        return torch.tensor([module(z).item() for _ in range(200)]).std().item()

    # Each spread of 200 values is known to 1 / sqrt(400), 5 %; 5 of them on each side.
    assert spread(4) / spread(64) == pytest.approx(4, rel=5 * 0.05 * math.sqrt(2))


@pytest.mark.parametrize("dimensions", [1, 2, 3, 16, 17, 2048])
@pytest.mark.parametrize("slices", [1, 2, 33])
def test_directions_are_unit_columns(dimensions: int, slices: int) -> None:
    w = draw(dimensions=dimensions, slices=slices)
    assert w.shape == (dimensions, slices)
    assert w.dtype == torch.float32
    # Each of D squares, the root and the quotient rounds once.
    assert (w.double().norm(dim=0) - 1).abs().max() < (3 + math.sqrt(dimensions)) * 2.0**-24


def test_directions_of_one_dimension_are_signs() -> None:
    """One draw in 2^24 is exactly 0, which has no direction: no reason for a loss of NaN."""
    for step in range(20):
        assert (draw(step=step, dimensions=1, slices=1 << 20).abs() == 1).all()


def normals(key: int, dimensions: int, slices: int) -> Tensor:
    """The accelerators' generator, on the CPU: (K, D)."""
    return _slices.counter_normal(torch.tensor(key), dimensions, slices).double()


GENERATORS: dict[str, Callable[[int, int, int], Tensor]] = {
    "accelerator": normals,
    "cpu": lambda seed, dimensions, slices: (
        draw(seed, 0, dimensions, slices).double().T * math.sqrt(dimensions)
    ),
}
SIGMAS = 5  # a normal variable is further out once in 1.7 million


@pytest.mark.parametrize("key", [0, 1, -1, 2**62])
def test_moments_of_the_generator(key: int) -> None:
    x = normals(key, 512, 2000).flatten()
    n = len(x)
    assert x.mean().abs() < SIGMAS / math.sqrt(n)
    for power, moment, variance in ((2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        # The variance of x^p is E x^2p - (E x^p)^2.
        assert (x.pow(power).mean() - moment).abs() < SIGMAS * math.sqrt(variance / n)
    # The largest of as many exceeds 6.5 once in 12,000 draws; that it stays below 4 never happens.
    assert 4 < x.abs().max() < 6.5


def test_generator_never_gives_a_pair_of_zeros() -> None:
    """With two dimensions it would be a slice of no direction."""
    for key in range(40):
        x = _slices.counter_normal(torch.tensor(key), 2, 1 << 20)
        assert x.abs().amax(1).min() > 0


@pytest.mark.parametrize("key", [0, 1, -1, 2**62])
def test_distribution_of_the_generator(key: int) -> None:
    """Kolmogorov and Smirnov: sup |F_n - Phi| > d with a probability of 2 exp(-2 n d^2)."""
    x = normals(key, 512, 2000).flatten().sort().values
    n = len(x)
    distance = (torch.special.ndtr(x) - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * n))


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS.keys())
def test_slices_dimensions_and_keys_are_uncorrelated(
    generator: Callable[[int, int, int], Tensor],
) -> None:
    """Correlations of n pairs spread by n^-1/2; the largest of m of them by sqrt(2 log m) more."""
    slices, dimensions = 300, 400
    x = torch.cat([generator(key, dimensions, slices) for key in (0, 1)])
    for rows in (x, x[:slices].T, x.abs() - x.abs().mean(), x.square() - 1):
        y = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        correlation = (y @ y.T / y.shape[1]).fill_diagonal_(0)
        pairs = correlation.numel() / 2
        bound = math.sqrt(2 * math.log(pairs)) + SIGMAS / math.sqrt(2 * math.log(pairs))
        assert correlation.abs().max() < bound / math.sqrt(y.shape[1]) * 1.2


def test_consecutive_steps_are_uncorrelated() -> None:
    steps = torch.stack([draw(step=step, dimensions=64).flatten() for step in range(200)]).double()
    y = steps * math.sqrt(64)
    correlation = (y @ y.T / y.shape[1]).fill_diagonal_(0)
    # 19,900 pairs: the largest of as many normal numbers stays below 5.7 but once in 10,000.
    assert correlation.abs().max() < 5.7 / math.sqrt(y.shape[1])


def test_steps_of_one_seed_are_not_steps_of_another() -> None:
    """A key of seed + step would make seed 1 the shifted sequence of seed 0."""
    drawn = {draw(seed, step, 3, 1).sum().item() for seed in range(30) for step in range(30)}
    assert len(drawn) == 900


@pytest.mark.parametrize("key", [0, 12345])
def test_first_slices_do_not_depend_on_their_number(key: int) -> None:
    """So ranks, and a larger K, share them (on an accelerator)."""
    many = normals(key, 7, 1000)
    for slices in (1, 2, 31, 999):
        assert torch.equal(normals(key, 7, slices), many[:slices])
    assert not torch.equal(normals(key + 1, 7, 1), many[:1])


@pytest.mark.parametrize("dimensions", [7, 8])
def test_draw_off_the_cpu_reads_nothing_back(dimensions: int) -> None:
    """A fake CUDA tensor has no numbers: reading one is an error, and a graph can capture this."""
    with FakeTensorMode():
        seed = torch.zeros((), dtype=torch.int64, device="cuda")
        w = _slices.draw_directions(seed, seed.clone(), dimensions, K)
        assert w.shape == (dimensions, K)
        assert w.dtype == torch.float32
        assert w.device.type == "cuda"
        loss = SlicedSketchLoss(K).to("cuda")
        loss(torch.empty(8, dimensions, device="cuda"))
        assert loss.step.device.type == "cuda"


def test_step_counts_beyond_a_float32() -> None:
    """A long run: 2^24 + 1 is no float32, and the sequence must still change."""
    module = SlicedSketchLoss(K)
    module.step.fill_(2**24)
    assert len(set(values(module, 4))) == 4
    assert module.step == 2**24 + 4


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_any_seed(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = values(SlicedSketchLoss(K, seed=seed), 2)
    assert first != second
    assert math.isfinite(first)
    z = embeddings()
    assert functional.sliced_sketch_loss(z, num_slices=K, generator_seed=seed).isfinite()


def test_large_draws_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two slices to a generator: each has numbers of its own, and they are normal."""
    monkeypatch.setattr(_slices, "_DRAWN", 2 * 320)
    seed, step = torch.tensor(5), torch.tensor(2)
    threads = torch.get_num_threads()
    draws = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            draws.append(_slices.draw_directions(seed, step, 320, 400))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*draws)
    w = draws[0].double()
    # Cosines of independent directions have a standard deviation of D^-1/2: 7 of them are never
    # reached by 8e4 pairs, and equal slices would be at 17.
    cosines = (w.T @ w).fill_diagonal_(0)
    assert cosines.abs().max() < 7 * 320**-0.5
    assert abs(cosines.square().mean() * 320 - 1) < 0.05
    assert (w.norm(dim=0) - 1).abs().max() < 1e-6
    monkeypatch.setattr(_slices, "_DRAWN", 400 * 320)
    whole = _slices.draw_directions(seed, step, 320, 400)
    assert torch.equal(whole[:, :2], draws[0][:, :2])
