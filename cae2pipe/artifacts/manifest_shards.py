"""Manifests of shard sets."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, final

from pydantic import Field, with_config
from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import (
    OPEN,
    SAMPLE_BYTES,
    SHARD,
    STRICT,
    Common,
    Count,
    FileEntry,
    Names,
    Values,
)

LISTING = r"listing-[0-9]{3,9}"

TarFile = Annotated[str, Field(pattern=rf"^tars/{SHARD}\.(tar|json)$")]
OtherFile = Annotated[str, Field(pattern=rf"^({LISTING}\.jsonl\.gz|rejects\.jsonl)$")]


@with_config(STRICT)
class Rejected(TypedDict):
    """An image of the source that cannot be decoded."""

    path: str
    reason: str


@final
@with_config(STRICT)
class TarUnit(TypedDict):
    """The unit ``000000``: a tar and its index, or nothing if every image was rejected."""

    files: dict[TarFile, FileEntry]
    samples: Count
    rejected: list[Rejected]


@final
@with_config(STRICT)
class ListingUnit(TypedDict):
    """The unit ``listing-000`` (or ``rejects``, which lists no ``images``)."""

    files: dict[OtherFile, FileEntry]
    samples: Literal[0]
    images: NotRequired[Count]


@with_config(OPEN)
class ShardsIdentity(TypedDict):
    settings: Values
    classes: Names


@with_config(OPEN)
class ShardsFacts(TypedDict):
    """``licence``: of the images, if it was given."""

    rejected: NotRequired[Count]
    licence: NotRequired[str]


@with_config(OPEN)
class ShardsManifest(Common, ShardsFacts):
    """``manifest.json`` of a shard set."""

    kind: Literal["shards"]
    identity: ShardsIdentity
    units: dict[Annotated[str, Field(pattern=f"^({SHARD}|{LISTING}|rejects)$")], TarUnit | ListingUnit]


def unit_model(name: str) -> type[TarUnit | ListingUnit]:
    """The model of a unit, by its name."""
    return TarUnit if name.isdigit() else ListingUnit


def contradiction(name: str, unit: TarUnit | ListingUnit) -> str | None:
    """How a valid unit contradicts its name, or itself; None if it does not."""
    files = unit["files"]
    if unit_model(name) is not (TarUnit if "rejected" in unit else ListingUnit):
        return "these are the fields of another kind of unit"
    if not name.isdigit():
        expected = {"rejects.jsonl"} if name == "rejects" else {f"{name}.jsonl.gz"}
        if name != "rejects" and "images" not in unit:
            return "images: Field required"
    else:
        expected = {f"tars/{name}.tar", f"tars/{name}.json"} if unit["samples"] else set()
    if files.keys() != expected:
        return f"files: expected {', '.join(sorted(expected)) or 'none'}"
    if unit["samples"] * SAMPLE_BYTES > sum(entry["bytes"] for entry in files.values()):
        return f"samples: the tar is too small for {unit['samples']}"
    return None
