"""Checks a source against a reference manifest: ``data_manifests/imagenet1k.json``, or a file.

{"name": "imagenet1k", "splits": {"train": {"images": 1281167}, ...}, "classes": {"n01440764": "tench, ...", ...}}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cae2pipe.artifacts.json_files import read_json
from cae2pipe.config.base import package_folder
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.entries import Source

SHAPE = 'write {"name": ..., "splits": {"train": {"images": N}}, "classes": {"CLASS": "words"}}'
SHOWN = 12
"""Classes that an error names."""


@dataclass(frozen=True)
class Reference:
    """A reference manifest: ``classes``: descriptions by folder; ``images``: their number by split."""

    name: str
    classes: dict[str, str]
    images: dict[str, int]


def check_expected(source: Source, expected: str, split: str | None = None) -> None:
    """Compare a source's classes and number of images with a reference.

    Args:
        expected: ``NAME`` or ``NAME/SPLIT``; NAME is a built-in manifest or a JSON file.
        split: for a plain ``NAME``, the source's split if it is one of several. Default: ``train``.

    Raises:
        SettingsError: unknown manifest or split. SourceError: the source differs; missing classes are named.
    """
    reference, asked = read_reference(expected)
    split = asked or _canonical(split or "train")
    if split not in reference.images:
        raise SettingsError(
            f"{reference.name} has no split {split!r}",
            where="--expect",
            fix=f"give one of {', '.join(reference.name + '/' + name for name in reference.images)}",
        )
    names, images = reference.classes, reference.images[split]
    problems = []
    if missing := [f"{key} ({names[key].split(',')[0]})" for key in sorted(names.keys() - set(source.classes))]:
        problems.append(f"{len(missing)} of its {len(names)} classes are missing: {_some(missing)}")
    if foreign := sorted(set(source.classes) - names.keys()):
        problems.append(f"unexpected classes ({len(foreign)}): {_some(foreign)}")
    if len(source.entries) != images:
        problems.append(f"it has {counted(len(source.entries), 'image')} instead of {images}")
    if problems:
        raise SourceError(
            f"this is not {reference.name}/{split}: " + "; ".join(problems),
            where=source.root,
            fix="complete the source, or omit --expect to use it as it is"
            if source.classes
            else "give the classes of these images: --labels FILE",
        )


def read_reference(expected: str) -> tuple[Reference, str | None]:
    """A reference manifest, and the requested split."""
    name, split = expected, ""
    if not Path(name).is_file():
        name, _, split = expected.rpartition("/") if "/" in expected else (expected, "", "")
    path = Path(name) if Path(name).is_file() else package_folder("data_manifests") / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in package_folder("data_manifests").glob("*.json"))
        raise SettingsError(
            f"unknown reference manifest {name!r}",
            where="--expect",
            fix=f"give {', '.join(known)}, or a JSON file",
        )
    data = read_json(path, fix=SHAPE, error=SettingsError)
    try:
        reference = Reference(
            str(data["name"]),
            {str(key): str(words) for key, words in data["classes"].items()},
            {name: int(data["splits"][name]["images"]) for name in data["splits"]},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"this is not a reference manifest: {type(error).__name__}: {error}",
            where=path,
            fix=SHAPE,
        ) from None
    return reference, split or None


def _canonical(split: str) -> str:
    name = split.lower()
    return "train" if name.startswith("train") else "val" if name.startswith("val") else name


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
