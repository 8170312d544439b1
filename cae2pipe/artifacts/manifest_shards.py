"""Manifests of shard sets."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import (
    OPEN,
    SAMPLE_BYTES,
    SHARD,
    STRICT,
    Count,
    FileEntry,
    Format,
    Names,
    Sha256,
    Values,
)

LISTING = r"listing-[0-9]{3,9}"

TarFile = Annotated[str, Field(pattern=rf"^tars/{SHARD}\.(tar|json)$")]
OtherFile = Annotated[str, Field(pattern=rf"^({LISTING}\.jsonl\.gz|rejects\.jsonl)$")]


class Rejected(TypedDict):
    """An image of the source that cannot be decoded."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    path: str
    reason: str


class Tar(TypedDict):
    """The unit ``000000``: a tar and its index, or nothing where every image was rejected."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    files: dict[TarFile, FileEntry]
    samples: Count
    rejected: list[Rejected]


class Listing(TypedDict):
    """The unit ``listing-000`` (or ``rejects``, which lists no ``images``)."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    files: dict[OtherFile, FileEntry]
    samples: Literal[0]
    images: NotRequired[Count]


class Identity(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]

    settings: Values
    classes: Names


class ShardsManifest(TypedDict):
    """``manifest.json`` of a shard set."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    format: Format
    kind: Literal["shards"]
    identity: Identity
    fingerprint: Sha256
    digest: NotRequired[Sha256]
    units: dict[Annotated[str, Field(pattern=f"^({SHARD}|{LISTING}|rejects)$")], Tar | Listing]
    complete: bool
    rejected: NotRequired[Count]


def unit_model(name: str) -> type[Any]:
    """The model of the unit of this name."""
    return Tar if name.isdigit() else Listing


def contradiction(name: str, unit: dict[str, Any]) -> str | None:
    """What of a valid unit contradicts its name, or itself; None where nothing does."""
    files = unit["files"]
    if unit_model(name) is not (Tar if "rejected" in unit else Listing):
        return "these are the fields of another kind of unit"
    if not name.isdigit():
        expected = {"rejects.jsonl"} if name == "rejects" else {f"{name}.jsonl.gz"}
        if name != "rejects" and "images" not in unit:
            return "images: Field required"
    else:
        expected = {f"tars/{name}.tar", f"tars/{name}.json"} if unit["samples"] else set()
    if files.keys() != expected:
        return f"files: these are not {', '.join(sorted(expected)) or 'none'}"
    if unit["samples"] * SAMPLE_BYTES > sum(entry["bytes"] for entry in files.values()):
        return f"samples: the tar is too small for {unit['samples']}"
    return None
