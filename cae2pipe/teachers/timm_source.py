"""Which model of timm the settings name: one of its registry, of a hub repository, or of a folder with its config.json.

Of a configuration only the architecture, its arguments and the normalisation and size of the input are used. Arguments
are plain values: none may name a file, a class or a function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.json_files import read_json
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.models.export import WEIGHTS
from cae2pipe.teachers.hub import FOLDER, HUB, OPEN_CLIP_FILES, TIMM_FILES, folder_of, hub_file, timm_name
from cae2pipe.teachers.licences import teacher_licence
from cae2pipe.teachers.protocol import channels

CONFIG = "config.json"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""timm's defaults."""

REFUSED_ARGS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "in_chans",
    "num_classes",
    "img_size",
)
"""Arguments of ``timm.create_model`` that would load something, or that other settings give."""

LAYER_ARGS = {"mlp_layer": ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked", "GatedMlp")}
"""Arguments that are classes of ``timm.layers``, and those that may be named."""


@dataclass(frozen=True)
class TimmSource:
    """``name``: an architecture of timm, with a tag if that is known. ``size``: its native input in pixels.
    ``classes``: outputs of its head. ``args``: arguments of its own, as given. ``assumed``: that the normalisation is
    that of other weights of the architecture, since nothing says which these have. ``tag``: of the weights, where a
    ``config.json`` gives it."""

    name: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)
    assumed: bool = False
    tag: str = ""


def source_of(settings: TeacherSettings) -> TimmSource:
    """The model that the settings name.

    Raises:
        TeacherError: a hub repository or folder without a usable configuration, or arguments that are refused.
    """
    from timm.models import get_pretrained_cfg

    check_args(settings.model_args, where="teacher.model_args")
    if settings.name.startswith(HUB):
        return described(hub_file(settings.name.removeprefix(HUB), [CONFIG], None), args=settings.model_args)
    settings = resolved(settings)
    name = timm_name(settings)
    # An architecture that timm does not have is refused when it is built.
    config = get_pretrained_cfg(name) if _known(name) else None
    if config is None:
        return TimmSource(name, 224, IMAGENET_MEAN, IMAGENET_STD, 0, settings.model_args, assumed=True)
    mean, std = channels(config.mean, name), channels(config.std, name, positive=True)
    known = TimmSource(
        name,
        whole_patches(name, config.input_size[-1], settings.model_args),
        mean,
        std,
        config.num_classes,
        settings.model_args,
    )
    if settings.weights is None or "." in name or settings.output == "raw":
        return known
    adjacent = settings.weights.parent / CONFIG
    if adjacent.is_file():
        try:
            found = described(adjacent)
        except TeacherError:  # of another library
            return replace(known, assumed=True)
        if found.name.partition(".")[0] == name:
            return replace(known, mean=found.mean, std=found.std, classes=found.classes, tag=found.tag)
    return replace(known, assumed=True)


def resolved(settings: TeacherSettings) -> TeacherSettings:
    """The settings, with a folder (``local-dir:PATH``) replaced by what its configuration says and its weights file,
    since fingerprints hold no paths.

    Raises:
        TeacherError: the folder has no usable configuration, or no weights.
    """
    if settings.kind != "timm" or not settings.name.startswith(FOLDER):
        return settings
    folder = folder_of(settings)
    assert folder is not None
    found = described(folder / CONFIG, args=settings.model_args)
    weights = settings.weights or next(
        (folder / name for name in (*TIMM_FILES, *OPEN_CLIP_FILES, WEIGHTS) if (folder / name).is_file()), None
    )
    if weights is None:
        raise TeacherError(
            "this folder has no weights", where=folder, fix=f"put {TIMM_FILES[0]} there, or give teacher.weights=FILE"
        )
    return settings.model_copy(
        update={
            "name": found.name,
            "pretrained": None,
            "weights": weights,
            "licence": teacher_licence(settings),
            "model_args": dict(found.args),
            "image_size": settings.image_size or found.size,
            "mean": settings.mean or found.mean,
            "std": settings.std or found.std,
        }
    )


