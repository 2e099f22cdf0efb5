"""Folders of small images, for the tests of the examples' data."""

from pathlib import Path

JUNK = b"no image"


def make_folder(
    path: Path, per_class: int = 5, classes: tuple[str, ...] = ("cats", "dogs")
) -> Path:
    """An ImageFolder of PNGs 12 high and 10 wide, each of one gray, which is its number."""
    from PIL import Image

    number = 0
    for name in classes:
        (path / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new("L", (10, 12), number).save(path / name / f"{index:04}.png")
            number += 1
    return path


def make_official(path: Path) -> Path:
    make_folder(path / "train", 8)
    make_folder(path / "val", 4)
    return path
