"""Teacher presets: what they are, whether their weights are here, how to bring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cae2pipe.config.base import load, preset_names
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.lite0 import LITE0, lite0_file
from cae2pipe.teachers.weights import cached_file, hub_file


def list_presets() -> list[dict[str, Any]]:
    """A row a preset: name, library, model, input in pixels, shape of the latents, where the weights are.

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
                "weights": "at hand" if find(teacher) else "to be fetched",
            }
        )
    return rows


def fetch(name: str) -> list[Path]:
    """Bring a preset's weights into the local hub cache, where `extract-targets` finds them without a network.

    Raises:
        SettingsError: unknown preset. TeacherError: the weights cannot be had.
    """
    teacher = load(ExtractSettings, "extract", name).teacher
    if found := find(teacher):
        return [found]
    repository, names = hub_source(teacher)
    return [hub_file(repository, names, name)]


def preset_of(teacher: TeacherSettings) -> str | None:
    """The preset that names the same weights."""
    for name in preset_names("extract"):
        other = load(ExtractSettings, "extract", name).teacher
        if (other.kind, other.name, other.pretrained) == (teacher.kind, teacher.name, teacher.pretrained):
            return name
    return None


def latents_shape(teacher: TeacherSettings) -> tuple[int, int, int]:
    """Rows, columns and dimension of a teacher's latents, without its weights."""
    import torch

    if teacher.kind == "open_clip":
        from cae2pipe.teachers.open_clip import tower_shape

        shape = tower_shape(teacher)
        side = teacher.image_size // shape["vision_cfg"]["patch_size"]
        return side, side, shape["embed_dim"]
    from cae2pipe.teachers import timm

    with torch.device("meta"):
        dim, rows, cols, _ = timm.latents_shape(timm.build_model(teacher), teacher)
    return rows, cols, dim


def find(teacher: TeacherSettings) -> Path | None:
    """A teacher's weights on this machine."""
    if teacher.name == LITE0 and (path := lite0_file()):
        return path
    return cached_file(*hub_source(teacher))


def hub_source(teacher: TeacherSettings) -> tuple[str, list[str]]:
    """The hub repository of a teacher's weights and the file names to try."""
    files: tuple[str, ...]
    if teacher.kind == "open_clip":
        from open_clip import get_pretrained_cfg

        from cae2pipe.teachers import open_clip

        files = open_clip.HUB_FILES
        config = get_pretrained_cfg(teacher.name, teacher.pretrained or "")
        repository, _, name = str(config.get("hf_hub", "")).rpartition("/")
    else:
        from timm.models import get_pretrained_cfg as timm_config

        from cae2pipe.teachers import timm

        files = timm.HUB_FILES
        found = timm_config(teacher.name)
        repository, name = (found.hf_hub_id or "", found.hf_hub_filename or "") if found else ("", "")
    if not repository:
        raise TeacherError(f"no weights of {teacher.name} are known on the hub", fix="give teacher.weights=FILE")
    return repository, [name] if name else list(files)
