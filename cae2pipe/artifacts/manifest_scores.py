"""Manifests of evaluations."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import OPEN, STRICT, FileEntry, Format, Sha256, Values

RESULT = "result.json"

ResultFile = Annotated[str, Field(pattern=r"^[a-z_]{1,40}\.(json|npz|png|safetensors)$")]


class Result(TypedDict):
    """The unit ``result``: ``result.json``, predictions, pictures, weights."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    files: dict[ResultFile, FileEntry]


class ScoresManifest(TypedDict):
    """``manifest.json`` of an evaluation. ``result``: the short parts of ``result.json``."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    format: Format
    kind: Literal["scores"]
    identity: Values
    fingerprint: Sha256
    digest: NotRequired[Sha256]
    units: dict[Literal["result"], Result]
    complete: bool
    result: NotRequired[Values]


def unit_model(name: str) -> type[Any]:
    """The model of the unit of this name."""
    return Result


def contradiction(name: str, unit: dict[str, Any]) -> str | None:
    """What of a valid unit contradicts its name, or itself; None where nothing does."""
    return None if RESULT in unit["files"] else f"files: {RESULT} is not among them"
