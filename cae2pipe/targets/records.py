"""What a store says of each sample besides its latents: one record of bytes, in the array ``samples`` (n, R) uint8.

    draws    11 float64   crop box, flip and jitter: named in the attribute ``draw_columns`` of the store
    member   3 int64      offset, length and CRC-32C of the sample's JPEG in the tar: of the view, or of the image that
                          the view is cut from again by its draw
    label    int32        -1: none
    key      K bytes      UTF-8, padded with zeros

Numbers are little-endian and not aligned. The attribute ``fields`` of the array holds name, type and offset of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cae2pipe.images.views import DRAW_COLUMNS

SAMPLES = "samples"
HEAD = 8 * len(DRAW_COLUMNS) + 3 * 8 + 4
"""Bytes of a record before its key."""


@dataclass(frozen=True)
class Records:
    """The records of n samples. ``labels`` int32 (n,), ``draws`` float64 (n, 11), ``members`` int64 (n, 3)."""

    keys: list[str]
    labels: np.ndarray
    draws: np.ndarray
    members: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.keys) == len(self.labels) == len(self.draws) == len(self.members)

    def __len__(self) -> int:
        return len(self.keys)


def record_type(key_bytes: int) -> np.dtype:
    """A record with a key of that many bytes."""
    return np.dtype(
        [("draws", "<f8", (len(DRAW_COLUMNS),)), ("member", "<i8", (3,)), ("label", "<i4"), ("key", "u1", (key_bytes,))]
    )


def record_fields(key_bytes: int) -> list[dict[str, Any]]:
    """The attribute ``fields``."""
    kind = record_type(key_bytes)
    return [
        {"name": name, "type": kind[name].base.str, "shape": list(kind[name].shape), "offset": kind.fields[name][1]}
        for name in kind.names or ()
        if kind.fields is not None
    ]


def pack_records(records: Records) -> np.ndarray:
    """The array ``samples``."""
    encoded = [key.encode("utf-8") for key in records.keys]
    width = max(map(len, encoded))
    rows = np.zeros(len(records), dtype=record_type(width))
    rows["draws"], rows["member"], rows["label"] = records.draws, records.members, records.labels
    rows["key"] = np.frombuffer(b"".join(key.ljust(width, b"\0") for key in encoded), dtype="u1").reshape(-1, width)
    return rows.view("u1").reshape(len(records), -1)


def unpack_records(rows: np.ndarray) -> Records:
    """Inverse of ``pack_records``.

    Raises:
        ValueError: the rows are too short, or a key is not UTF-8.
    """
    if rows.shape[1] <= HEAD:
        raise ValueError("the records are too short")
    fields = rows.view(record_type(rows.shape[1] - HEAD))[:, 0]
    return Records(
        [key.tobytes().rstrip(b"\0").decode("utf-8") for key in fields["key"]],
        fields["label"].astype(np.int32),
        fields["draws"].astype(np.float64),
        fields["member"].astype(np.int64),
    )
