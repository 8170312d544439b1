"""Digests of files and fingerprints of settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import file_size, is_local, open_file, read_range


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


PIECE = 8 * 2**20
"""Bytes of a remote file that are read at a time."""


def sha256_file(path: Path) -> str:
    if is_local(path):
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest, offset = hashlib.sha256(), 0
    total = file_size(path)
    if total is None:
        raise FileNotFoundError(path)
    while offset < total:
        piece = read_range(path, offset, min(PIECE, total - offset))
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """A file's entry in a manifest: its size in bytes and its SHA-256. Raises OSError if it cannot be read."""
    size = file_size(path)
    if size is None:
        raise FileNotFoundError(path)
    return {"bytes": size, "sha256": sha256_file(path)}


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: object) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value).encode("ascii"))
