"""From settings to a teacher."""

from __future__ import annotations

import torch

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.teachers.protocol import Teacher


def load_teacher(settings: TeacherSettings, device: torch.device) -> Teacher:
    """The teacher that the settings describe, frozen, on the device.

    Raises:
        TeacherError: unknown model, or weights that are missing, unsafe or do not fit.
    """
    # Each library costs seconds to import: only the one asked for is.
    if settings.kind == "open_clip":
        from cae2pipe.teachers.open_clip import load_open_clip

        return load_open_clip(settings, device)
    from cae2pipe.teachers.timm import load_timm

    return load_timm(settings, device)
