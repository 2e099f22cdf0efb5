"""``make dist``: build wheel and sdist of what git knows, and check what users would get.

Needs Python 3.11 or newer, and for the last check a package index and uv, without which that check
is skipped by name.
"""

import argparse
import email.message
import email.parser
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import tomllib

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Tests that import the installed package and read nothing of the source tree's.
SMOKE = ("tests/test_packaging.py", "tests/test_modules.py")
# What only an sdist has, and what only the repository has: setuptools follows the link to kernels/.
GENERATED = {"PKG-INFO", "setup.cfg"}
REPOSITORY_ONLY = {".gitignore", "vicreg_losses/kernels"}


class Refused(Exception):
    """A distribution is not what it should be."""


def demand(holds: bool, message: str) -> None:
    """Raise unless it holds (``assert`` would vanish under ``python -O``)."""
    if not holds:
        raise Refused(message)


def same(what: str, got: set[str], expected: set[str]) -> None:
    """Raise with the difference of two sets."""
    demand(
        got == expected,
        f"{what}: unexpected {sorted(got - expected)}, missing {sorted(expected - got)}",
    )


def call(*command: object, cwd: Path) -> str:
    """Run a command, show what it printed if it fails, and return it."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    demand(done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked() -> list[str]:
    """Files of the work tree that git has or would add."""
    listed = call("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0")
    return [name for name in listed if name and (ROOT / name).exists()]


def copy_tree(target: Path) -> Path:
    """A copy to build from: the work tree may have a ``build`` of another day."""
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def build(tree: Path, out: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist, which must equal the one from the tree."""
    command = (sys.executable, "-m", "build", "--no-isolation", tree, "--outdir")
    call(*command, out, cwd=tree)
    call(*command, out / "direct", "--wheel", cwd=tree)
    [sdist], [wheel], [direct] = (out.glob(p) for p in ("*.tar.gz", "*.whl", "direct/*.whl"))
    one, other = contents(wheel), contents(direct)
    same("wheel from the sdist", set(one), set(other))
    different = [name for name in one if one[name] != other[name]]
    demand(not different, f"wheels from the sdist and from the tree differ: {different}")
    shutil.rmtree(out / "direct")
    return sdist, wheel


def check_wheel_files(wheel: Path, version: str) -> None:
    """The package, its kernels, ``py.typed`` and the licence, and nothing else."""
    package = {name for name in tracked() if re.fullmatch(r"vicreg_losses/[^/]+\.(py|typed)", name)}
    kernels = {f"vicreg_losses/{name}" for name in tracked() if re.match(r"kernels/.*\.py$", name)}
    info = ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")
    expected = package | kernels | {f"vicreg_losses-{version}.dist-info/{name}" for name in info}
    demand("vicreg_losses/py.typed" in package, "py.typed: not in the source tree")
    same("files of the wheel", set(contents(wheel)), expected)


def check_sdist_files(sdist: Path) -> None:
    """The repository: what builds the wheel, runs the tests and makes the documentation."""
    with tarfile.open(sdist) as archive:
        paths = [PurePosixPath(member.name) for member in archive if member.isfile()]
    names = {str(path.relative_to(path.parts[0])) for path in paths}
    names = {name for name in names if ".egg-info/" not in name} - GENERATED
    same("files of the sdist", names, set(tracked()) - REPOSITORY_ONLY)


def metadata(wheel: Path) -> email.message.Message:
    """The METADATA of a wheel."""
    [name] = [n for n in contents(wheel) if n.endswith(".dist-info/METADATA")]
    return email.parser.BytesParser().parsebytes(contents(wheel)[name])


