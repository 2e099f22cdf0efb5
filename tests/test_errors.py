"""Every user error, by its words: which argument, what was expected, what came."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from vicreg_losses import (
    CovarianceLoss,
    InvarianceLoss,
    LeJEPALoss,
    SlicedSketchLoss,
    VarianceLoss,
    VICRegLoss,
    VISRegLoss,
    diagnostics,
    distributed,
    functional,
)

N, D, K = 8, 5, 3
Z = oracles.embeddings(2, N, D, dtype=torch.float32)
W = oracles.unit_directions(D, K)

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    name: getattr(functional, name) for name in functional.__all__
}
MODULES: dict[str, Callable[..., nn.Module]] = {
    "VarianceLoss": VarianceLoss,
    "CovarianceLoss": CovarianceLoss,
    "InvarianceLoss": InvarianceLoss,
    "SlicedSketchLoss": partial(SlicedSketchLoss, num_slices=K),
    "epps_pulley": partial(SlicedSketchLoss, num_slices=K, statistic="epps_pulley"),
    "VICRegLoss": VICRegLoss,
    "VISRegLoss": partial(VISRegLoss, num_slices=K),
    "LeJEPALoss": partial(LeJEPALoss, num_slices=K),
}
HELPERS: dict[str, Callable[[Any], object]] = {
    "batch_statistics": distributed.batch_statistics,
    "effective_rank": diagnostics.effective_rank,
    "embedding_report": diagnostics.embedding_report,
}
LOSSES: dict[str, Callable[[], Callable[[Any], object]]] = {
    **{name: lambda f=f: f for name, f in {**FUNCTIONS, **HELPERS}.items()},
    **MODULES,
    "terms": lambda: VICRegLoss().terms,
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())


def assert_refused(call: Callable[..., object], kind: type[Exception], *words: object) -> None:
    """Expects an error with these words in this order."""
    with pytest.raises(kind, match=".*".join(re.escape(str(word)) for word in words)) as refusal:
        call()
    assert type(refusal.value) is kind  # a subclass would be another, unwritten, message


@pytest.mark.parametrize(
    "wrong", [None, 3.0, "z", Z.numpy(), {"z": Z[0]}, object()], ids=lambda x: type(x).__name__
)
@each_loss
def test_non_tensors(make: Callable[[], Callable[[Any], object]], wrong: object) -> None:
    came = type(wrong).__name__
    assert_refused(
        lambda: make()(wrong), TypeError, "embeddings: expected a torch.Tensor, got", came
    )


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_non_tensor_among_the_views(name: str) -> None:
    words = "embeddings: expected a torch.Tensor, got ndarray"
    assert_refused(lambda: LOSSES[name]()([Z[0], Z[1].numpy()]), TypeError, words)
    words = "embeddings: expected a torch.Tensor, got list"
    assert_refused(lambda: LOSSES[name]()([Z[0], [Z[1]]]), TypeError, words)


DTYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]
DTYPES += [torch.complex64, torch.complex128, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_loss
def test_dtypes(make: Callable[[], Callable[[Any], object]], dtype: torch.dtype) -> None:
    came = str(dtype).removeprefix("torch.")
    words = (
        "embeddings: expected dtype float16, bfloat16, float32 or float64, got",
        came,
        "convert",
    )
    assert_refused(lambda: make()(Z.to(dtype)), TypeError, *words)


@each_loss
def test_layouts(make: Callable[[], Callable[[Any], object]]) -> None:
    sparse = (Z[0].to_sparse(), "torch.sparse_coo")
    nested = torch.nested.nested_tensor([Z[0], Z[1][:3]], layout=torch.jagged)
    for wrong, layout in (sparse, (nested, "torch.jagged")):
        words = ("embeddings: expected a dense tensor, got layout", layout, "use .to_dense()")
        assert_refused(lambda wrong=wrong: make()(wrong), TypeError, *words)


def test_dtensor(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrong = DTensor.from_local(Z[0], DeviceMesh("cpu", [0]))
        for make in LOSSES.values():
            words = ("embeddings: expected a plain torch.Tensor, got a DTensor", "to_local()")
            assert_refused(lambda make=make: make()(wrong), TypeError, *words)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 8, 5)], ids=str)
@each_loss
def test_rank(make: Callable[[], Callable[[Any], object]], shape: tuple[int, ...]) -> None:
    words = ("embeddings: expected shape (N, D), or (V, N, D) for V views, got", shape, "Flatten")
    assert_refused(lambda: make()(torch.ones(shape)), ValueError, *words)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_views_of_another_rank(name: str) -> None:
    words = "embeddings: expected shape (N, D) for each of several views, got"
    assert_refused(lambda: LOSSES[name]()([Z, Z]), ValueError, words, tuple(Z.shape), "view 0")
    assert_refused(lambda: LOSSES[name]()([Z[0], Z[0, 0]]), ValueError, words, (D,), "view 1")


@pytest.mark.parametrize("shape", [(N, 1), (1, D), (N, D + 1), (N + 1, D), (D, N)], ids=str)
@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_views_of_different_shapes(name: str, shape: tuple[int, int]) -> None:
    """Also those that would broadcast."""
    words = ("embeddings: expected views of one shape, got", (N, D), "for view 0", shape, "view 1")
    assert_refused(lambda: LOSSES[name]()([Z[0], torch.ones(shape)]), ValueError, *words)
    if name in MODULES:
        assert_refused(lambda: LOSSES[name]()(Z[0], torch.ones(shape)), ValueError, *words)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_views_on_different_devices(name: str) -> None:
    words = ("embeddings: expected views on one device, got cpu for view 0 and meta for view 1",)
    assert_refused(lambda: LOSSES[name]()([Z[0], Z[1].to("meta")]), ValueError, *words)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_no_views(name: str) -> None:
    words = "embeddings: expected at least one view, got none"
    assert_refused(lambda: LOSSES[name]()([]), ValueError, words)
    if name in MODULES:
        assert_refused(lambda: LOSSES[name]()(), ValueError, words)
    words = "embeddings: expected at least"
    assert_refused(lambda: LOSSES[name]()(torch.ones(0, N, D)), ValueError, words, "view", "got 0")


@pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 0, D), (2, 1, D)], ids=str)
@each_loss
def test_too_few_samples(make: Callable[[], Callable[[Any], object]], shape: Any) -> None:
    samples = shape[-2]
    words = ("embeddings: expected at least 2 samples in the batch, got", samples, shape)
    assert_refused(lambda: make()(torch.ones(shape)), ValueError, *words)


@pytest.mark.parametrize("shape", [(N, 0), (2, N, 0)], ids=str)
@each_loss
def test_no_dimensions(make: Callable[[], Callable[[Any], object]], shape: Any) -> None:
    words = ("embeddings: expected at least 1 dimension, got", shape)
    assert_refused(lambda: make()(torch.ones(shape)), ValueError, *words)


def test_one_view_has_no_pairs() -> None:
    for call in (functional.invariance_loss, InvarianceLoss(), VICRegLoss()):
        for one in (Z[0], Z[:1], [Z[0]]):
            words = "embeddings: expected at least 2 views with form='pairwise', got 1"
            assert_refused(lambda call=call, one=one: call(one), ValueError, words)


# Option, wrong value, what is listed as valid; and who takes the option.
SKETCHES = ["sliced_sketch_loss", "SlicedSketchLoss"]
CHOICES = [
    ("reduction", "none", "'mean', 'sum'", [*FUNCTIONS, *MODULES]),
    ("impl", "cuda", "'auto', 'torch', 'triton'", [*FUNCTIONS, *MODULES]),
    ("form", "soft", "'hinge', 'squared'", ["variance_loss", "VarianceLoss"]),
    ("form", "mean", "'pairwise', 'center'", ["invariance_loss", "InvarianceLoss"]),
    ("strategy", "both", "'auto', 'gram', 'feature'", ["covariance_loss", "CovarianceLoss"]),
    ("statistic", "w2", "'wasserstein', 'epps_pulley'", SKETCHES),
    ("quantiles", "mid", "'paper', 'exact'", [*SKETCHES, "VISRegLoss"]),
    ("slices", "own", "'shared', 'per_rank'", ["SlicedSketchLoss"]),
]


def given(name: str, **options: object) -> Callable[[], object]:
    """A call of a function, or the constructor of a module, with these options."""
    if name in FUNCTIONS:
        return lambda: FUNCTIONS[name](Z, **options)
    return lambda: MODULES[name](**options)


@pytest.mark.parametrize(
    ("name", "option", "wrong", "valid"),
    [(name, option, wrong, valid) for option, wrong, valid, names in CHOICES for name in names],
)
def test_unknown_option_lists_the_valid_ones(
    name: str, option: str, wrong: str, valid: str
) -> None:
    words = (f"{option}: expected one of {valid}, got", repr(wrong))
    assert_refused(given(name, **{option: wrong}), ValueError, *words)
    assert_refused(given(name, **{option: None}), ValueError, words[0], "None")


@pytest.mark.parametrize("name", ["invariance_loss", "InvarianceLoss"])
def test_terms_without_kernels_refuse_triton(name: str) -> None:
    words = ("impl='triton' cannot run", "no Triton kernels", "Use impl='auto' or impl='torch'")
    assert_refused(given(name, impl="triton"), RuntimeError, *words)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_unknown_keyword(name: str) -> None:
    with pytest.raises(TypeError, match="num_slize"):
        given(name, num_slize=3)()


REALS = {
    "gamma": ["variance_loss", "VarianceLoss", "VICRegLoss"],
    "eps": ["variance_loss", "VarianceLoss", "VICRegLoss"],
    "t_max": [*SKETCHES, "LeJEPALoss"],
    "weight": ["VISRegLoss", "LeJEPALoss"],
    **{name: ["VICRegLoss"] for name in ("invariance", "variance", "covariance")},
    **{name: ["VISRegLoss"] for name in ("scale", "shape", "center")},
}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for option, names in REALS.items() for name in names]
)
def test_numbers(name: str, option: str) -> None:
    for wrong in ("1", None, True, torch.ones(())):
        words = (f"{option}: expected a number, got", type(wrong).__name__)
        assert_refused(given(name, **{option: wrong}), TypeError, *words)
    for wrong in (-0.5, float("inf"), float("nan")):
        words = (f"{option}: expected a finite number that is", "got", wrong)
        assert_refused(given(name, **{option: wrong}), ValueError, *words)
    if option == "t_max":
        assert_refused(given(name, t_max=0), ValueError, "t_max", "positive, got 0")
    if option == "weight":
        words = "weight: expected a number from 0 to 1, got 1.5"
        assert_refused(given(name, weight=1.5), ValueError, words)


# Option, least value, and who takes it.
INTEGERS = [
    ("num_slices", 1, [*SKETCHES, "VISRegLoss", "LeJEPALoss"]),
    ("knots", 2, [*SKETCHES, "LeJEPALoss"]),
    ("seed", 0, ["SlicedSketchLoss", "VISRegLoss", "LeJEPALoss"]),
    ("generator_seed", 0, SKETCHES),
    ("num_global", 1, ["VISRegLoss", "LeJEPALoss"]),
]


@pytest.mark.parametrize(
    ("name", "option", "least"),
    [(name, option, least) for option, least, names in INTEGERS for name in names],
)
def test_whole_numbers(name: str, option: str, least: int) -> None:
    for wrong in (2.0, "2", True):
        words = (f"{option}: expected an int, got", type(wrong).__name__)
        assert_refused(given(name, **{option: wrong}), TypeError, *words)
    words = f"{option}: expected at least {least}, got {least - 1}"
    assert_refused(given(name, **{option: least - 1}), ValueError, words)


@pytest.mark.parametrize("option", ["seed", "generator_seed"])
def test_seeds_beyond_64_bits(option: str) -> None:
    words = (f"{option}: expected", 2**64)
    assert_refused(lambda: SlicedSketchLoss(K, **{option: 2**64})(Z), ValueError, *words)


def test_number_of_global_views() -> None:
    center = {"form": "center"}
    for call in (
        lambda z: functional.invariance_loss(z, num_global=3, **center),
        InvarianceLoss(num_global=3, **center),
        VISRegLoss(num_slices=K, num_global=3),
        LeJEPALoss(num_slices=K, num_global=3),
    ):
        words = "num_global: expected at most the 2 views there are, got 3"
        assert_refused(lambda call=call: call(Z), ValueError, words)
    for name in ("invariance_loss", "InvarianceLoss"):
        for wrong, words in ((0, "at least 1, got 0"), (-1, "at least 1, got -1")):
            call = given(name, num_global=wrong, **center)
            assert_refused(call, ValueError, "num_global: expected", words)
        words = "num_global: expected None with form='pairwise', got 2"
        assert_refused(given(name, num_global=2), ValueError, words)


def along(directions: Any) -> dict[str, Callable[[], object]]:
    """Every way to give explicit directions."""
    return {
        "function": lambda: functional.sliced_sketch_loss(Z, directions=directions),
        "constructor": lambda: SlicedSketchLoss(directions=directions)(Z),
        "sketch": lambda: SlicedSketchLoss()(Z, directions=directions),
        "VISRegLoss": lambda: VISRegLoss()(Z, directions=directions),
        "LeJEPALoss": lambda: LeJEPALoss()(Z, directions=directions),
    }


DIRECTIONS = {
    "ndarray": (W.numpy(), TypeError, ("expected a torch.Tensor, got ndarray",)),
    "dtype": (W.long(), TypeError, ("expected a floating dtype, got", "int64")),
    "transposed": (W.T, ValueError, ("expected shape (D, K) = (5, K)", "got", (K, D))),
    "vector": (W[:, 0], ValueError, ("expected shape (D, K)", "got", (D,))),
    "no slices": (W[:, :0], ValueError, ("expected shape (D, K)", "got", (D, 0))),
    "device": (W.to("meta"), ValueError, ("expected device cpu, got meta",)),
    "requires_grad": (W.clone().requires_grad_(), ValueError, ("expected no requires_grad",)),
    "length": (W * 1.1, ValueError, ("expected columns of length 1", "1.1 to 1.1", "norm")),
    "one length": (W * torch.tensor([1, 1, 0.0]), ValueError, ("length 1", "from 0 to 1")),
    "nan": (W * torch.nan, ValueError, ("expected columns of length 1", "nan")),
}


@pytest.mark.parametrize("way", along(W))
@pytest.mark.parametrize("wrong", DIRECTIONS)
def test_directions(wrong: str, way: str) -> None:
    directions, kind, words = DIRECTIONS[wrong]
    if wrong == "transposed" and way == "constructor":  # which does not know D: it sees lengths
        words = ("expected columns of length 1",)
    assert_refused(along(directions)[way], kind, "directions:", *words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rounded_directions_are_accepted(dtype: torch.dtype) -> None:
    for call in along(W.to(dtype)).values():
        call()


def test_gathering_needs_tensors_of_one_view() -> None:
    for gather in (distributed.all_gather, distributed.all_gather_ragged):
        assert_refused(
            lambda g=gather: g(Z), ValueError, "z: expected shape (N, D), got", (2, N, D)
        )
        assert_refused(lambda g=gather: g([Z]), TypeError, "expected a torch.Tensor, got list")
        assert_refused(lambda g=gather: g(Z[0].long()), TypeError, "expected dtype", "int64")
