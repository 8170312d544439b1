"""What a shard set was made from: one listing a generation, a line an image.

A set may grow: images that are new in the source make a generation of their own, with further tars, and what is there
stays as it is. A listing is what the generation's order is drawn from, so any tar can be made again at any time, and a
source that is no longer the same is noticed file by file.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import Any

from cae2pipe.artifacts.artifact import ShardsArtifact
from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.artifacts.digest import sha256_bytes
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import read_bytes
from cae2pipe.errors import DamageError, MismatchError
from cae2pipe.shards.entries import Entry, Source
from cae2pipe.shards.name_lists import text_lines

PREFIX = "listing-"
"""Units of listings: ``listing-000``, ``listing-001``, ... Their files bear the same names, ending in .jsonl.gz."""


def generations(artifact: ShardsArtifact) -> list[str]:
    """The names of a shard set's listings, oldest first."""
    return sorted(name for name in artifact.units if name.startswith(PREFIX))


def with_listings(source: Source, artifact: ShardsArtifact) -> list[list[Entry]]:
    """The source's images by generation. What no listing holds becomes a new one, written here.

    Raises:
        MismatchError: an image that is listed is gone from the source, or has another size. DamageError: a listing is
            lost, and the source cannot tell any more what it held.
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
        # All that the other listings do not hold: if it was that, its digest says so.
        listed[name] = sorted(left.values(), key=lambda entry: entry.path)
        left = {}
        data = encode_listing(listed[name])
        if sha256_bytes(data) != artifact.units[name]["files"][_file(name)]["sha256"]:
            raise DamageError(
                "this listing is lost, and the source is no longer the same",
                where=artifact.root / _file(name),
                fix="restore the file, or make the shard set again in a new folder",
            )
        write_bytes(artifact.root / _file(name), data)
    if left:
        if artifact.complete:
            artifact.save(complete=False)  # from before the new images are listed until their tars are there
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
    """Paths and bytes of a generation's images; None where the listing is missing or damaged."""
    try:
        data = read_bytes(artifact.root / _file(name))
        if sha256_bytes(data) != artifact.units[name]["files"][_file(name)]["sha256"]:
            return None
        rows: list[Any] = [json.loads(line) for line in text_lines(gzip.decompress(data).decode("utf-8"))]
    except (FileNotFoundError, OSError, EOFError, zlib.error, ValueError):
        return None
    return [(path, size) for path, size in rows]


def _same(left: dict[str, Entry], path: str, size: int, *, source: Source, artifact: ShardsArtifact) -> Entry:
    entry = left.pop(path, None)
    if entry is None or entry.bytes != size:
        raise MismatchError(
            f"the source has changed since this shard set was begun: {path} "
            + ("is no longer there" if entry is None else f"has {entry.bytes} bytes instead of {size}"),
            where=source.root,
            fix=f"restore that image, or give another output folder than {artifact.root}; only adding images is growth",
        )
    return entry


def _file(name: str) -> str:
    return f"{name}.jsonl.gz"
