"""The recipes and their page: the line is all that is added, is connected, and does as is said."""

import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from needed import needs
from torch import Tensor, nn

from vicreg_losses import CovarianceLoss, SlicedSketchLoss, VarianceLoss, diagnostics

needs_lightly = needs("lightly", "torchvision", "mlxtend", "sklearn", "filelock")
ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
PROJECTORS = {"simsiam": "projector", "byol": "online.1", "simclr": "projector"}
# The line, what makes it once, and the switch that leaves it out.
MARKED = re.compile(r"^(.*  # (once|the one line)| +if not options\.without:)\n", re.MULTILINE)
SHORT = ("--steps", "11", "--batch", "8")  # the first and the last are printed


@pytest.fixture(scope="module")
def recipes() -> Iterator[dict[str, ModuleType]]:
    """The recipes as modules, which find each other and the examples by plain names."""
    paths, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(RECIPES))
    shared = import_module("shared")
    shared.load = lru_cache(shared.load)  # the digits are parsed once
    yield {name: import_module(name) for name in PROJECTORS}
    sys.path[:] = paths
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(RECIPES)):
            del sys.modules[name]


class Trained(NamedTuple):
    losses: list[float]
    projector: dict[str, Tensor]


def train(main: Callable[[list[str]], nn.Module], name: str, *options: str) -> Trained:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), torch.random.fork_rng():
        patch.setattr(torch.cuda, "is_available", lambda: False)
        model = main([*SHORT, *options])
    losses = [float(value) for value in re.findall(r"loss +(\S+)", printed.getvalue())]
    return Trained(losses, model.get_submodule(PROJECTORS[name]).state_dict())


def stripped(name: str) -> Callable[[list[str]], nn.Module]:
    """``main`` of a recipe without the marked lines."""
    source, removed = MARKED.subn("", (RECIPES / f"{name}.py").read_text())
    assert removed == 3
    assert not re.search(r"regularizer|variance\(|options\.without", source)
    namespace = {"__name__": f"{name}_without_the_line"}
    exec(compile(source, f"{name} without the line", "exec"), namespace)
    return namespace["main"]  # type: ignore[return-value]


def differ(left: Trained, right: Trained) -> bool:
    return any(not value.equal(right.projector[key]) for key, value in left.projector.items())


