"""Short names of teachers: what settings, metrics and folders call one of several teachers."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.manifest_targets import TargetsIdentity
from cae2pipe.config.base import build_recorded
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.teachers.hub import preset_of, spell

LONGEST = 48
"""Characters of a label, without the digits that tell it from another."""
DIGITS = 8


def label(identity: TargetsIdentity, taken: Collection[str] = ()) -> str:
    """The label of a target set's teacher: ``clip-b16``, ``vit_small_patch14_dinov2-lvd142m``.

    It is the name of the preset that names these weights, else the last part of the model's name in lower case, with
    ``-`` for every character that is not safe in names of files and of settings. If that is ``taken``, the first
    digits of the fingerprint of the teacher's identity are added: those of other weights, or of another grid, differ.

    Args:
        identity: of the set's manifest.
        taken: labels of other teachers.

    Raises:
        SettingsError: the recorded settings of the teacher are invalid.
    """
    settings = recorded_teacher(identity)
    name = preset_of(settings) or safe(settings.name) or "teacher"
    return f"{name}-{fingerprint(identity['teacher'])[:DIGITS]}" if name in taken else name


def spelling(identity: TargetsIdentity) -> str:
    """What ``--teacher`` takes for a target set's teacher, without a local file of weights. Raises as ``label``."""
    return spelled(recorded_teacher(identity))


def spelled(settings: TeacherSettings) -> str:
    """What ``--teacher`` takes for a model: the name of its preset, if it has one."""
    return preset_of(settings) or spell(settings)


def recorded_teacher(identity: TargetsIdentity) -> TeacherSettings:
    """The settings of a target set's teacher. Raises SettingsError if they are invalid."""
    return build_recorded(TeacherSettings, identity["settings"]["teacher"], where="identity.settings.teacher")


def teacher_key(identity: TargetsIdentity) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tells the teacher of a target set from other teachers. Equal weights may have several names."""
    # The digest of the weights says what their name may say in several ways.
    unsaid = dict.fromkeys(("name", "pretrained", "precision"))
    return {**identity["teacher"], **unsaid}, {**identity["settings"]["teacher"], **unsaid}


def safe(name: str) -> str:
    """The last part of a model's name, as a label may be; empty if no character of it is safe."""
    last = name.rstrip("/").replace(":", "/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9_-]", "-", last).strip("-_")[:LONGEST]
