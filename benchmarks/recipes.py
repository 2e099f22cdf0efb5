"""``python -m benchmarks.recipes --out FILE``: what the small trainers print at their last step.

Runs ``examples/recipes/*.py`` on the digits and keeps their last step: minutes, not seconds.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import measure

ROOT = Path(__file__).resolve().parents[1]
RUNS = (
    ("simsiam.py --epochs 4", "0.04 covariance"),
    ("byol.py --epochs 3", "variance + 0.04 covariance"),
    ("simclr.py --epochs 2", "variance + 0.04 covariance"),
)
LINE = re.compile(r"std (?P<std>[\d.]+)  effective rank (?P<rank>[\d.]+)")


def run(command: str) -> dict[str, float]:
    """Standard deviation and effective rank of z at the last step."""
    script, *arguments = command.split()
    path = str(ROOT / "examples" / "recipes" / script)
    done = subprocess.run(
        [sys.executable, path, *arguments], capture_output=True, text=True, check=True
    )
    last = [found for line in done.stdout.splitlines() if (found := LINE.search(line))][-1]
    return {name: float(value) for name, value in last.groupdict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for command, line in RUNS:
        rows.append({"command": f"{command} --without", "line": "none"})
        rows.append({"command": command, "line": line})
    rows = [row | run(row["command"]) for row in rows]
    record = {"machine": measure.machine(), "versions": measure.versions(), "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
