"""Teacher presets: their list, whether their weights are here, and downloading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.artifacts.manifest_values import UNKNOWN
from cae2pipe.config.base import load, preset_names
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.teachers.hub import cached_file, hub_file, hub_source, pretrained_file, repository_of, spell
from cae2pipe.teachers.licences import teacher_licence
from cae2pipe.teachers.lite0 import LITE0, lite0_file
from cae2pipe.teachers.precision import published_precision
from cae2pipe.teachers.spelling import teacher_settings
from cae2pipe.teachers.weights import check_present


def list_presets() -> list[dict[str, Any]]:
    """One row per preset, in short words, so that rows fit 80 columns without the last: name, parameters, side of the
    input in pixels, rows x columns x dimension of the latents, precision on CUDA, licence, whether the weights are on
    this machine, and the model as `--teacher` takes it.

    No network.
    """
    rows = []
    for name in preset_names("extract"):
        teacher = load(ExtractSettings, "extract", name).teacher
        model = empty_model(teacher)
        rows.append(
            {
                "preset": name,
                "size": _millions(model),
                "input": str(teacher.image_size),
                "latents": "x".join(str(size) for size in shape_of(model, teacher)),
                "CUDA": published_precision(teacher) if teacher.precision == "auto" else teacher.precision,
                "licence": teacher_licence(teacher) or UNKNOWN,
                "here": "yes" if find(teacher) else "no",
                "model": spell(teacher),
            }
        )
    return rows


def fetch(name: str) -> list[Path]:
    """Download a teacher's weights into the local hub cache, where `extract-targets` finds them without a network.

    Args:
        name: a preset, or a model as `--teacher` takes it. Of a model of a hub repository its description comes too.

    Raises:
        SettingsError: unknown preset. TeacherError: unknown model, no such file, or the weights cannot be downloaded.
    """
    teacher = teacher_settings(name)
    if teacher.weights is not None:
        check_present(teacher.weights)
    repository = repository_of(teacher)
    described = [hub_file(repository, ["config.json"], None)] if repository else []
    return [*described, find(teacher) or pretrained_file(teacher)]


def latents_shape(teacher: TeacherSettings) -> tuple[int, int, int]:
    """Rows, columns and dimension of a teacher's latents, without loading its weights."""
    return shape_of(empty_model(teacher), teacher)


def empty_model(teacher: TeacherSettings) -> Any:
    """A teacher's model on the meta device, without weights."""
    import torch

    with torch.device("meta"):
        if teacher.kind == "open_clip":
            from cae2pipe.teachers.open_clip_towers import build_tower, tower_shape

            return build_tower(tower_shape(teacher))
        from cae2pipe.teachers import timm

        return timm.build_model(teacher)


def shape_of(model: Any, teacher: TeacherSettings) -> tuple[int, int, int]:
    """Rows, columns and dimension of the latents of an empty model."""
    rows, cols, dim = _own_shape(model, teacher)
    return (*(teacher.grid or (rows, cols)), dim)


def _own_shape(model: Any, teacher: TeacherSettings) -> tuple[int, int, int]:
    import torch

    if teacher.kind == "open_clip":
        from cae2pipe.teachers import open_clip

        outputs = open_clip.latents_shape(teacher)
        return outputs.rows, outputs.cols, outputs.dim
    from cae2pipe.teachers import timm

    with torch.device("meta"):
        dim, rows, cols, _ = timm.output_shape(model, teacher)
    return rows, cols, dim


def find(teacher: TeacherSettings) -> Path | None:
    """The file of a teacher's weights on this machine, or None."""
    if teacher.weights is not None:
        return teacher.weights if teacher.weights.is_file() else None
    if teacher.name == LITE0 and (path := lite0_file()):
        return path
    return cached_file(*hub_source(teacher))


def _millions(model: Any) -> str:
    return f"{sum(part.numel() for part in model.parameters()) / 1e6:.0f}M"
