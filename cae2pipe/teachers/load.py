"""From settings to a teacher."""

from __future__ import annotations

import torch

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.protocol import Teacher
from cae2pipe.teachers.weights import check_present


def load_teacher(settings: TeacherSettings, device: torch.device) -> Teacher:
    """The teacher that the settings describe, frozen, on the device.

    Raises:
        TeacherError: unknown model, or weights that are missing, unsafe or do not fit.
    """
    foreign = ("stage",) if settings.kind == "open_clip" else ("vision_cfg", "embed_dim", "quick_gelu")
    if misplaced := [name for name in foreign if getattr(settings, name) is not None]:
        raise TeacherError(
            f"teacher.{misplaced[0]} means nothing to {settings.kind}",
            where="teacher",
            fix=f"leave it away, or change teacher.kind, which is {settings.kind}",
        )
    if settings.weights is not None:
        check_present(settings.weights)
    # Each library costs seconds to import: only the one asked for is.
    if settings.kind == "open_clip":
        from cae2pipe.teachers.open_clip import load_open_clip

        return load_open_clip(settings, device)
    from cae2pipe.teachers.timm import load_timm

    return load_timm(settings, device)
