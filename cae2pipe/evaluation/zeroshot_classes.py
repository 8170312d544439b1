"""Embeddings of classes: from a file, or from a text tower."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cae2pipe.artifacts.digest import fingerprint, sha256_file
from cae2pipe.artifacts.json_files import read_document
from cae2pipe.artifacts.tensors import write_safetensors
from cae2pipe.config.evaluate import ZeroshotSettings
from cae2pipe.errors import SettingsError, SourceError, TeacherError
from cae2pipe.evaluation.zeroshot_text import embed_classes, load_text_tower, prompts_of
from cae2pipe.runtime.progress import Report
from cae2pipe.teachers.weights import read_weights, safetensors_metadata

EMBEDDINGS, NAMES = "embeddings", "names"
"""The tensor (C, W) of a file of class embeddings, and the entry of its metadata with a JSON list of C classes."""
FORM = f"give a safetensors file with a tensor {EMBEDDINGS!r} (classes, width), and {NAMES!r} in its metadata"


@dataclass(frozen=True)
class ClassSource:
    """Class embeddings. ``identity``: what they depend on; ``width``: W; ``told``: their origin in words; ``embed``
    computes them, (C, W), in the order of the classes that were asked for; ``notes``: for the log."""

    identity: dict[str, Any]
    width: int
    told: str
    embed: Callable[[], Tensor]
    notes: tuple[str, ...] = ()


def class_source(
    settings: ZeroshotSettings, classes: Sequence[str], device: torch.device, report: Report
) -> ClassSource:
    """The embeddings of ``classes`` that the settings name.

    Raises:
        SettingsError: they name none. SourceError: the file is not one of class embeddings or names, or lacks classes.
        TeacherError: the text tower's weights are missing, unsafe or do not fit.
    """
    if settings.classes is not None:
        return from_file(settings.classes, classes)
    if settings.text is not None:
        return from_text(settings, classes, device, report)
    raise SettingsError(
        "no class embeddings are given",
        where="zeroshot",
        fix="give --classes FILE.safetensors, or --text open_clip:NAME/TAG",
    )


def from_file(path: Path, classes: Sequence[str]) -> ClassSource:
    """Embeddings from a safetensors file. Without names its rows are those of the classes in sorted order."""
    try:
        tensors = read_weights(path) if path.suffix == ".safetensors" else {}
    except TeacherError as error:
        raise SourceError(error.what.replace("weights file", "file"), where=path, fix=FORM) from None
    embeddings = tensors.get(EMBEDDINGS)
    if embeddings is None or embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise SourceError("this is not a file of class embeddings", where=path, fix=FORM)
    if not torch.isfinite(embeddings).all() or not embeddings.any(dim=1).all():
        raise SourceError("some class embeddings are zero or not finite", where=path, fix="compute them again")
    names = stored_names(path)
    if names is None:
        if len(embeddings) != len(classes):
            raise SourceError(
                f"the file has {len(embeddings)} class embeddings without names, the data {len(classes)} classes",
                where=path,
                fix=f"put a JSON list of the classes into its metadata, as {NAMES!r}",
            )
        names = sorted(classes)
    if len(names) != len(embeddings) or len(set(names)) != len(names):
        raise SourceError(
            f"the file has {len(set(names))} different names for {len(embeddings)} class embeddings",
            where=path,
            fix="name each row once",
        )
    refuse_missing(classes, names, path, "class embeddings")
    places = {name: row for row, name in enumerate(names)}
    rows = embeddings.float()[[places[name] for name in classes]]
    unused = len(names) - len(classes)
    return ClassSource(
        {"sha256": sha256_file(path)},
        rows.shape[1],
        f"class embeddings {path.name} ({sha256_file(path)[:8]})",
        lambda: rows,
        (f"{unused} of the {len(names)} class embeddings are of other classes, and not used",) if unused else (),
    )


def stored_names(path: Path) -> list[str] | None:
    """The names in the metadata of a safetensors file. Raises SourceError if they are not a JSON list of text."""
    text = safetensors_metadata(path).get(NAMES)
    if text is None:
        return None
    try:
        return TypeAdapter(list[str]).validate_json(text, strict=True)
    except ValidationError:
        raise SourceError(f"{NAMES!r} in its metadata is not a JSON list of names", where=path, fix=FORM) from None


def from_text(settings: ZeroshotSettings, classes: Sequence[str], device: torch.device, report: Report) -> ClassSource:
    """Embeddings by a text tower, of prompts with the names of the classes."""
    assert settings.text is not None
    names = read_names(settings.names, classes) if settings.names else spoken_names(classes)
    prompts = prompts_of(settings.prompts)
    tower = load_text_tower(settings.text)
    identity = {"text": tower.name, "weights": tower.digest, "names": fingerprint(names)}
    return ClassSource(
        identity if tower.quick_gelu is None else {**identity, "quick_gelu": tower.quick_gelu},
        tower.width,
        f"text tower {tower.name} ({tower.digest[:8]}), {len(prompts)} prompts",
        lambda: embed_classes(tower, names, prompts, device=device, report=report),
        tower.notes,
    )


def spoken_names(classes: Sequence[str]) -> list[list[str]]:
    """The names of classes as text: their folders', with spaces for underscores. Raises SourceError for WordNet's
    numbers."""
    if any(re.fullmatch(r"n\d{8}", name) for name in classes):
        raise SourceError(
            f"the classes are named by WordNet's numbers, such as {classes[0]!r}, which a text tower does not know",
            where="names",
            fix="give --names FILE, with a line `n01440764 tench, Tinca tinca` for each class",
        )
    return [[name.replace("_", " ")] for name in classes]


def read_names(path: Path, classes: Sequence[str]) -> list[list[str]]:
    """The names of each class from a text file with lines ``CLASS NAME, NAME, ...``. A tab may follow CLASS instead of
    a space, and then CLASS may hold spaces. This is the form of ImageNet's ``LOC_synset_mapping.txt``.

    Raises:
        SourceError: it cannot be read, or a class is missing, without a name or there twice.
    """
    fix = "write a line `CLASS NAME, NAME, ...` for each class"
    try:
        lines = read_document(path, fix=fix, error=SourceError, limit=2**26).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise SourceError("no such file of names", where=path, fix="check --names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"this cannot be read as text: {error}", where=path, fix=fix) from None
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, rest = line.strip().partition("\t" if "\t" in line else " ")
        spoken = [part.strip() for part in rest.split(",") if part.strip()]
        if not spoken or name in found:
            what = "comes twice" if name in found else "has no name"
            raise SourceError(f"class {name!r} {what}", where=f"{path}, line {number}", fix=fix)
        found[name] = spoken
    refuse_missing(classes, found, path, "names")
    return [found[name] for name in classes]


def refuse_missing(classes: Sequence[str], found: Sequence[str] | dict[str, list[str]], path: Path, what: str) -> None:
    """Raise SourceError if classes of the data are not in a file."""
    missing = sorted(set(classes) - set(found))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        own = ", ".join(map(repr, list(found)[:3]))
        raise SourceError(
            f"there are no {what} of these classes of the data: {', '.join(map(repr, missing[:3]))}{more}",
            where=path,
            fix=f"use the names of the class folders; the file has {own}, ..." if own else "the file is empty",
        )


def write_classes(path: Path, embeddings: Tensor, classes: Sequence[str]) -> None:
    """Write class embeddings as a file that ``from_file`` reads."""
    import json

    write_safetensors(path, {EMBEDDINGS: embeddings.contiguous()}, {NAMES: json.dumps(list(classes))})


def refuse_other_width(source: ClassSource, dim: int, spec: str, *, widths: Mapping[str, int] | None = None) -> None:
    """Raise SettingsError unless class embeddings are as wide as the encoder's output. ``widths``: those of several
    teachers' outputs, by label."""
    if source.width != dim:
        ways = [f"--teacher {label}" for label, width in (widths or {}).items() if width == source.width]
        raise SettingsError(
            f"the class embeddings have {source.width} dimensions, the encoder's output {dim}",
            where=f"{spec}, {source.told}",
            fix=" or ".join([*ways, "use embeddings of the CLIP model that is the encoder's teacher"]),
        )
