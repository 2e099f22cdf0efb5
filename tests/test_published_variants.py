"""The tables of docs/mathematics.md: what each row says, against the variant's formula.

And the formulas against the published implementations themselves, where they are installed.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import variants as formulas
from needed import needs
from torch import Tensor, nn
from variants import CONFIGURED_BATCH, GLOBAL_VIEWS, differentiated, matched, relative, sample

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mathematics.md"
# Views, samples, dimensions, slices: N below, at and above D, and more than two views.
SHAPES = [(2, 7, 12, 5), (2, 9, 9, 30), (2, 64, 10, 17), (2, 129, 31, 64)]
MANY = [(3, 8, 11, 6), (5, 40, 6, 25), (8, 33, 16, 40)]


class Variant(NamedTuple):
    formula: Callable[[Tensor, Tensor], Tensor]
    shapes: list[tuple[int, int, int, int]] = SHAPES


# By the first cell of its row. None: the page says that it is not offered.
VARIANTS: dict[str, Variant | None] = {
    "VICReg, official code": Variant(formulas.official),
    "the same, N samples where B are configured": Variant(formulas.official_short_batch),
    "VICReg, the paper's pseudo-code": Variant(formulas.pseudo_code),
    "VICReg, the paper's equations": Variant(formulas.equation),
    "lightly `VICRegLoss`": Variant(formulas.official),
    "solo-learn": Variant(formulas.pseudo_code),
    "pytorch-metric-learning": Variant(formulas.official),
    "stable-pretraining `VICRegLoss`": Variant(formulas.official),
    "stable-pretraining `VCRegLoss`, one view": Variant(formulas.vcreg_one_view),
    "VICRegL, global part, two views": Variant(formulas.vicregl_two_views),
    "VICRegL, global part, G global views first": Variant(formulas.vicregl_crops, MANY),
    "VICRegL, local part, matched features (N, P, D)": Variant(formulas.vicregl_local, MANY),
    "eb_jepa": Variant(formulas.eb_jepa),
    "jolibrain/vicreg-loss": Variant(formulas.jolibrain),
    "the VICReg baseline in VISReg's repository": None,
    "VISReg, the paper's Algorithm 1": Variant(
        lambda z, w: formulas.visreg(z, w, 0.9, 0, 0, GLOBAL_VIEWS), SHAPES + MANY
    ),
    "VISReg, the authors' code": Variant(
        lambda z, w: formulas.visreg(z, w, 0.9, 1e-6, 1e-6, GLOBAL_VIEWS), SHAPES + MANY
    ),
    "lightly `VISRegLoss`": Variant(
        lambda z, w: formulas.visreg(z, w, 0.9, 0, 1e-4, GLOBAL_VIEWS), SHAPES + MANY
    ),
    "stable-pretraining `VISReg`": Variant(
        lambda z, w: formulas.visreg(z, w, 0.02, 1e-6, 1e-6, GLOBAL_VIEWS), SHAPES + MANY
    ),
    "SIGReg, the paper's Algorithm 1": Variant(
        lambda z, w: formulas.sigreg(z, w, formulas.line(5, 17)), SHAPES + MANY
    ),
    "LeJEPA, the paper's recommendation": Variant(
        lambda z, w: formulas.lejepa(z, w, 0.05, GLOBAL_VIEWS, formulas.line(5, 17)), SHAPES + MANY
    ),
    "SIGReg, the authors' library": Variant(formulas.sigreg, SHAPES + MANY),
    "LeJEPA, the authors' minimal example": Variant(
        lambda z, w: formulas.lejepa(z, w, 0.02, None), SHAPES + MANY
    ),
    "SIGReg in VISReg's repository": Variant(formulas.sigreg, SHAPES + MANY),
    "lightly `SIGReg`": Variant(formulas.sigreg, SHAPES + MANY),
    "lightly `LeJEPALoss`": Variant(
        lambda z, w: formulas.lejepa(z, w, 0.05, GLOBAL_VIEWS), SHAPES + MANY
    ),
    "stable-pretraining `LeJEPA`": Variant(formulas.lejepa_pooled, SHAPES + MANY),
    "jepa-science": Variant(formulas.sigreg, SHAPES + MANY),
    "eb_jepa `BCS`": None,
    "Barlow Twins": None,
}


@lru_cache
def rows() -> dict[str, list[str]]:
    """Cells of the tables that end in "here", by the first one."""
    found: dict[str, list[str]] = {}
    for table in re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE):
        header, _, *body = [
            [c.strip() for c in row.strip("|\n").split("|")] for row in lines(table)
        ]
        if header[-1] == "here":
            found.update({row[0]: row for row in body})
    return found


def lines(table: str) -> Iterator[str]:
    return (row.strip() for row in table.strip().splitlines())


@lru_cache
def page() -> dict[str, Any]:
    """What the blocks of the page define."""
    names: dict[str, Any] = {"__name__": "mathematics"}
    with torch.random.fork_rng():
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def here(code: str, z: Tensor, w: Tensor) -> Tensor:
    """The last cell of a row, called with the views if it is a module."""
    _, n, d = z.shape
    a, b = matched(z)
    local = {"z": z, "w": w, "N": n, "D": d, "B": CONFIGURED_BATCH, "G": GLOBAL_VIEWS}
    result = eval(code, {**page(), **local, "a": a, "b": b, "K": 3})
    if not isinstance(result, nn.Module):
        return result
    given = {"directions": w} if "directions" in signature(result.forward).parameters else {}
    return result(z, **given)


def test_every_row_of_the_page_is_here() -> None:
    assert set(rows()) == set(VARIANTS)
    for name, variant in VARIANTS.items():
        assert (variant is None) == ("not offered" in rows()[name][-1]), name


CASES = [
    pytest.param(name, variant.formula, shape, id=f"{name}-{shape}")
    for name, variant in VARIANTS.items()
    if variant is not None
    for shape in variant.shapes
]


@pytest.mark.parametrize(("name", "formula", "shape"), CASES)
def test_row(
    name: str, formula: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int, int, int]
) -> None:
    found = re.search(r"`([^`]+)`", rows()[name][-1])
    assert found
    z, w = sample(shape)
    value, gradient = differentiated(lambda leaf: here(found[1], leaf, w), z)
    true_value, true_gradient = differentiated(lambda leaf: formula(leaf, w), z)
    assert value.dtype == torch.float64
    assert relative(value, true_value) < 1e-10
    assert relative(gradient, true_gradient) < 1e-10


def test_variants_differ() -> None:
    """What makes the rows able to fail: no two different objectives agree on these data."""
    z, w = sample(SHAPES[2])
    formulas = {row.formula for row in VARIANTS.values() if row and row.shapes is not MANY}
    values = [formula(z, w).item() for formula in formulas]
    for one, other in combinations(values, 2):
        assert one == other or abs(one - other) > 1e-8 * abs(one)
    assert len({f"{value:.9g}" for value in values}) >= 14


class Peer(NamedTuple):
    """A published implementation: how it is called, in which dtype, and how near it must come.

    ``call`` gets z and K, and draws with the generator that :func:`drawn` has left for it.
    """

    row: str
    call: Callable[[Tensor, int], Tensor]
    package: str
    tolerance: float
    dtype: torch.dtype = torch.float64
    many: bool = False


def lightly_loss(name: str, **options: Any) -> Any:
    import lightly.loss

    return getattr(lightly.loss, name)(**options)


def lightly_crops(z: Tensor, k: int) -> Tensor:
    features = [(view, None) for view in z]
    loss = lightly_loss("VICRegLLoss")
    split = features[:GLOBAL_VIEWS], features[GLOBAL_VIEWS:] or None
    return loss._global_loss(*split).squeeze()


def lightly_local(z: Tensor, k: int) -> Tensor:
    return lightly_loss("VICRegLLoss").vicreg_loss(*matched(z))


def lightly_views(name: str, slices: str) -> Callable[[Tensor, int], Tensor]:
    def call(z: Tensor, k: int) -> Tensor:
        loss = lightly_loss(name, **{slices: k})
        return loss(global_proj=z[:GLOBAL_VIEWS], local_proj=z[GLOBAL_VIEWS:])

    return call


def lightly_sigreg(z: Tensor, k: int) -> Tensor:
    from lightly.loss.lejepa_loss import SIGReg

    return SIGReg(num_vectors=k)(z)


def metric_learning(z: Tensor, k: int) -> Tensor:
    from pytorch_metric_learning.losses import VICRegLoss

    return VICRegLoss()(z[0], ref_emb=z[1])


def stable(path: str, name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        # transformers looks for a package that has the name of our folder of kernels.
        elsewhere = [entry for entry in sys.path if Path(entry).resolve() != PAGE.parents[1]]
        patch.setattr(sys, "path", elsewhere)
        return getattr(import_module(f"stable_pretraining.{path}"), name)


def stable_lejepa(z: Tensor, k: int) -> Tensor:
    sketch = stable("methods.lejepa", "SlicedEppsPulley")(num_slices=k)
    return stable("methods.lejepa", "LeJEPA")._compute_loss(z, GLOBAL_VIEWS, sketch, 0.02)[0]


LIGHTLY, STABLE = "lightly", "stable_pretraining"
# 1e-6: lightly's buffers and quantiles are float32 whatever the embeddings are.
PEERS = [
    Peer("lightly `VICRegLoss`", lambda z, k: lightly_loss("VICRegLoss")(*z), LIGHTLY, 1e-10),
    Peer("VICRegL, global part, two views", lightly_crops, LIGHTLY, 1e-10),
    Peer("VICRegL, global part, G global views first", lightly_crops, LIGHTLY, 1e-10, many=True),
    Peer(
        "VICRegL, local part, matched features (N, P, D)", lightly_local, LIGHTLY, 1e-10, many=True
    ),
    Peer(
        "lightly `VISRegLoss`", lightly_views("VISRegLoss", "num_slices"), LIGHTLY, 1e-6, many=True
    ),
    Peer("lightly `SIGReg`", lightly_sigreg, LIGHTLY, 1e-6, many=True),
    Peer(
        "lightly `LeJEPALoss`",
        lightly_views("LeJEPALoss", "sigreg_num_vectors"),
        LIGHTLY,
        1e-6,
        many=True,
    ),
    Peer("pytorch-metric-learning", metric_learning, "pytorch_metric_learning", 1e-10),
    Peer(
        "stable-pretraining `VICRegLoss`",
        lambda z, k: stable("losses", "VICRegLoss")()(*z),
        STABLE,
        1e-10,
    ),
    Peer(
        "stable-pretraining `VCRegLoss`, one view",
        lambda z, k: stable("losses.utils", "VCRegLoss")()(z[0]),
        STABLE,
        1e-10,
    ),
    Peer("stable-pretraining `LeJEPA`", stable_lejepa, STABLE, 1e-4, torch.float32, many=True),
]


def drawn(d: int, k: int, dtype: torch.dtype) -> Tensor:
    """The directions that a peer draws next: both of them seed 0, one column a slice."""
    torch.manual_seed(0)
    w = torch.randn(d, k, dtype=dtype)
    torch.manual_seed(0)
    return (w / w.norm(dim=0)).double()


@pytest.mark.parametrize(
    ("peer", "shape"),
    [
        pytest.param(peer, shape, id=f"{peer.row}-{shape}", marks=needs(peer.package))
        for peer in PEERS
        for shape in (MANY if peer.many else SHAPES)
    ],
)
def test_formula_is_what_the_peer_computes(peer: Peer, shape: tuple[int, int, int, int]) -> None:
    z, _ = sample(shape)
    variant = VARIANTS[peer.row]
    assert variant is not None
    with torch.random.fork_rng():
        w = drawn(shape[2], shape[3], peer.dtype)
        found = differentiated(lambda leaf: peer.call(leaf, shape[3]), z.to(peer.dtype))
    wanted = differentiated(lambda leaf: variant.formula(leaf, w), z)
    for one, other in zip(found, wanted, strict=True):
        assert relative(one.double(), other) < peer.tolerance