def check_metadata(fields: email.message.Message, version: str) -> None:
    """What the project declares is what an index is told."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    single = {
        "Name": "vicreg-losses",
        "Version": version,
        "Requires-Python": ">=3.10",
        "License-Expression": "MIT",
        "License-File": "LICENSE",
        "Description-Content-Type": "text/markdown",
    }
    for name, expected in single.items():
        demand(fields[name] == expected, f"{name}: expected {expected!r}, got {fields[name]!r}")
    classifiers = {f"Programming Language :: Python :: {v}" for v in PYTHONS}
    missing = classifiers - set(fields.get_all("Classifier", []))
    demand(not missing, f"classifiers: missing {sorted(missing)}")
    same("extras", set(fields.get_all("Provides-Extra")), set(project["optional-dependencies"]))
    required = {r for r in fields.get_all("Requires-Dist") if "extra ==" not in r}
    same("dependencies", required, set(project["dependencies"]))


def check_tag(tag: str, version: str) -> None:
    """A release's tag is its version, and the changelog has a section of it on top."""
    demand(tag == f"v{version}", f"tag: expected 'v{version}', got {tag!r}")
    top = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    demand(
        top is not None and top[1].startswith(f"[{version}]"),
        f"CHANGELOG.md: expected a section [{version}] on top",
    )


def install(wheel: Path, folder: Path) -> Path:
    """A fresh environment with the wheel, which is lent what this one has, but not this library."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-c", code, cwd=folder).strip())
    # Behind the wheel, and without the .pth files in there, such as that of an editable install.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def check_types(python: Path, empty: Path) -> None:
    """Mypy, as a user runs it: a good program passes, a bad one fails where it says it will."""
    flags = ("--strict", "--config-file=", "--no-error-summary", "--hide-error-context")
    cache = ROOT / ".mypy_cache" / "consumer"
    mypy = (sys.executable, "-m", "mypy", *flags, "--cache-dir", cache, "--python-executable")
    programs = ROOT / "tests" / "consumer"
    call(*mypy, python, programs / "uses_public_api.py", cwd=empty)
    wrong = programs / "wrong_arguments.py"
    command = [str(word) for word in (*mypy, python, wrong)]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    found = re.findall(r"wrong_arguments\.py:(\d+): error: .*\[(.+)\]$", done.stdout, re.MULTILINE)
    lines = enumerate(wrong.read_text().splitlines(), start=1)
    marked = ((number, re.search(r"# error: ([\w-]+)$", line)) for number, line in lines)
    expected = {f"line {number}: {mark[1]}" for number, mark in marked if mark}
    demand(bool(expected), "wrong_arguments.py: no line is marked")
    same("errors of wrong_arguments.py", {f"line {n}: {code}" for n, code in found}, expected)


def check_installed(python: Path, sdist: Path, work: Path) -> None:
    """Import from an empty folder, tests of the unpacked sdist, and types."""
    empty = work / "empty"
    empty.mkdir()
    site = python.parents[1]
    print(call(python, "-W", "error", HERE / "installed.py", site, cwd=empty), end="")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    [tree] = (work / "unpacked").iterdir()
    # -P keeps the folder of the sources out of sys.path: the tests import the wheel.
    command = (python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *SMOKE)
    print(call(*command, cwd=tree).splitlines()[-1])
    check_types(python, empty)


def check_resolution(work: Path) -> None:
    """The index has packages for every Python that fit together, as constraints.txt pins them."""
    if subprocess.run([sys.executable, "-m", "uv", "--version"], capture_output=True).returncode:
        print("uv is not installed: not checked that each Python has its packages")
        return
    extras = [word for name in ("examples", "dev", "docs") for word in ("--extra", name)]
    versions = ("--universal", "--python-version", PYTHONS[0])  # and every later one
    command = (sys.executable, "-m", "uv", "pip", "compile", "-q", *versions, *extras)
    pins = ("-c", ROOT / "constraints.txt")
    call(*command, *pins, ROOT / "pyproject.toml", "-o", work / "resolved.txt", cwd=work)


def main(arguments: list[str] | None = None) -> int:
    """Build, check, and leave the distributions in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--tag", help="the tag of a release, such as v0.1.0")
    options = parser.parse_args(arguments)
    source = (ROOT / "vicreg_losses" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
    try:
        if options.tag:
            check_tag(options.tag, version)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            sdist, wheel = build(copy_tree(work / "tree"), work / "dist")
            call(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=work)
            check_wheel_files(wheel, version)
            check_sdist_files(sdist)
            check_metadata(metadata(wheel), version)
            check_installed(install(wheel, work / "venv"), sdist, work)
            check_resolution(work)
            options.out.mkdir(parents=True, exist_ok=True)
            for built in (sdist, wheel):
                print("checked:", shutil.copy2(built, options.out))
    except Refused as refusal:
        print(f"check.py: error: {refusal}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
