"""The scripts that re-run the papers' claims: their quick form, results, rule and parts."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from claim_scripts import CLAIMS, NEEDS, module
from torch import Tensor, nn

pytestmark = NEEDS
STUDIES = ("collapse", "gradient_norm", "hard_data", "small_batches", "slices")
QUICK = ["--quick", "--data", "digits", "--seeds", "2"]
Capture = pytest.CaptureFixture[str]


def main(name: str, *arguments: object) -> None:
    module(name).main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", [*STUDIES, "pilot"])
def test_a_quick_run_writes_table_figure_and_records(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    main(name, *QUICK, "--out", tmp_path)
    result = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert {"cores", "kind"} <= result["machine"].keys()
    assert {"torch", "lightly"} <= result["versions"].keys()
    assert "--quick" in result["command"]
    assert result["commit"]
    assert result["scale"]["name"] == "quick"
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["runs"]) > 0
    for metric in result["columns"]:
        values = [run[metric] for run in result["runs"] if metric in run]
        assert values
        assert all(map(math.isfinite, values))
    assert all(claim["verdict"] for claim in result["claims"])
    out = capsys.readouterr().out
    assert result["title"] in out
    assert "Verdicts" in out
    assert (tmp_path / f"{name}.png").exists() == (name != "pilot")


@pytest.mark.parametrize("name", [*STUDIES, "pilot"])
def test_the_readme_has_the_committed_results(name: str) -> None:
    text = (CLAIMS / "README.md").read_text()
    assert f"<!-- results of {name} -->" in text
    assert module("readme").render(text, CLAIMS / "results") == text
    if name != "pilot":
        assert f"(results/{name}.png)" in text
        assert (CLAIMS / "results" / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", STUDIES)
def test_committed_summaries_and_verdicts_are_those_of_the_committed_runs(name: str) -> None:
    result = json.loads((CLAIMS / "results" / f"{name}.json").read_text())
    assert result["scale"]["name"] == "cores"
    assert result["seeds"] >= 3
    summary = json.loads(json.dumps(module("verdicts").summarise(result["runs"])))
    assert summary == result["summary"]
    claims = module(name).claims
    assert result["claims"] == claims(summary if name == "gradient_norm" else result["runs"])


def test_the_committed_pilot_is_the_one_that_was_chosen_by() -> None:
    result = json.loads((CLAIMS / "results" / "pilot.json").read_text())
    assert module("pilot").best(result["runs"]) == module("choices").RATES
    assert {run["seed"] for run in result["runs"]} == {100}


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([0.90, 0.91, 0.92], [0.90, 0.91, 0.92], "no difference shown"),
        ([0.93, 0.94, 0.95], [0.90, 0.91, 0.92], "higher"),  # .03 against 2 x .0141
        ([0.90, 0.91, 0.92], [0.93, 0.94, 0.95], "lower"),
        ([0.925, 0.935, 0.945], [0.90, 0.91, 0.92], "no difference shown"),  # .025
        ([0.506, 0.506], [0.5, 0.5], "higher"),  # above .005, without any spread
        ([0.504, 0.504], [0.5, 0.5], "no difference shown"),
    ],
)
def test_a_difference_counts_from_twice_the_spread(
    a: list[float], b: list[float], word: str
) -> None:
    assert module("verdicts").difference(a, b) == word


def test_one_seed_shows_no_difference() -> None:
    with pytest.raises(ValueError, match="two seeds or more, got 1 and 2"):
        module("verdicts").difference([1.0], [0.0, 0.0])


def runs_of(metrics: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    return [
        {"data": "digits", "variant": variant, "seed": seed, **found}
        for variant, seeds in metrics.items()
        for seed, found in enumerate(seeds)
    ]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([0.01, 0.02], [0.9, 0.9], "holds here"),
        ([0.01, 0.90], [0.9, 0.9], "holds where it collapses"),
        ([0.01, 0.02], [0.9, 0.05], "not prevented"),
        ([0.80, 0.90], [0.9, 0.9], "nothing to prevent: it does not collapse here"),
    ],
)
def test_collapse_is_prevented_if_no_seed_collapses(
    before: list[float], after: list[float], verdict: str
) -> None:
    runs = runs_of(
        {
            "BYOL": [{"unit_spread": spread, "rank": 20} for spread in before],
            "BYOL + x": [{"unit_spread": spread, "rank": 20} for spread in after],
        }
    )
    found = module("collapse").prevented(runs, "digits", "BYOL", "BYOL + x")
    assert found["verdict"] == verdict
    assert module("collapse").collapsed({"unit_spread": 1.0, "rank": 1.9})


class Spy(nn.Module):
    """Keeps the views and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, network: nn.Module, views: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self.seen += views
        embeddings = [network(view) for view in views]
        return torch.stack(embeddings).square().mean(), embeddings

    def after_step(self, network: nn.Module, step: int, steps: int) -> None:
        """Nothing."""


