"""What README and docs say of measurements is what committed result files say."""

import re
from pathlib import Path

import pytest

from benchmarks import publish

PAGES = publish.pages()
NAMES = [str(path.relative_to(publish.ROOT)) for path in PAGES]
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
UNITS = "ms|milliseconds|us|µs|s|seconds|min|minutes|hours|KiB|MiB|GiB|kB|MB|GB|TB|GB/s|GFLOP/s"
UNITS += "|TF/s|%|percent"
TIMES = r"x|\u00d7| times (?:faster|slower|less|more)|-fold"
NUMBER = r"(?<![\w.^])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
MEASURED = re.compile(rf"{NUMBER}(?:(?:{TIMES})|[ \u00a0]?(?:{UNITS}))(?![\w^])")
# Numbers with a unit that nobody measured: definitions, quotations of papers, sizes by arithmetic.
STATED = {
    "docs/troubleshooting.md": {"1 GiB"},
    "docs/performance.md": {"5 %"},
}


def unmeasured(text: str) -> str:
    """A page without what is generated and without code, which other tests run."""
    return CODE.sub("", publish.BLOCK.sub("", text))


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_generated_blocks_are_what_the_results_say(path: Path) -> None:
    text = path.read_text()
    assert text.count("<!-- figures:") == text.count("<!-- /figures -->")
    assert len(publish.BLOCK.findall(text)) == text.count("<!-- figures:")
    assert publish.rendered(text) == text, "run python -m benchmarks.publish"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_no_figure_is_written_by_hand(path: Path) -> None:
    stated = STATED.get(str(path.relative_to(publish.ROOT)), set())
    found = set(MEASURED.findall(unmeasured(path.read_text()))) - stated
    assert not found, "measurements belong into a block of benchmarks.publish"


def test_a_changed_figure_is_seen() -> None:
    """In a generated table, and by hand."""
    page = publish.ROOT / "README.md"
    text = page.read_text()
    at = text.index(" ms |") - 1
    wrong = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    assert wrong != text
    assert publish.rendered(wrong) == text
    assert MEASURED.findall(unmeasured("It took 3.5 ms, or 12x less, 2 times faster.")) == [
        "3.5 ms",
        "12x",
        "2 times faster",
    ]
    assert not MEASURED.findall(unmeasured("Of `3 ms` in N x D by 2 samples, 25 : 25 : 1."))


@pytest.mark.parametrize("name", sorted(publish.BLOCKS))
def test_every_block_is_used(name: str) -> None:
    assert any(f"<!-- figures: {name} -->" in path.read_text() for path in PAGES)
