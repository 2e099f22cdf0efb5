"""Put the tables of results/*.json into README.md, between its markers; tests compare the two."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import verdicts

HERE = Path(__file__).resolve().parent
SECTION = re.compile(r"(<!-- results of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: Path) -> str:
    """``text`` with every section between markers made anew from its result file."""

    def section(match: re.Match[str]) -> str:
        result = json.loads((results / f"{match[2]}.json").read_text())
        return f"{match[1]}{verdicts.markdown(result)}\n\n{origin(result)}\n{match[3]}"

    return SECTION.sub(section, text)


def origin(result: dict[str, Any]) -> str:
    """Where the figures come from, in one line."""
    machine, versions = result["machine"], result["versions"]
    busy = "" if result["load_before"] < 0.5 else ", measured beside other work"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"`{result['command']}`: {result['seconds']} s on {machine['cores']} cores "
        f"({machine['kind']}, {machine['processor']}){busy}; {packages}."
    )


if __name__ == "__main__":
    readme = HERE / "README.md"
    readme.write_text(render(readme.read_text(), HERE / "results"))
