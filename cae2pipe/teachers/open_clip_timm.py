"""Visual towers of open_clip that are models of timm: SigLIP, PE, EVA-CLIP, MobileCLIP, ConvNeXt, ViTamin and others.

The latents are the trunk's tokens, or its last feature map, as if timm had loaded it. The summary is what
``encode_image`` gives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.teachers.hub import pretrained_file
from cae2pipe.teachers.open_clip_towers import assumed, build_tower, native_size
from cae2pipe.teachers.protocol import Outputs, Teacher, TeacherInfo
from cae2pipe.teachers.timm import model_outputs
from cae2pipe.teachers.timm_models import TimmFeatureMap, TimmViT, trains_class_token
from cae2pipe.teachers.timm_weights import draft, fitted
from cae2pipe.teachers.weights import load_strictly, read_weights, weights_digest


def load_trunk(
    settings: TeacherSettings,
    shape: dict[str, Any],
    device: torch.device,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Teacher:
    """The tower with its pretrained weights. ``shape``: as from ``tower_shape``.

    Raises:
        TeacherError: weights that are missing or do not fit, or a size that the trunk does not take.
    """
    sketch, convert = draft(
        lambda: _sized({**shape, "vision_cfg": shape["vision_cfg"] | {"timm_model_pretrained": True}})
    )
    settings = _staged(sketch, settings, shape)
    outputs = _outputs(sketch, settings, shape)
    tower = _sized({**shape, "vision_cfg": shape["vision_cfg"] | {"timm_model_pretrained": False}}).eval()
    path = settings.weights or pretrained_file(settings)
    state = read_weights(path)
    parts: dict[str, dict[str, Tensor]] = {"trunk": {}, "head": {}}
    unknown = []
    for name, tensor in state.items():
        part, _, rest = name.removeprefix("visual.").partition(".")
        if part in parts and name.startswith(("visual.", part)):
            parts[part][rest] = tensor.float() if tensor.is_floating_point() else tensor
        elif name.startswith("visual."):
            unknown.append(name)
    if parts["trunk"] and unknown:
        raise TeacherError(
            f"the weights do not fit the model: {len(unknown)} unexpected (first: {min(unknown)})",
            where=path,
            fix="check that teacher.name is the model of these weights",
        )
    tower.trunk.load_state_dict(fitted(tower.trunk, parts["trunk"] or state, convert, heads=set, where=path))
    load_strictly(tower.head, parts["head"] if parts["trunk"] else {}, where=path)
    tower = tower.to(device).requires_grad_(False)
    project = _projects(tower, settings)
    architecture: dict[str, Any] = {**shape, "stage": settings.stage}
    if not project and outputs.class_token:
        architecture["projected"] = False
    info = TeacherInfo(
        library="open_clip",
        name=settings.name,
        architecture=architecture,
        weights=weights_digest(tower),
        dim=outputs.dim,
        rows=outputs.rows,
        cols=outputs.cols,
        class_token=outputs.class_token,
        image_size=shape["vision_cfg"]["image_size"],
        mean=mean,
        std=std,
        precision=settings.precision,
        summary=outputs.summary,
        layers=tuple(settings.layers),
    )

    teacher: Teacher
    if settings.stage is not None:
        norm = settings.output == "own" and settings.stage == len(tower.trunk.feature_info) - 1
        teacher = TimmFeatureMap(
            tower.trunk, settings.stage, info, device=device, norm=norm, pool=partial(_embedding, tower)
        )

    else:
        teacher = TimmViT(
            tower.trunk,
            info,
            device,
            project=partial(_projected, tower) if project else None,
            pool=partial(_embedding, tower),
        )
    teacher.native, teacher.assumed = native_size(settings), assumed(settings)
    return teacher


def trunk_outputs(settings: TeacherSettings, shape: dict[str, Any]) -> Outputs:
    """Which latents the tower gives, without its weights."""
    shape = {**shape, "vision_cfg": shape["vision_cfg"] | {"timm_model_pretrained": False}}
    with torch.device("meta"):
        tower = _sized(shape).eval()
        return _outputs(tower, _staged(tower, settings, shape), shape)


def _sized(shape: dict[str, Any]) -> Any:
    """The tower, built for the input's size."""
    tower, config = build_tower(shape), shape["vision_cfg"]
    side = config["image_size"]
    try:
        if tower.trunk.pretrained_cfg["input_size"][-1] != side:
            tower.set_input_size(side)
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
        reraise_exhaustion(error)
        raise TeacherError(
            f"{config['timm_model_name']} does not run at {side} pixels: {error}",
            where="teacher.image_size",
            fix="omit it, for the model's own size",
        ) from None
    return tower


def _staged(tower: Any, settings: TeacherSettings, shape: dict[str, Any]) -> TeacherSettings:
    """The settings for the trunk: a pyramid gives its last feature map if none is named."""
    stage = settings.stage
    if stage is None and not hasattr(getattr(tower.trunk, "patch_embed", None), "grid_size"):
        stage = len(tower.trunk.feature_info) - 1
    if stage is None and not all(hasattr(tower.trunk, part) for part in ("num_prefix_tokens", "blocks", "norm")):
        stage = len(tower.trunk.feature_info) - 1
    return settings.model_copy(update={"stage": stage, "image_size": shape["vision_cfg"]["image_size"]})


def _outputs(tower: Any, settings: TeacherSettings, shape: dict[str, Any]) -> Outputs:
    # The trunk is asked for no summary and no projection, which are the tower's.
    trunk = {"kind": "timm", "name": shape["vision_cfg"]["timm_model_name"], "pretrained": None, "weights": None}
    bare = settings.model_copy(update={**trunk, "summary": False, "project": False})
    found = model_outputs(tower.trunk, bare)
    last = settings.stage is None or settings.stage == len(tower.trunk.feature_info) - 1
    wanted = settings.summary if settings.summary is not None else settings.output == "own" and not found.class_token
    if settings.summary and not last:
        raise TeacherError(
            f"feature map {settings.stage} is not the last, so that the model's own output is not computed",
            where="teacher.summary",
            fix="omit it, or teacher.stage",
        )
    dim = shape["embed_dim"] if _projects(tower, settings) else found.dim
    return found._replace(dim=dim, summary=shape["embed_dim"] if wanted and last else None)


def _projects(tower: Any, settings: TeacherSettings) -> bool:
    plain = settings.stage is None and trains_class_token(tower.trunk)
    if settings.project and not plain:
        raise TeacherError(
            f"the tower of {settings.name} pools its tokens before they are projected",
            where="teacher.project",
            fix="omit it; teacher.summary gives the projected embedding",
        )
    return plain and settings.project is not False


def _projected(tower: Any, tokens: Tensor) -> Tensor:
    projected: Tensor = tower.head(tower.trunk.head(tokens))
    return projected


def _embedding(tower: Any, x: Tensor) -> Tensor:
    embedding: Tensor = tower.head(tower.trunk.forward_head(x))
    return embedding
