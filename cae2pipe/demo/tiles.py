"""The demo's images: tiles of the photographs in scikit-image and scikit-learn. The files are read from the folders of
the installed packages, so nothing is imported or downloaded. A photograph is a class. Its longer axis is split at two
thirds: training tiles come from before the split, test tiles from after it, so that no pixel is in both.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cae2pipe.artifacts.atomic import commit, temporary_path, write_json
from cae2pipe.errors import MismatchError, SourceError
from cae2pipe.runtime.keyed import keyed_uniforms
from cae2pipe.runtime.progress import Report

SIDES = (110, 200)
"""Smallest and largest side of a tile in pixels."""
LONGEST = 720
"""Larger photographs are reduced to this longer side: at full size a tile of the retina shows one colour only."""
SPLITS = {"train": 24, "val": 9}
"""Tiles per photograph."""
RECORD = "tiles.json"


@dataclass(frozen=True)
class Photograph:
    """One class: its name, the package that ships it, and the file inside that package."""

    name: str
    package: str
    file: str


_SKIMAGE = {
    "astronaut": "png",
    "brick": "png",
    "camera": "png",
    "chelsea": "png",
    "coffee": "png",
    "coins": "png",
    "grass": "png",
    "gravel": "png",
    "hubble_deep_field": "jpg",
    "ihc": "png",
    "moon": "png",
    "motorcycle_left": "png",
    "retina": "jpg",
    "rocket": "jpg",
}
PHOTOGRAPHS = (
    *(Photograph(name, "skimage", f"data/{name}.{kind}") for name, kind in _SKIMAGE.items()),
    *(Photograph(name, "sklearn", f"datasets/images/{name}.jpg") for name in ("china", "flower")),
)
"""All sufficiently large photographs and micrographs in the two wheels; the others are drawings and test patterns."""


@dataclass(frozen=True)
class Tile:
    """A square [left, left + side) x [top, top + side) of a photograph, in pixels."""

    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (self.left, self.top, self.left + self.side, self.top + self.side)


def place_tile(width: int, height: int, split: str, *key: str | int) -> Tile:
    """A tile of the ``train`` or ``val`` part of a photograph of that size, determined by ``key``. The side is uniform
    in ``SIDES``, limited by the part's size; the position is uniform over the part.
    """
    across = width >= height
    cut = 2 * max(width, height) // 3
    low, high = (0, cut) if split == "train" else (cut, max(width, height))
    short = min(width, height)
    largest = min(SIDES[1], high - low, short)
    smallest = min(SIDES[0], largest)
    size, along, beside = keyed_uniforms(3, "tile", *key)
    side = smallest + int(size * (largest - smallest + 1))
    first = low + int(along * (high - low - side + 1))
    second = int(beside * (short - side + 1))
    return Tile(first, second, side) if across else Tile(second, first, side)


def find_photograph(photograph: Photograph) -> Path:
    """The photograph's file in the installed package.

    Raises:
        SourceError: the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(photograph.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / photograph.file
        if path.is_file():
            return path
    what = f"the package {photograph.package!r} " + ("is not installed" if spec is None else "lacks a photograph")
    raise SourceError(
        f"{what}, from which the demo cuts its images",
        where=f"{photograph.package}/{photograph.file}",
        fix="pip install 'cae2pipe[demo]'",
    )


def cut_tiles(
    out: Path, seed: int, report: Report, *, photographs: tuple[Photograph, ...] = PHOTOGRAPHS
) -> dict[str, int]:
    """Write ``out/train/PHOTOGRAPH/*.jpg`` and ``out/val/PHOTOGRAPH/*.jpg`` atomically.

    Returns:
        The number of tiles in each split.

    Raises:
        SourceError: a photograph is missing. MismatchError: ``out`` holds something else, or tiles with different
        settings.
    """
    record = {
        "seed": seed,
        "photographs": [photograph.name for photograph in photographs],
        "tiles": SPLITS,
        "sides": list(SIDES),
    }
    counts = {split: each * len(photographs) for split, each in SPLITS.items()}
    if out.exists():
        check_tiles(out, record, counts)
        report.log(f"nothing to do: {out} holds all {sum(counts.values())} tiles")
        return counts
    paths = [find_photograph(photograph) for photograph in photographs]
    temporary = temporary_path(out)
    shutil.rmtree(temporary, ignore_errors=True)
    report.total(sum(counts.values()), "tiles")
    for photograph, path in zip(photographs, paths, strict=True):
        with Image.open(path) as file:
            image = file.convert("RGB")
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        for split, each in SPLITS.items():
            folder = temporary / split / photograph.name
            folder.mkdir(parents=True)
            for number in range(each):
                tile = place_tile(*image.size, split, seed, photograph.name, split, number)
                image.crop(tile.box).save(folder / f"{number:02d}.jpg", quality=95, subsampling=0)
                report.advance()
    write_json(temporary / RECORD, record)
    commit(temporary, out)
    return counts


def check_tiles(out: Path, record: Mapping[str, object], counts: dict[str, int]) -> None:
    """Refuse a folder with other tiles. Raises MismatchError."""
    try:
        old = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        old = None
    present = {split: sum(1 for _ in (out / split).glob("*/*.jpg")) for split in counts}
    if old != record or present != counts:
        raise MismatchError(
            "this folder does not contain the demo's tiles" if old is None else "some of the demo's tiles differ",
            where=out,
            fix="remove the folder, or use another output folder for the demo",
        )
