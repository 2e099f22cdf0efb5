"""The README and the documentation: their code runs, their links hold, the site builds."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from needed import needs

import vicreg_losses

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]+)?\)")
# What a block needs besides what it imports.
HIDDEN = {"torch.utils.tensorboard": "tensorboard", ".plot(": "matplotlib"}
ALWAYS = {"torch", "numpy", "vicreg_losses", *sys.stdlib_module_names}


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line and code of each block of Python."""
    text = page.read_text()
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in BLOCK.finditer(text)]


def packages(page: Path) -> set[str]:
    """What the blocks of a page need installed."""
    code = "\n".join(code for _, code in blocks(page))
    found = {package for sign, package in HIDDEN.items() if sign in code}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.split(".")[0] for name in found} - ALWAYS


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_code() -> list[Any]:
    pages = [page for page in PAGES if blocks(page)]
    return [pytest.param(page, id=name_of(page), marks=needs(*packages(page))) for page in pages]


@pytest.mark.parametrize("page", with_code())
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as one program."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, code in blocks(page):
            placed = "\n" * line + code  # so that a traceback names the page's line
            exec(compile(placed, str(page), "exec"), namespace)


def test_pages_of_users_have_code() -> None:
    named = {name_of(page) for page in PAGES if blocks(page)}
    assert named >= {
        "README.md",
        *(f"docs/{name}.md" for name in ("getting-started", "choosing", "troubleshooting")),
    }


def outside() -> set[str]:
    """Pages of the site from outside docs/, as the hook of MkDocs lists them."""
    tree = ast.parse((DOCS / "hooks.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OUTSIDE"
    )
    return {name for name in ast.literal_eval(value) if name.endswith(".md")}


def leaves(nav: Any) -> list[str]:
    """Pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [leaf for part in parts for leaf in leaves(part)]


@needs("yaml")[0]
def test_navigation_has_every_page_once() -> None:
    import yaml

    nav = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    inside = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(nav) == sorted(inside | outside())


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in sorted(outside()))], ids=name_of
)
def test_relative_links_point_to_files(page: Path) -> None:
    for target, _ in LINK.findall(CODE.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as in CI: a warning is a failure."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


class TestSite:
    pytestmark = needs("material", "mkdocs", "mkdocstrings_handlers", "latex2mathml")

    def test_loads_nothing_from_other_hosts(self, site: Path) -> None:
        loaded = re.compile(
            r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"(https?:)?//"
        )
        for page in site.rglob("*.html"):
            assert not loaded.search(page.read_text()), page.relative_to(site)

    def test_formulas_are_mathml(self, site: Path) -> None:
        pages = {page.name: page.read_text() for page in site.rglob("*.html")}
        assert "<math" in pages["troubleshooting.html"]
        assert not [name for name, text in pages.items() if 'class="arithmatex"' in text]

    def test_reference_has_every_public_name(self, site: Path) -> None:
        text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
        names = {f"vicreg_losses.{name}" for name in vars(vicreg_losses) if name.endswith("Loss")}
        for module in ("functional", "diagnostics", "distributed"):
            public = getattr(vicreg_losses, module).__all__
            names |= {f"vicreg_losses.{module}.{name}" for name in public}
        assert len(names) > 15
        assert not {name for name in names if f'id="{name}"' not in text}
