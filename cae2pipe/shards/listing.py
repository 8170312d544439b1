"""What a shard set was made from: one listing per generation, with one line per image.

A set may grow: images that are new in the source become another generation with further tars, and existing tars do not
change. The generation's order is drawn from its listing, so any tar can be rebuilt at any time, and a changed source is
noticed file by file.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Sequence

from pydantic_core import from_json

from cae2pipe.artifacts.artifact import ShardsArtifact
from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.digest import sha256_bytes
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import read_bytes
from cae2pipe.errors import DamageError, MismatchError
from cae2pipe.shards.entries import Entry, Source

PREFIX = "listing-"
"""Units of listings: ``listing-000``, ``listing-001``, ... Their files have the same names, with the suffix
.jsonl.gz."""


def generations(artifact: ShardsArtifact) -> list[str]:
    """The names of a shard set's listings, oldest first."""
    return sorted(name for name in artifact.units if name.startswith(PREFIX))


def with_listings(source: Source, artifact: ShardsArtifact) -> list[list[Entry]]:
    """The source's images by generation. Images that are in no listing become a new generation, written here.

    Raises:
        MismatchError: a listed image is missing from the source, or has another size. DamageError: a listing is lost,
            and cannot be restored from the source.
    """
    left = {entry.path: entry for entry in source.entries}
    listed: dict[str, list[Entry]] = {}
    lost = []
    for name in generations(artifact):
        rows = read_listing(artifact, name)
        if rows is None:
            lost.append(name)
        else:
            listed[name] = [_same(left, path, size, source=source, artifact=artifact) for path, size in rows]
    for name in lost:
        # Everything that is not in the other listings; the digest shows whether that is right.
        listed[name] = sorted(left.values(), key=lambda entry: entry.path)
        left = {}
        data = encode_listing(listed[name])
        if sha256_bytes(data) != artifact.units[name]["files"][_file(name)]["sha256"]:
            raise DamageError(
                "this listing is lost, and the source has changed",
                where=artifact.root / _file(name),
                fix="restore the file, or make the shard set again in a new folder",
            )
        write_bytes(artifact.root / _file(name), data)
    if left:
        if artifact.complete:
            artifact.save(complete=False)  # until the tars of the new images are complete
        name = f"{PREFIX}{len(listed):03d}"
        listed[name] = sorted(left.values(), key=lambda entry: entry.path)
        data = encode_listing(listed[name])
        write_bytes(artifact.root / _file(name), data)
        files: dict[str, FileEntry] = {_file(name): {"bytes": len(data), "sha256": sha256_bytes(data)}}
        artifact.add(name, {"files": files, "samples": 0, "images": len(listed[name])})
    return [listed[name] for name in sorted(listed)]


def encode_listing(entries: Sequence[Entry]) -> bytes:
    lines = (json.dumps([entry.path, entry.bytes], ensure_ascii=False) + "\n" for entry in entries)
    return gzip.compress("".join(lines).encode("utf-8"), 6, mtime=0)


def read_listing(artifact: ShardsArtifact, name: str) -> list[tuple[str, int]] | None:
    """Paths and bytes of a generation's images; None if the listing is missing or damaged."""
    try:
        data = read_bytes(artifact.root / _file(name))
        if sha256_bytes(data) != artifact.units[name]["files"][_file(name)]["sha256"]:
            return None
        # Line by line: a listing may have a hundred million.
        with gzip.open(io.BytesIO(data)) as lines:
            return [(path, size) for path, size in map(from_json, lines)]
    except (FileNotFoundError, OSError, EOFError, zlib.error, ValueError):
        return None


def _same(left: dict[str, Entry], path: str, size: int, *, source: Source, artifact: ShardsArtifact) -> Entry:
    entry = left.pop(path, None)
    if entry is None or entry.bytes != size:
        raise MismatchError(
            f"the source has changed since this shard set was started: {path} "
            + ("is no longer there" if entry is None else f"has {entry.bytes} bytes instead of {size}"),
            where=source.root,
            fix=f"restore that image, or give another output folder than {artifact.root}; images may only be added",
        )
    return entry


def _file(name: str) -> str:
    return f"{name}.jsonl.gz"
