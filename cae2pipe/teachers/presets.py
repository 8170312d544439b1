"""Teacher presets: their list, whether their weights are cached, and downloading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.config.base import load, preset_names
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.teachers.hub import cached_file, hub_source, pretrained_file
from cae2pipe.teachers.lite0 import LITE0, lite0_file


def list_presets() -> list[dict[str, Any]]:
    """One row per preset: name, library, model, input in pixels, shape of the latents, whether the weights are cached.

    No network.
    """
    rows = []
    for name in preset_names("extract"):
        teacher = load(ExtractSettings, "extract", name).teacher
        rows.append(
            {
                "preset": name,
                "library": teacher.kind,
                "model": f"{teacher.name}{f' ({teacher.pretrained})' if teacher.pretrained else ''}",
                "input": f"{teacher.image_size} px",
                "latents": " x ".join(str(size) for size in latents_shape(teacher)),
                "weights": "cached" if find(teacher) else "not cached",
            }
        )
    return rows


def fetch(name: str) -> list[Path]:
    """Download a preset's weights into the local hub cache, where `extract-targets` finds them without a network.

    Raises:
        SettingsError: unknown preset. TeacherError: the weights cannot be downloaded.
    """
    teacher = load(ExtractSettings, "extract", name).teacher
    return [find(teacher) or pretrained_file(teacher)]


def latents_shape(teacher: TeacherSettings) -> tuple[int, int, int]:
    """Rows, columns and dimension of a teacher's latents, without loading its weights."""
    rows, cols, dim = model_shape(teacher)
    return (*(teacher.grid or (rows, cols)), dim)


def model_shape(teacher: TeacherSettings) -> tuple[int, int, int]:
    """The same with the model's own grid."""
    import torch

    if teacher.kind == "open_clip":
        from cae2pipe.teachers import open_clip

        outputs = open_clip.latents_shape(teacher)
        return outputs.rows, outputs.cols, outputs.dim
    from cae2pipe.teachers import timm

    with torch.device("meta"):
        dim, rows, cols, _ = timm.output_shape(timm.build_model(teacher), teacher)
    return rows, cols, dim


def find(teacher: TeacherSettings) -> Path | None:
    """The file of a teacher's weights on this machine, or None."""
    if teacher.name == LITE0 and (path := lite0_file()):
        return path
    return cached_file(*hub_source(teacher))
