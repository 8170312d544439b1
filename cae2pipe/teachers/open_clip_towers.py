"""Which visual tower open_clip builds for a teacher's settings, and how its input is normalised."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.json_files import read_json
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.teachers.protocol import channels, check_grid
from cae2pipe.teachers.timm_source import whole_patches
from cae2pipe.teachers.weights import safetensors_metadata

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def tower_shape(settings: TeacherSettings) -> dict[str, Any]:
    """``vision_cfg`` with the size of the input, ``embed_dim`` and ``quick_gelu``: from the settings, else from the
    weights file's metadata, else from open_clip's model of that name."""
    from open_clip import get_model_config, list_models

    if settings.vision_cfg is not None:
        known = {**described_shape(settings.weights), "vision_cfg": settings.vision_cfg}
    elif settings.name in list_models():
        known = get_model_config(settings.name)
        if settings.pretrained is None and settings.output != "raw" and settings.weights is not None:
            told = described_shape(settings.weights)
            known = known | {name: told[name] for name in ("quick_gelu",) if name in told}
    else:
        known = described_shape(settings.weights)
    if not isinstance(known.get("vision_cfg"), dict):
        nearest = difflib.get_close_matches(settings.name, list_models(), n=1)
        raise TeacherError(
            f"open_clip has no model {settings.name!r}" + (f" (nearest: {nearest[0]!r})" if nearest else ""),
            where="teacher.name",
            fix="give one of open_clip.list_models(), or teacher.vision_cfg and teacher.embed_dim",
        )
    embed_dim = settings.embed_dim or known.get("embed_dim")
    if embed_dim is None:
        raise TeacherError("the projection's width is unknown", where="teacher.embed_dim", fix="set it")
    quick_gelu = bool(known.get("quick_gelu", False)) if settings.quick_gelu is None else settings.quick_gelu
    if settings.quick_gelu is None and settings.pretrained is None:
        quick_gelu = bool(described_nearby(settings).get("model_cfg", {}).get("quick_gelu", quick_gelu))
    config = dict(known["vision_cfg"])
    native = whole_patches(str(config.get("timm_model_name", "")), config.get("image_size", 224))
    config["image_size"] = settings.image_size or native
    return {"vision_cfg": config, "embed_dim": embed_dim, "quick_gelu": quick_gelu}


def native_size(settings: TeacherSettings) -> int:
    """Side of the input in pixels that the named tower was trained for."""
    size = tower_shape(settings.model_copy(update={"image_size": None}))["vision_cfg"]["image_size"]
    return int(size)


def assumed(settings: TeacherSettings) -> str:
    """What nothing says about the weights: neither a tag, nor a configuration next to them, nor the settings."""
    if settings.pretrained or described_nearby(settings) or described_shape(settings.weights):
        return ""
    open_points = [] if settings.mean and settings.std else ["mean and std"]
    open_points += ["activation"] if settings.quick_gelu is None else []
    return " and ".join(open_points)


def described_nearby(settings: TeacherSettings) -> dict[str, Any]:
    """``preprocess_cfg`` and ``model_cfg`` of the configuration that open_clip writes next to a weights file; empty if
    there is none. Sets of before this was read do without it."""
    if settings.weights is None or settings.output == "raw":
        return {}
    path = settings.weights.parent / "open_clip_config.json"
    if not path.is_file():
        return {}
    content = read_json(path, fix="replace it, or move the weights to another folder", error=TeacherError)
    parts = content if isinstance(content, dict) else {}
    return {name: parts[name] for name in ("preprocess_cfg", "model_cfg") if isinstance(parts.get(name), dict)}


def described_shape(weights: Path | None) -> dict[str, Any]:
    """``vision_cfg`` (JSON), ``embed_dim`` and ``quick_gelu`` from a safetensors file's metadata."""
    metadata = safetensors_metadata(weights) if weights else {}
    readers: dict[str, Callable[[str], Any]] = {
        "vision_cfg": json.loads,
        "embed_dim": int,
        "quick_gelu": lambda text: text.lower() == "true",
    }
    try:
        return {name: read(metadata[name]) for name, read in readers.items() if name in metadata}
    except (ValueError, RecursionError) as error:
        raise TeacherError(
            f"the file's metadata does not describe a tower: {error}",
            where=weights,
            fix="give teacher.vision_cfg, teacher.embed_dim and teacher.quick_gelu, and a file without such metadata",
        ) from None


def normalisation(
    settings: TeacherSettings, pretrained: dict[str, Any]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the input: the settings', else the tag's, else those on which all tags of the
    model agree, else CLIP's."""
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    if not pretrained and (described := described_nearby(settings).get("preprocess_cfg")):
        mean, std = described.get("mean", CLIP_MEAN), described.get("std", CLIP_STD)
        return (
            settings.mean or channels(mean, settings.weights),
            settings.std or channels(std, settings.weights, positive=True),
        )
    known = [pretrained] if pretrained else []
    known = known or [get_pretrained_cfg(settings.name, tag) for tag in list_pretrained_tags_by_model(settings.name)]
    found = {(tuple(one.get("mean", CLIP_MEAN)), tuple(one.get("std", CLIP_STD))) for one in known}
    mean, std = found.pop() if len(found) == 1 else (CLIP_MEAN, CLIP_STD)
    return settings.mean or mean, settings.std or std


def build_tower(shape: dict[str, Any]) -> Any:
    """The visual tower with random weights. Raises TeacherError if open_clip cannot build it."""
    from open_clip.model import _build_vision_tower

    config = shape["vision_cfg"]
    patch = config.get("patch_size", 16)
    if not is_resnet(config) and not config.get("timm_model_name"):
        if not isinstance(patch, int) or patch < 1:
            raise TeacherError(
                f"the tower's patch_size is {patch!r}", where="teacher.vision_cfg", fix="give a number of pixels"
            )
        check_grid(config["image_size"], patch)
    try:
        return _build_vision_tower(shape["embed_dim"], config, quick_gelu=shape["quick_gelu"])
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        reraise_exhaustion(error)
        raise TeacherError(
            f"open_clip cannot build this tower: {error}",
            where="teacher.vision_cfg",
            fix="its keys must be fields of open_clip's CLIPVisionCfg; see open_clip's model configurations",
        ) from None


def is_resnet(config: dict[str, Any]) -> bool:
    """Whether a ``vision_cfg`` is that of CLIP's ResNet."""
    return isinstance(config.get("layers"), list | tuple)
