"""What the site needs beside MkDocs: pages from outside docs/, MathML, links in docstrings."""

import html
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# The site is the repository with docs/ as its root, so that links are right in both.
OUTSIDE = (
    "CHANGELOG.md",
    "examples/README.md",
    "examples/claims/README.md",
    "kernels/README.md",
    "examples/*.png",
    "examples/claims/results/*.png",
)
LINK = re.compile(r"\[([^\]\n]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
BARS = re.compile(r"<mo>(&#x(?:02016|0007C|02225);)")  # these grow, unless told not to
ROLE = re.compile(r":(?:func|class|mod|meth):<code>([\w.]+)</code>")
MODULES = ("functional", "diagnostics", "distributed", "lightning")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures from outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links point to the site's pages; one to another file of the repository loses its link."""
    here = page.file.src_uri

    def rewrite(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        wanted = _in_repository(here, target)
        if wanted is None or not (ROOT / wanted).is_file():
            return match[0]
        name = wanted.removeprefix("docs/")
        if files.get_file_from_path(name) is None:
            return text if text.startswith("`") else f"{text} (`{wanted}`)"
        return f"[{text}]({os.path.relpath(name, PurePosixPath(here).parent)}{anchor})"

    return LINK.sub(rewrite, markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script; Sphinx's roles as links."""
    module = PurePosixPath(page.file.src_uri).stem

    def reference(match: re.Match[str]) -> str:
        short = match[1].removeprefix("vicreg_losses.")
        known = short.split(".")[0] in MODULES or match[1] != short
        full = f"vicreg_losses.{short}" if known else f"vicreg_losses.{module}.{short}"
        return f'<autoref optional identifier="{full}"><code>{short}</code></autoref>'

    return ROLE.sub(reference, FORMULA.sub(_mathml, content))


def _in_repository(page: str, target: str) -> str | None:
    """The path from the repository's root of what a page links to; ``None`` for an address."""
    if "://" in target:
        return None
    home = ROOT if (ROOT / page).is_file() else ROOT / "docs"
    return os.path.relpath((home / page).parent / target, ROOT)


def _mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match["latex"]).strip()
    for name in ("aligned", "gathered"):
        latex = latex.replace(f"{{{name}}}", "{align*}")  # of these latex2mathml knows one
    block = match["kind"] == "["
    drawn = convert(latex, display="block" if block else "inline")
    drawn = BARS.sub(r'<mo stretchy="false">\1', drawn)
    return f'<div class="formula">{drawn}</div>' if block else drawn