def test_variants_of_a_seed_start_alike_and_see_the_same_views() -> None:
    trainer, choices = module("trainer"), module("choices")
    size = trainer.SCALES["quick"]
    data = trainer.load("digits", size)
    spies = {}
    for seed, draws in ((0, 0), (0, 7), (1, 0)):
        network, spy = trainer.build(size, seed), Spy()
        choices.Siamese(choices.BYOL, network, size)
        torch.rand(draws)  # what an objective draws elsewhere must not matter
        trainer.fit(network, spy, data, scale=size, seed=seed, lr=1e-3)
        spies[seed, draws] = torch.stack(spy.seen)
    assert torch.equal(spies[0, 0], spies[0, 7])
    assert not torch.equal(spies[0, 0], spies[1, 0])
    assert not torch.equal(spies[0, 0][0], spies[0, 0][1])
    first, second = (trainer.build(size, 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("script", "variant"),
    [("collapse", "BYOL + variance of z/|z|"), ("hard_data", "long tail: SIGReg"), ("slices", "8")],
)
def test_the_same_seed_gives_the_same_result(script: str, variant: str) -> None:
    train, job = module(script).train, module("common").Job
    first, again, other = (train(job(variant, "digits", seed, "quick")) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def gradients(method: Any) -> tuple[list[bool], Tensor]:
    """Whether each embedding has a gradient through its role as a target, and the loss."""
    choices, trainer = module("choices"), module("trainer")
    size = trainer.SCALES["quick"]
    network = trainer.build(size, 0)
    objective = choices.Siamese(method, network, size)
    objective.predictor = nn.Sequential(objective.predictor, Cut())
    images = [torch.rand(8, 1, 28, 28), torch.rand(8, 1, 28, 28)]
    loss, embeddings = objective(network, images)
    if not loss.requires_grad:
        return [False, False], loss
    found = torch.autograd.grad(loss, embeddings, allow_unused=True)
    return [g is not None and bool(g.abs().sum() > 0) for g in found], loss


class Cut(nn.Module):
    """No gradient through predictions: what remains comes through targets or regularizers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_the_parts_of_a_siamese_method_do_what_they_are_called() -> None:
    choices, trainer = module("choices"), module("trainer")
    assert gradients(choices.SIMSIAM)[0] == [False, False]
    assert gradients(replace(choices.SIMSIAM, stop_gradient=False))[0] == [True, True]
    for place in ("z", "direction"):
        assert gradients(replace(choices.SIMSIAM, variance=place))[0] == [True, True]
    size = trainer.SCALES["quick"]
    network = trainer.build(size, 0)
    bare = choices.Siamese(replace(choices.SIMSIAM, predictor=None), network, size)
    assert isinstance(bare.predictor, nn.Identity)
    byol = choices.Siamese(choices.BYOL, network, size)
    (teacher,) = byol.teacher
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {id(p) for p in teacher.parameters()}.isdisjoint(map(id, byol.parameters()))
    before = next(teacher.parameters()).clone()
    with torch.no_grad():
        next(network.parameters()).add_(1)
    byol.after_step(network, 0, 100)
    moved = next(teacher.parameters()) - before
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - choices.MOMENTUM))
    byol.after_step(network, 99, 100)
    torch.testing.assert_close(next(teacher.parameters()) - before, moved)  # a momentum of 1


def test_missing_data_end_a_script_before_it_trains(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    common, trainer = module("common"), module("trainer")

    def load(name: str, scale: Any) -> None:
        raise trainer.DataError(f"{name}: is not installed")

    monkeypatch.setattr(common, "load", load)
    with pytest.raises(SystemExit) as stopped:
        main("slices", *QUICK, "--out", tmp_path / "out")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "slices: digits: is not installed\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds: expected 2 or more, got 1"),
        (["--workers", "0"], "--workers: expected 1 or more, got 0"),
        (["--quick", "--scale", "full"], "--quick: expected without --scale full"),
        (["--data", "cifar"], "--data: invalid choice: 'cifar'"),
        pytest.param(
            ["--scale", "full"],
            "--scale: full expects a CUDA device, found none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main("slices", *arguments, "--out", tmp_path / "out")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