class TestTraining:
    pytestmark = needs_lightly

    @pytest.mark.parametrize("name", PROJECTORS)
    def test_line_reaches_projector_and_is_all(
        self, recipes: dict[str, ModuleType], name: str
    ) -> None:
        runs = [
            train(recipes[name].main, name),
            train(recipes[name].main, name, "--without"),
            train(stripped(name), name),
        ]
        for run in runs:
            assert len(run.losses) == 2
            assert all(map(math.isfinite, run.losses))
        with_line, switched_off, never_there = runs
        assert differ(with_line, switched_off)
        assert not differ(switched_off, never_there)
        assert with_line.losses[0] > switched_off.losses[0] == never_there.losses[0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--batch", "1"], "--batch: expected 2 or more, got 1"),
            (["--steps", "0"], "--steps: expected 1 or more, got 0"),
            (["--batch", "5000"], "--batch: expected at most the 4000 images, got 5000"),
            (["--data", "nowhere"], "nowhere: no such"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_bad_input_is_named(
        self,
        recipes: dict[str, ModuleType],
        capsys: pytest.CaptureFixture[str],
        options: list[str],
        message: str,
    ) -> None:
        with pytest.raises(SystemExit) as stopped, torch.random.fork_rng():
            recipes["simclr"].main(options)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error

    def test_unreadable_images_are_named(
        self, recipes: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("cats/0", "cats/1", "cats/2", "dogs/0", "dogs/1", "dogs/2"):
            path = tmp_path / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"no image")
        with pytest.raises(SystemExit) as stopped, torch.random.fork_rng():
            recipes["simclr"].main(["--data", str(tmp_path), "--batch", "2"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(tmp_path) in error


class Started(NamedTuple):
    """A network of lightly's heads, its own loss, and what tells of its collapse."""

    projector: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    regularizer: Callable[..., Tensor]
    health: Callable[[Tensor], float]


def deviation(z: Tensor) -> float:
    return diagnostics.embedding_report(z).std_median


def cosine(z0: Tensor, z1: Tensor) -> Tensor:
    """SimSiam's and BYOL's loss without the predictor, which is known to collapse."""
    from lightly.loss import NegativeCosineSimilarity

    criterion = NegativeCosineSimilarity()
    return 0.5 * (criterion(z0, z1.detach()) + criterion(z1, z0.detach()))


def collapsed_simsiam() -> Started:
    from lightly.models.modules import SimSiamProjectionHead

    projector = SimSiamProjectionHead(32, 32, 16)
    with torch.no_grad():
        rows = projector.layers[6].weight
        rows.copy_(rows[:1] + 0.05 * rows)  # one direction; BatchNorm hides any common scale
    return Started(
        projector, cosine, lambda *z: 0.04 * CovarianceLoss()(*z), diagnostics.effective_rank
    )


def collapsed(
    projector: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    regularizer: Callable[..., Tensor],
) -> Started:
    """Every embedding nearly the same vector of ones."""
    with torch.no_grad():
        projector.layers[-1].weight.mul_(1e-3)
        projector.layers[-1].bias.fill_(1)
    return Started(projector, criterion, regularizer, deviation)


def collapsed_byol() -> Started:
    from lightly.models.modules import BYOLProjectionHead

    variance, covariance = VarianceLoss(), CovarianceLoss()
    return collapsed(
        BYOLProjectionHead(32, 64, 16), cosine, lambda *z: variance(*z) + 0.04 * covariance(*z)
    )


def simclr(regularizer: Callable[..., Tensor]) -> Started:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    head = SimCLRProjectionHead(32, 32, 16, batch_norm=False)
    return collapsed(head, NTXentLoss(), regularizer)


def collapsed_simclr() -> Started:
    return simclr(SlicedSketchLoss(64))


def collapsed_simclr_variance() -> Started:
    return simclr(VarianceLoss())


def health_after(start: Callable[[], Started], with_line: bool) -> tuple[float, float]:
    """Before and after twenty steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU())
        projector, criterion, regularizer, health = start()
        parameters = [*backbone.parameters(), *projector.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        samples, found = torch.randn(64, 24), []
        for _ in range(21):
            z0, z1 = (
                projector(backbone(samples + 0.3 * torch.randn_like(samples))) for _ in range(2)
            )
            found.append(health(z0))
            loss = criterion(z0, z1)
            if with_line:
                loss = loss + regularizer(z0, z1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found[0], found[-1]


class TestCollapse:
    pytestmark = needs_lightly

    @pytest.mark.parametrize(
        ("start", "factor"),
        [
            (collapsed_simsiam, 1.5),
            (collapsed_byol, 100),
            (collapsed_simclr, 100),
            (collapsed_simclr_variance, 100),
        ],
    )
    def test_line_leads_out_of_collapse(self, start: Callable[[], Started], factor: float) -> None:
        before, after = health_after(start, with_line=False)
        assert after < 1.5 * before
        assert health_after(start, with_line=True)[1] > factor * before


class TestTraps:
    """What the page says of a line in the wrong place."""

    def test_detached_embeddings_have_a_value_but_no_gradient(self) -> None:
        z = torch.zeros(16, 8, requires_grad=True)
        value = VarianceLoss()(z.detach(), z.detach())
        assert value > 0.9
        assert not value.requires_grad
        assert VarianceLoss()(z).requires_grad

    @pytest.mark.parametrize("dimensions", [16, 256])
    def test_unit_rows_pin_the_hinge(self, dimensions: int) -> None:
        z = F.normalize(torch.randn(4096, dimensions, generator=generator()), dim=1)
        with pytest.warns(UserWarning, match="before they are"):
            hinge = VarianceLoss()(z)
        assert hinge == pytest.approx(1 - dimensions**-0.5, abs=0.002)
        assert VarianceLoss(gamma=dimensions**-0.5, eps=1e-4 / dimensions)(z) < 1e-3
        assert VarianceLoss()(z * dimensions**0.5) < 0.01

    def test_small_gamma_needs_a_small_eps(self) -> None:
        constant, gamma = torch.ones(16, 10_000), 10_000**-0.5
        assert VarianceLoss(gamma=gamma)(constant) < 1e-6
        assert VarianceLoss(gamma=gamma, eps=1e-8)(constant) > 0.98 * gamma

    @pytest.mark.parametrize(("scale", "acts"), [(0.1, False), (0.003, True)])
    def test_hinge_behind_batch_norm_acts_near_its_eps(self, scale: float, acts: bool) -> None:
        before = (scale * torch.randn(256, 32, generator=generator())).requires_grad_()
        VarianceLoss()(nn.BatchNorm1d(32, affine=False)(before)).backward()
        assert before.grad is not None
        assert bool(before.grad.any()) == acts

    def test_covariance_alone_shrinks(self) -> None:
        z = torch.randn(64, 8, generator=generator()).requires_grad_()
        value = CovarianceLoss()(z)
        value.backward()
        assert z.grad is not None
        assert (z.grad * z).sum().item() == pytest.approx(4 * value.item(), rel=1e-4)


class TestPage:
    text = PAGE.read_text()

    def test_blocks_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks = list(re.finditer(r"^```python[^\n]*\n(.*?)^```", self.text, re.M | re.S))
        assert blocks
        monkeypatch.chdir(tmp_path)
        namespace = {"__name__": "__main__"}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for block in blocks:
                code = "\n" * self.text.count("\n", 0, block.start(1)) + block[1]
                exec(compile(code, str(PAGE), "exec"), namespace)

    def test_diffs_are_well_formed(self) -> None:
        diffs = re.findall(r"^```diff\n(.*?)^```", self.text, re.M | re.S)
        files = [
            part for diff in diffs for part in re.split(r"^(?=--- )", diff, flags=re.M) if part
        ]
        assert len(files) == 8
        for part in files:
            assert re.match(r"--- a/(\S+)\n\+\+\+ b/\1\n@@ ", part), part
            for hunk in re.split(r"^(?=@@ )", part, flags=re.M)[1:]:
                check_hunk(hunk)
        assert all("from vicreg_losses" in diff and "loss + " in diff for diff in diffs)


def check_hunk(hunk: str) -> None:
    """Its header must count its lines: those of the old file and those of the new one."""
    head, *body = hunk.splitlines()
    found = re.match(r"@@ -\d+,(\d+) \+\d+,(\d+) @@", head)
    assert found, head
    assert all(line[:1] in ("", " ", "-", "+") for line in body), hunk
    old = sum(line[:1] != "+" for line in body)
    new = sum(line[:1] != "-" for line in body)
    assert (old, new) == (int(found[1]), int(found[2])), hunk


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
