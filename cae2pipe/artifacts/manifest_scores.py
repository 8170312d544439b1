"""Manifests of evaluations."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, final

from pydantic import Field, with_config
from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import OPEN, STRICT, Common, FileEntry, Values

RESULT = "result.json"

ResultFile = Annotated[str, Field(pattern=r"^[a-z_]{1,40}\.(json|npz|png|safetensors)$")]


@final
@with_config(STRICT)
class ResultUnit(TypedDict):
    """The unit ``result``: ``result.json``, predictions, pictures, weights."""

    files: dict[ResultFile, FileEntry]


@with_config(OPEN)
class EncoderIdentity(TypedDict):
    """``sha256``: of the exported encoder's weights; ``config``: the fingerprint of its configuration."""

    config: NotRequired[str]
    precision: NotRequired[str]
    sha256: NotRequired[str]


@with_config(OPEN)
class ScoresIdentity(TypedDict):
    """``class_embeddings``: of zero-shot classification, what they depend on. ``revision``: of attentive
    probes, segmentation and detection, the revision of training; missing: 1."""

    class_embeddings: NotRequired[Values]
    data: Values
    encoder: EncoderIdentity
    evaluation: NotRequired[str]
    feature: NotRequired[str]
    image_size: NotRequired[int]
    revision: NotRequired[int]
    settings: NotRequired[Values]


@with_config(OPEN)
class ScoresFacts(TypedDict):
    """``result``: the short parts of ``result.json``."""

    result: NotRequired[Values]


@with_config(OPEN)
class ScoresManifest(Common, ScoresFacts):
    """``manifest.json`` of an evaluation."""

    kind: Literal["scores"]
    identity: ScoresIdentity
    units: dict[Annotated[str, Field(pattern="^result$")], ResultUnit]


def unit_model(name: str) -> type[ResultUnit]:
    """The model of a unit, by its name."""
    return ResultUnit


def contradiction(name: str, unit: ResultUnit) -> str | None:
    """How a valid unit contradicts its name, or itself; None if it does not."""
    return None if RESULT in unit["files"] else f"files: {RESULT} is missing"
