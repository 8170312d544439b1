"""Manifests of pretraining runs."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import OPEN, STRICT, FileEntry, Format, Sha256, StoreName, Teacher, Values

EncoderFile = Literal["encoder.safetensors", "config.json"]


class Encoder(TypedDict):
    """The unit ``encoder``: the exported encoder."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    files: dict[EncoderFile, FileEntry]


class Identity(TypedDict):
    """``targets``: the target set's fingerprint."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    settings: Values
    targets: Sha256


class RunManifest(TypedDict):
    """``manifest.json`` of a run. ``stores``: the fingerprints of the stores that it began with."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    format: Format
    kind: Literal["run"]
    identity: Identity
    fingerprint: Sha256
    digest: NotRequired[Sha256]
    units: dict[Literal["encoder"], Encoder]
    complete: bool
    stores: dict[StoreName, Sha256]
    teacher: Teacher


def unit_model(name: str) -> type[Any]:
    """The model of the unit of this name."""
    return Encoder


def contradiction(name: str, unit: dict[str, Any]) -> str | None:
    """What of a valid unit contradicts its name, or itself; None where nothing does."""
    missing = {"encoder.safetensors", "config.json"} - unit["files"].keys()
    return f"files: {min(missing)} is not among them" if missing else None
