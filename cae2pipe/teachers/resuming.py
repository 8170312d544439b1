"""The teacher of an existing set: other spellings of the same model resume it, and changed defaults do not matter."""

from __future__ import annotations

from typing import Any

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.config.base import build_recorded
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.teachers.hub import FOLDER, HUB, timm_name
from cae2pipe.teachers.lite0 import LITE0
from cae2pipe.teachers.timm_source import resolved

KEPT = ("image_size", "stage", "output", "summary", "project", "layers", "grid")
"""Settings that are the set's own where they are not given: their defaults may change, and presets give some."""


def canonical(settings: TeacherSettings) -> TeacherSettings:
    """The settings with the one name under which new sets record a model of timm: NAME.TAG, with the tag of timm's
    default weights if these are used."""
    if settings.kind != "timm" or settings.name.startswith((HUB, FOLDER)):
        return settings
    name = timm_name(settings)
    if "." not in name and settings.weights is None and name != LITE0:
        from timm.models import get_pretrained_cfg

        default = get_pretrained_cfg(name)
        name = f"{name}.{default.tag}" if default and default.tag else name
    return settings.model_copy(update={"name": name, "pretrained": None})


def teacher_as_begun(settings: TeacherSettings, artifact: TargetsArtifact) -> TeacherSettings:
    """The teacher's settings for an existing set.

    Settings that were not given are the set's own. So is the name where it means the same model and weights, and a
    value that the set's teacher has anyway, such as the model's own ``image_size``.

    Raises:
        TeacherError: a folder (``local-dir:PATH``) that holds no model.
    """
    identity = artifact.identity
    begun = build_recorded(TeacherSettings, identity["settings"]["teacher"], artifact.root)
    known: dict[str, Any] = dict(identity["teacher"])
    known["stage"] = known.get("architecture", {}).get("stage")
    named = resolved(settings)
    updates = {name: getattr(begun, name) for name in KEPT if name not in settings.model_fields_set}
    for name in ("image_size", "stage", "mean", "std"):
        value, own = getattr(named, name), known.get(name)
        if value is not None and value == (tuple(own) if isinstance(own, list) else own):
            updates[name] = getattr(begun, name)
    if same_model(named, begun):
        updates |= {"name": begun.name, "pretrained": begun.pretrained}
    return named.model_copy(update=updates)


def same_model(settings: TeacherSettings, begun: TeacherSettings) -> bool:
    """Whether two settings name the same model and weights. ``begun``: a set's, which do not say whether a file gave
    the weights."""
    one, other = (canonical(each.model_copy(update={"weights": settings.weights})) for each in (settings, begun))
    return (one.kind, one.name, one.pretrained) == (other.kind, other.name, other.pretrained)
