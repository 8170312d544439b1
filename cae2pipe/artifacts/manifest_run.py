"""Manifests of pretraining runs."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, final

from pydantic import Field, with_config
from typing_extensions import TypedDict

from cae2pipe.artifacts.manifest_values import (
    OPEN,
    STRICT,
    Common,
    FileEntry,
    Licences,
    Sha256,
    StoreName,
    TeacherEntry,
    Values,
)

EncoderFile = Annotated[str, Field(pattern=r"^(encoder\.safetensors|config\.json)$")]


@final
@with_config(STRICT)
class EncoderUnit(TypedDict):
    """The unit ``encoder``: the exported encoder."""

    files: dict[EncoderFile, FileEntry]


@with_config(OPEN)
class RunIdentity(TypedDict):
    """``targets``: the target set's fingerprint. ``order``: the version of the order of samples; missing in older runs,
    which had version 1. ``teachers``: the fingerprints of further target sets, missing if there are none. ``init``: the
    digest of the weights that the encoder started from; missing for random ones."""

    init: NotRequired[Sha256]
    settings: Values
    targets: Sha256
    teachers: NotRequired[list[Sha256]]
    order: NotRequired[Annotated[int, Field(ge=2)]]


@with_config(OPEN)
class RunTeacher(TeacherEntry):
    """``library`` and ``weights``: missing in older runs."""

    library: NotRequired[str]
    weights: NotRequired[str]


@with_config(OPEN)
class SeveralTeacher(RunTeacher):
    """One of several teachers: its label, and fingerprint, licences and stores of its target set."""

    label: Annotated[str, Field(min_length=1, max_length=100)]
    targets: Sha256
    licences: Licences
    stores: dict[StoreName, Sha256]


@with_config(OPEN)
class RunFacts(TypedDict):
    """``stores``: the fingerprints of the stores that it was started with. ``init``: the name of the weights that the
    encoder started from, if they were not random. ``teachers``: all teachers, if there are several, in the order of
    their heads; ``teacher``, ``licences`` and ``stores`` are of the first. ``licences``: the target set's."""

    init: NotRequired[str]
    stores: dict[StoreName, Sha256]
    teacher: RunTeacher
    teachers: NotRequired[list[SeveralTeacher]]
    licences: NotRequired[Licences]


@with_config(OPEN)
class RunManifest(Common, RunFacts):
    """``manifest.json`` of a run."""

    kind: Literal["run"]
    identity: RunIdentity
    units: dict[Annotated[str, Field(pattern="^encoder$")], EncoderUnit]


def unit_model(name: str) -> type[EncoderUnit]:
    """The model of a unit, by its name."""
    return EncoderUnit


def contradiction(name: str, unit: EncoderUnit) -> str | None:
    """How a valid unit contradicts its name, or itself; None if it does not."""
    missing = {"encoder.safetensors", "config.json"} - unit["files"].keys()
    return f"files: {min(missing)} is missing" if missing else None
