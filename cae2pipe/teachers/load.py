"""Loading a teacher from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.config.base import build_recorded
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import MismatchError, TeacherError
from cae2pipe.teachers.precision import resolve_precision
from cae2pipe.teachers.protocol import Teacher
from cae2pipe.teachers.token_grid import ResampledTeacher
from cae2pipe.teachers.weights import check_present


class LoadedTeacher(NamedTuple):
    """A teacher, and what it was loaded ``of``: its settings, and the precision of an existing set."""

    of: tuple[TeacherSettings, str | None]
    teacher: Teacher


def load_teacher(settings: TeacherSettings, device: torch.device, *, begun: str | None = None) -> Teacher:
    """The teacher that the settings describe, frozen, on the device. ``begun``: the precision of an existing set.

    Raises:
        TeacherError: unknown model, weights that are missing, unsafe or do not fit, or a grid finer than the model's.
    """
    settings = named_without_paths(settings)
    settings = settings.model_copy(update={"precision": resolve_precision(settings, device, begun)})
    teacher = model_of(settings, device)
    return teacher if settings.grid is None else ResampledTeacher(teacher, settings.grid)


def model_of(settings: TeacherSettings, device: torch.device) -> Teacher:
    """The same with the model's own grid."""
    foreign = ("model_args",) if settings.kind == "open_clip" else ("vision_cfg", "embed_dim", "quick_gelu")
    if misplaced := [name for name in foreign if getattr(settings, name) not in (None, {})]:
        raise TeacherError(
            f"teacher.{misplaced[0]} does not apply to teacher.kind {settings.kind}",
            where="teacher",
            fix="omit it, or change teacher.kind",
        )
    if settings.weights is not None:
        check_present(settings.weights)
    # Each library takes seconds to import, so only the requested one is imported.
    if settings.kind == "open_clip":
        from cae2pipe.teachers.open_clip import load_open_clip

        return load_open_clip(settings, device)
    from cae2pipe.teachers.timm import load_timm

    return load_timm(settings, device)


def named_without_paths(settings: TeacherSettings) -> TeacherSettings:
    """The settings with a folder's name (``local-dir:PATH``) replaced by what it holds, since fingerprints hold no
    paths. Raises TeacherError if it holds no model."""
    if settings.kind != "timm":
        return settings
    from cae2pipe.teachers.timm_source import resolved

    return resolved(settings)


def set_teacher(
    artifact: TargetsArtifact, weights: Path | None, device: torch.device, *, option: str, layers: bool = True
) -> Teacher:
    """The teacher that a target set was made with.

    Args:
        artifact: the set's. device: where the teacher runs.
        weights: its weights file, if they came from one: target sets do not store paths.
        option: the option for that file, for the message.
        layers: whether it also gives the tokens of earlier blocks that the set has.

    Raises:
        TeacherError: it cannot be loaded. MismatchError: the weights differ.
    """
    known: Mapping[str, Any] = artifact.identity["teacher"]
    settings = build_recorded(
        TeacherSettings,
        # What a configuration next to the weights said may be missing where they are now.
        artifact.identity["settings"]["teacher"]
        | {name: known[name] for name in ("image_size", "mean", "std") if name in known}
        | {name: known["architecture"][name] for name in ("quick_gelu",) if name in known["architecture"]}
        | ({"project": known["architecture"].get("projected", False)} if known["library"] == "timm" else {}),
        where=artifact.root,
    )
    if not layers:
        settings = settings.model_copy(update={"layers": ()})
    if weights is not None:
        settings = settings.model_copy(update={"weights": weights})
    try:
        teacher = load_teacher(settings, device, begun=artifact.identity["teacher"].get("precision"))
    except TeacherError as error:
        if weights is not None:
            raise
        raise TeacherError(error.what, where=error.where, fix=f"give the file: {option}") from None
    if teacher.info.weights != artifact.identity["teacher"]["weights"]:
        raise MismatchError(
            "these are not the weights that this target set was made with",
            where=weights or artifact.root,
            fix=f"give the right file: {option}",
        )
    return teacher
