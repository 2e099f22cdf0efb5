"""What a release says of itself agrees, and its checks can fail.

The distributions themselves are built and checked by ``make dist``, which CI runs.
"""

import ast
import importlib
import os
import re
import zipfile
from email.message import Message
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from needed import needs

import vicreg_losses

ROOT = Path(__file__).resolve().parents[1]
VERSION = vicreg_losses.__version__
WORKFLOW = ".github/workflows/ci.yml"
PAPERS = ("2105.04906", "2606.02572", "2511.08544")

pytestmark = pytest.mark.skipif(not (ROOT / WORKFLOW).is_file(), reason="not a whole source tree")
[with_yaml] = needs("yaml")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def yaml(name: str) -> dict[Any, Any]:
    return importlib.import_module("yaml").safe_load(text(name))


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads(text("pyproject.toml"))


@pytest.fixture
def check() -> ModuleType:
    pytest.importorskip("tomllib", reason="the checks of a release need Python 3.11")
    return importlib.import_module("release.check")


@with_yaml
def test_citation() -> None:
    """What version 1.2.0 of the format requires, and what others say too."""
    cited = yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == VERSION
    assert cited["license"] == "MIT"
    assert cited["authors"] == [{"name": "The vicreg-losses authors"}]
    assert all({"type", "title", "authors"} <= set(paper) for paper in cited["references"])
    dois = [paper["identifiers"][0]["value"] for paper in cited["references"]]
    assert dois == [f"10.48550/arXiv.{number}" for number in PAPERS]


@with_yaml
def test_top_of_the_changelog() -> None:
    """It is what is not released yet, or this version on the day that is cited."""
    top = re.search(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    day = yaml("CITATION.cff")["date-released"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert top is not None
    assert top[1] in ("[Unreleased]", f"[{VERSION}] - {day}")


def test_supported_pythons(project: dict[str, Any], check: ModuleType) -> None:
    table = project["project"]
    prefix = "Programming Language :: Python :: 3."
    named = [c.removeprefix(prefix) for c in table["classifiers"] if c.startswith(prefix)]
    assert [f"3.{minor}" for minor in named] == list(check.PYTHONS)
    assert table["requires-python"] == f">={check.PYTHONS[0]}"
    assert project["tool"]["ruff"]["target-version"] == "py" + check.PYTHONS[0].replace(".", "")


@pytest.mark.parametrize("folder", ["vicreg_losses", "kernels", "examples", "benchmarks", "tests"])
def test_grammar_is_that_of_the_oldest_python(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))


def test_extras(project: dict[str, Any]) -> None:
    """Constraints pin what the checks install, and nothing that they do not."""
    extras = project["project"]["optional-dependencies"]
    assert set(extras) == {"examples", "dev", "docs", "peers"}
    installed = {"numpy", "torch"}  # by the library itself
    for name in ("examples", "dev", "docs"):
        installed |= {re.match(r"[\w-]+", requirement)[0] for requirement in extras[name]}
    lines = [line for line in text("constraints.txt").splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0] for line in lines}
    assert pinned - {"mkdocstrings-python"} == installed  # the extra "python" of mkdocstrings
    assert "[examples,dev,docs]" in text("Makefile")


def test_ci_runs_what_there_is() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    used = set(re.findall(r"^make (\w+)", text(".ci/run"), re.MULTILINE))
    assert {"check", "test", "gate", "docs", "dist", "demo"} <= used
    assert used <= set(re.findall(r"^(\w+):", text("Makefile"), re.MULTILINE))


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


@with_yaml
def test_workflow() -> None:
    jobs = yaml(WORKFLOW)["jobs"]
    assert commands(jobs["checks"]) == [".ci/run"]
    assert [command.split()[:2] for command in commands(jobs["build"])] == [["make", "dist"]]
    assert jobs["smoke"]["strategy"]["matrix"]["python"] == ["3.10", "3.14"]
    [smoke] = commands(jobs["smoke"])
    assert all((ROOT / name).is_file() for name in re.findall(r"tests/\w+\.py", smoke))
    assert len(re.findall(r"tests/\w+\.py", smoke)) > 1


@with_yaml
def test_workflow_releases_what_was_checked() -> None:
    """After all other jobs, from a tag, without a stored secret."""
    workflow = yaml(WORKFLOW)
    job = workflow["jobs"]["release"]
    assert set(job["needs"]) == set(workflow["jobs"]) - {"release"}
    assert "github.ref_type == 'tag'" in job["if"]
    assert job["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}
    assert not commands(job)
    assert "secrets." not in text(WORKFLOW)


@with_yaml
def test_actions_are_pinned() -> None:
    steps = [step for job in yaml(WORKFLOW)["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", name) for name in used), used


def declared(path: Path) -> set[str]:
    """``__all__`` of a file, which it is not imported for: Lightning may be missing."""
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    lists = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    return {name for value in lists for name in ast.literal_eval(value)}


def test_typed_program_uses_every_public_name() -> None:
    """And so mypy sees them all, in the wheel."""
    tree = ast.parse(text("tests/consumer/uses_public_api.py"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    files = (ROOT / "vicreg_losses").glob("[a-z]*.py")
    public = {"__version__"}.union(*map(declared, files))
    assert {"VICRegLoss", "variance_loss", "plan", "effective_rank"} <= public
    assert public <= used, public - used


def test_typed_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("consumer.uses_public_api").main()
    assert capsys.readouterr().out.startswith(VERSION)


def described(**changes: str) -> Message:
    """Fields as the project declares them, but for some."""
    fields = Message()
    for name, value in changes.items():
        fields[name.replace("_", "-")] = value
    return fields


@pytest.mark.parametrize("tag", ["0.1.0", "v9.9.9"])
def test_check_refuses_the_tag_of_another_version(check: ModuleType, tag: str) -> None:
    with pytest.raises(check.Refused, match=f"expected 'v{VERSION}', got '{tag}'"):
        check.check_tag(tag, VERSION)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git repository")
def test_check_refuses_a_wheel_with_tests(check: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vicreg_losses/__init__.py", "")
        archive.writestr("tests/test_values.py", "")
    with pytest.raises(check.Refused, match=r"unexpected \['tests/test_values.py'\], missing \["):
        check.check_wheel_files(wheel, VERSION)


def test_check_refuses_other_metadata(check: ModuleType) -> None:
    fields = described(Name="vicreg-losses", Version=VERSION, Requires_Python=">=3.9")
    with pytest.raises(check.Refused, match=r"Requires-Python: expected '>=3.10', got '>=3.9'"):
        check.check_metadata(fields, VERSION)
