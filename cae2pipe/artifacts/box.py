"""A box: one folder made by one command, described by its ``manifest.json``.

The manifest holds

- ``format``: the version of the layout, 1;
- ``kind``: ``shards``, ``targets``, ``run`` or ``scores``;
- ``identity``: what the content depends on (settings, digests of inputs), and ``fingerprint``, its SHA-256;
- ``units``: the independent pieces of the content by name, each with ``files``: path -> bytes and SHA-256;
- facts of the kind (class names, teacher, codec, ...), and ``complete``.

A unit is written first, then its entry in ``journal/``: the entry's presence is what makes the unit exist. At the end
of a run the journal is folded into the manifest. A killed run leaves a journal, which is as good as the manifest;
readers merge both. Neither holds times, host names or absolute paths, so equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.atomic import write_json
from cae2pipe.artifacts.digest import fingerprint, sha256_file
from cae2pipe.errors import DamageError, ManifestError, MismatchError

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "journal"


@dataclass
class Box:
    """A folder with a manifest. ``facts`` are the manifest's other keys."""

    root: Path
    kind: str
    identity: dict[str, Any]
    units: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    def manifest(self) -> dict[str, Any]:
        return {
            **self.facts,
            "format": FORMAT,
            "kind": self.kind,
            "identity": self.identity,
            "fingerprint": self.fingerprint,
            "units": dict(sorted(self.units.items())),
            "complete": self.complete,
        }

    def add(self, name: str, unit: dict[str, Any]) -> None:
        """Make a finished unit exist: its files must already bear their final names."""
        write_json(self.root / JOURNAL / f"{name}.json", unit)
        self.units[name] = unit

    def has(self, name: str) -> bool:
        """Whether a unit is there, its files with their sizes. Changed bytes are `cae2pipe verify`'s to find."""
        files = self.units[name]["files"] if name in self.units else None
        return files is not None and not any(
            check_file(self.root / path, entry, digests=False) for path, entry in files.items()
        )

    def save(self, *, complete: bool | None = None) -> None:
        """Write the manifest, unless it is as it should be, and clear the journal, which it now contains."""
        if complete is not None:
            self.complete = complete
        path = self.root / MANIFEST
        if not path.exists() or _read_json(path) != json.loads(json.dumps(self.manifest())):
            write_json(path, self.manifest())
        shutil.rmtree(self.root / JOURNAL, ignore_errors=True)


def is_box(root: Path, kind: str | None = None) -> bool:
    """Whether ``root`` holds a readable manifest (of that kind)."""
    try:
        box = open_box(root)
    except ManifestError:
        return False
    return kind is None or box.kind == kind


def open_box(root: Path, kind: str | None = None) -> Box:
    """Read a folder's manifest and journal.

    Raises:
        ManifestError: no manifest, a broken one, another format, or another kind.
    """
    path = root / MANIFEST
    if not path.is_file():
        made_by = {"shards": "cae2pipe shard", "targets": "cae2pipe extract-targets", "run": "cae2pipe pretrain"}
        raise ManifestError(
            "this folder has no manifest.json: it is not one that cae2pipe made" if root.is_dir() else "no such folder",
            where=root,
            fix=f"give a folder made by `{made_by[kind]}`" if kind in made_by else "check the path",
        )
    data = _read_json(path)
    if not isinstance(data, dict) or "format" not in data or "kind" not in data:
        raise ManifestError("this manifest.json was not written by cae2pipe", where=path, fix="check the path")
    if data["format"] != FORMAT:
        raise ManifestError(
            f"the manifest has format {data['format']}, and this version of cae2pipe reads format {FORMAT}",
            where=path,
            fix="use the version of cae2pipe that wrote it (newer formats need a newer version)",
        )
    if kind is not None and data["kind"] != kind:
        raise ManifestError(
            f"this folder holds {data['kind']!r}, and {kind!r} is needed here", where=root, fix="check the path"
        )
    known = {"format", "kind", "identity", "fingerprint", "units", "complete"}
    if missing := known - data.keys():
        raise ManifestError(f"the manifest lacks {', '.join(sorted(missing))}", where=path, fix="make the folder again")
    if fingerprint(data["identity"]) != data["fingerprint"]:
        raise DamageError(
            "the manifest's identity does not match its fingerprint", where=path, fix="make the folder again"
        )
    units = data["units"]
    journal = root / JOURNAL
    for entry in sorted(journal.rglob("*.json")) if journal.is_dir() else []:
        if not entry.name.startswith("."):
            units[entry.relative_to(journal).with_suffix("").as_posix()] = _read_json(entry)
    facts = {key: value for key, value in data.items() if key not in known}
    return Box(root, data["kind"], data["identity"], units, facts, data["complete"])


def open_or_create(root: Path, kind: str, identity: dict[str, Any], facts: dict[str, Any], fix: str) -> Box:
    """Open a box that is to be continued, or start it.

    Raises:
        MismatchError: the folder was made with another identity; the first field that differs is named.
        ManifestError: the folder holds something else.
    """
    if (root / MANIFEST).exists():
        box = open_box(root, kind)
        if difference := first_difference(box.identity, identity):
            name, old, new = difference
            raise MismatchError(
                f"this folder was made with {name} = {_show(old)}, and {_show(new)} is asked for now",
                where=root / MANIFEST,
                fix=fix,
            )
        return box
    refuse_foreign(root)
    box = Box(root, kind, identity, facts=facts)
    box.save()
    return box


def refuse_foreign(root: Path) -> None:
    """Raise ManifestError where ``root`` has no manifest and holds files that are not ours."""
    if (root / MANIFEST).exists():
        return
    strangers = sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) if root.is_dir() else []
    allowed = {"shards", JOURNAL}
    if foreign := [name for name in strangers if name not in allowed]:
        raise ManifestError(
            f"the folder is not empty (it holds {foreign[0]!r}) and has no manifest.json",
            where=root,
            fix="give a new or an empty folder",
        )


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first field, in sorted order, in which two nested dictionaries differ: (dotted name, old, new) or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if _plain(old) == _plain(new) else (name, old, new)


def check_files(box: Box, units: Iterable[str] | None = None, *, digests: bool = True) -> list[DamageError]:
    """Compare the files of the given units (default: all) with the manifest: presence, size and, if asked, SHA-256."""
    problems = []
    for name in sorted(box.units) if units is None else units:
        for relative, entry in box.units[name].get("files", {}).items():
            problem = check_file(box.root / relative, entry, digests=digests)
            if problem:
                problems.append(problem)
    return problems


def check_file(path: Path, entry: dict[str, Any], *, digests: bool = True) -> DamageError | None:
    if not path.is_file():
        what = "a file of the manifest is missing"
    elif path.stat().st_size != entry["bytes"]:
        what = f"the file has {path.stat().st_size} bytes instead of {entry['bytes']}: truncated or replaced"
    elif digests and sha256_file(path) != entry["sha256"]:
        what = "the file's content has changed: its SHA-256 is not the manifest's"
    else:
        return None
    return DamageError(what, where=path)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"not valid JSON ({error})", where=path, fix="make the folder again") from None
