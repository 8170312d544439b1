"""The manifest and the journal in a folder, read and written. ``artifact.py`` says what they hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.json_files import read_document
from cae2pipe.artifacts.manifest import AGAIN, LIMIT, decode_manifest, encode_manifest, is_ours
from cae2pipe.artifacts.manifest_kinds import Manifest
from cae2pipe.artifacts.manifest_values import Unit
from cae2pipe.artifacts.storage import file_size, file_sizes, is_local, read_bytes, read_many
from cae2pipe.errors import ManifestError

MANIFEST = "manifest.json"
JOURNAL = "journal"
INNER = ("shards", "teachers")
"""Folders inside a target set that hold other artifacts: its shard set, and sets of added teachers."""


def is_foreign(root: Path) -> bool:
    """Whether the manifest of ``root`` is a valid JSON file that another program wrote."""
    return file_size(root / MANIFEST) is not None and is_ours(manifest_bytes(root)) is False


def read_folder(
    root: Path, kind: str | None, seen: Callable[[str, Unit], None] | None = None
) -> tuple[Manifest, dict[Path, bytes]]:
    """A folder's manifest and the entries of its journal.

    Args:
        kind: expected, for the error if there is none. seen: as for ``decode_manifest``.
    """
    path = root / MANIFEST
    # The journal first: an entry that is removed meanwhile is in the manifest.
    journal = read_many(journal_entries(root))
    if file_size(path) is None:
        if is_local(path) and os.path.lexists(path):
            raise ManifestError("this is neither a file nor a link to one", where=path, fix=AGAIN)
        names = file_sizes(root)
        if any(name.startswith(("tars/", "images/", "views/", "latents/")) for name in names):
            raise ManifestError(
                "this folder has lost its manifest.json, which lists its valid files",
                where=root,
                fix="restore the file from a copy, or make the folder again under another path",
            )
        folders = sorted((root / name).parent for name in names if name.endswith(f"/{MANIFEST}"))
        if kind is None and folders:
            raise ManifestError(
                "this folder has no manifest.json, but folders inside it have one",
                where=root,
                fix=f"give one of them, such as {folders[0]}",
            )
        raise ManifestError(
            "no such folder"
            if is_local(root) and not root.is_dir()
            else "this folder has no manifest.json, so it was not made by cae2pipe",
            where=root,
            fix=made_by(kind),
        )
    return decode_manifest(manifest_bytes(root), path, seen), journal


def made_by(kind: str | None) -> str:
    """What to do where a folder of a kind was expected."""
    commands = {"shards": "shard", "targets": "extract-targets", "run": "pretrain", "scores": "evaluate"}
    return f"give a folder made by `cae2pipe {commands[kind]}`" if kind in commands else "check the path"


def refuse_foreign(root: Path, fix: str = "give a new or an empty folder") -> None:
    """Raise ManifestError if ``root`` has no manifest but holds files of other programs."""
    if file_size(root / MANIFEST) is not None:
        return
    if is_local(root):
        names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    else:
        names = {path.split("/", 1)[0] for path in file_sizes(root)}
    foreign = sorted(name for name in names if not name.startswith(".") and name not in (*INNER, JOURNAL))
    if foreign:
        raise ManifestError(
            f"the folder is not empty (it holds {foreign[0]!r}) and has no manifest.json",
            where=root,
            fix=fix,
        )


def journal_entries(root: Path) -> list[Path]:
    """The journal's files, sorted."""
    names = (path for path in file_sizes(root / JOURNAL) if path.endswith(".json"))
    return [root / JOURNAL / name for name in sorted(names) if not name.rsplit("/", 1)[-1].startswith(".")]


def manifest_bytes(root: Path) -> bytes:
    return read_document(root / MANIFEST, fix=AGAIN, limit=LIMIT)


def manifest_of(
    kind: str,
    form: int,
    identity: Mapping[str, object],
    *,
    units: Mapping[str, Unit],
    facts: Mapping[str, object],
    complete: bool,
) -> dict[str, object]:
    return {
        **facts,
        "format": form,
        "kind": kind,
        "identity": identity,
        "fingerprint": fingerprint(identity),
        "units": units,
        "complete": complete,
    }


def write_manifest(root: Path, kind: str, form: int, *, manifest: Mapping[str, object]) -> None:
    path = root / MANIFEST
    data = encode_manifest(kind, form, manifest, where=path)
    if file_size(path) != len(data) or read_bytes(path) != data:
        write_bytes(path, data)