def described(path: Path, *, args: Mapping[str, Any] = {}) -> TimmSource:
    """What a ``config.json`` of timm says. ``args`` override its arguments.

    Raises:
        TeacherError: it is missing, is not one of timm, or has values that are not plain.
    """
    if not path.is_file():
        raise TeacherError("no such file", where=path, fix="give the folder of a model of timm, with its config.json")
    config = read_json(path, fix="give the folder or repository of a model of timm", error=TeacherError)
    inner = config.get("pretrained_cfg", config) if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(inner, dict) or not isinstance(config.get("architecture"), str):
        raise TeacherError(
            "this configuration is not of a model of timm: it has no architecture",
            where=path,
            fix="use timm's edition of the model (hub repository timm/NAME)",
        )
    own = config.get("model_args", {})
    if not isinstance(own, dict):
        raise TeacherError("model_args is not a mapping", where=path, fix="correct the file")
    name = config["architecture"]
    kept = {key: value for key, value in own.items() if key not in ("img_size", "num_classes", "in_chans")}
    check_args(kept, where=path)
    side = _side(own, inner)
    size = side and whole_patches(name, side, kept)
    if size is None or not 16 <= size <= 4096 or own.get("in_chans", 3) != 3:
        raise TeacherError(
            "this model does not take square RGB images of 16 to 4096 pixels", where=path, fix="use another model"
        )
    classes = inner.get("num_classes", 0)
    return TimmSource(
        name,
        size,
        channels(inner.get("mean", IMAGENET_MEAN), path),
        channels(inner.get("std", IMAGENET_STD), path, positive=True),
        classes if isinstance(classes, int) else 0,
        {**kept, **args},
        tag=inner["tag"] if isinstance(inner.get("tag"), str) else "",
    )


def _side(own: Mapping[str, Any], inner: Mapping[str, Any]) -> int | None:
    """Side of the input in pixels that a configuration gives, or None if that is no square of three channels."""
    given = own.get("img_size")
    if given is None:
        shape = inner.get("input_size")
        shape = [3, 224, 224] if shape is None else shape
        if not isinstance(shape, list) or len(shape) != 3 or shape[0] != 3:
            return None
        given = shape[1:]
    sides = given if isinstance(given, list) else [given, given]
    if len(sides) != 2 or sides[0] != sides[1] or any(type(side) is not int for side in sides):
        return None
    return int(sides[0])


def check_args(args: Mapping[str, Any], where: object) -> None:
    """Raise TeacherError for arguments that load something or are not plain values."""
    for name, value in args.items():
        if name in REFUSED_ARGS:
            raise TeacherError(f"the argument {name} is not the model's", where=where, fix="omit it")
        if name in LAYER_ARGS and value not in LAYER_ARGS[name]:
            raise TeacherError(
                f"the argument {name} is {value!r}", where=where, fix=f"use one of {', '.join(LAYER_ARGS[name])}"
            )
        if not _plain(value):
            raise TeacherError(f"the argument {name} is not a plain value of usual size", where=where, fix="omit it")


def whole_patches(name: str, size: int, args: Mapping[str, Any] = {}) -> int:
    """A model's native size without the pixels that it ignores: 384 with patches of 14 is 378, the same grid."""
    named = re.search(r"patch(\d+)", name)
    patch = args.get("patch_size", int(named[1]) if named else 1)
    return size - size % patch if type(patch) is int and patch > 0 else size


def keywords(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as ``timm.create_model`` takes them."""
    from timm import layers

    return {
        name: getattr(layers, value) if name in LAYER_ARGS else tuple(value) if isinstance(value, list) else value
        for name, value in args.items()
    }


def _known(name: str) -> bool:
    import timm

    return name.partition(".")[0] in timm.list_models() and (
        "." not in name or name in timm.list_pretrained(f"{name.partition('.')[0]}.*")
    )


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 1024 and all(_plain(item) for item in value)
    if isinstance(value, int) and abs(value) > 65536:
        return False  # no model has so many layers or channels, and building it would take all memory
    return value is None or isinstance(value, str | int | float | bool)
