"""Visual towers of open_clip: all tokens through the final norm and the projection."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.runtime.exhaustion import reraise_exhaustion
from cae2pipe.teachers.hub import pretrained_file
from cae2pipe.teachers.protocol import (
    Teacher,
    TeacherInfo,
    TeacherOutput,
    check_grid,
    class_attention,
    teacher_precision,
)
from cae2pipe.teachers.weights import load_strictly, read_weights, safetensors_metadata, weights_digest

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class OpenClipTeacher(Teacher):
    """A CLIP vision transformer. Its latents are in the space shared with text."""

    def __init__(self, tower: Any, info: TeacherInfo, device: torch.device):
        super().__init__(info, device)
        self.tower = tower.to(device).eval().requires_grad_(False)
        last = self.tower.transformer.resblocks[-1]
        if isinstance(getattr(last, "attn", None), nn.MultiheadAttention):
            last.register_forward_pre_hook(self._attend)

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        x = self.tower.transformer(self.tower._embeds(pixels))
        return TeacherOutput(self.tower.ln_post(x) @ self.tower.proj, self._attention)

    def _attend(self, block: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        if not block.attn.batch_first:
            x = x.transpose(0, 1)
        x = block.ln_1(x)
        width, heads = x.shape[-1], block.attn.num_heads
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        q = F.linear(x[:, :1], weight[:width], bias[:width])
        k = F.linear(x, weight[width : 2 * width], bias[width : 2 * width])
        q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
        self._attention = class_attention(q, k)


def load_open_clip(settings: TeacherSettings, device: torch.device) -> OpenClipTeacher:
    """The visual tower that the settings name.

    Raises:
        TeacherError: unknown model or tag, weights that are missing or do not fit, an activation that differs from the
            weights' training, or a tower that is not a plain vision transformer.
    """
    from open_clip import get_pretrained_cfg
    from open_clip.model import _build_vision_tower

    shape = tower_shape(settings)
    pretrained = get_pretrained_cfg(settings.name, settings.pretrained) if settings.pretrained else {}
    check_activation(settings, shape["quick_gelu"], pretrained)
    config = {**shape["vision_cfg"], "image_size": settings.image_size}
    check_tower(config, settings)
    path = settings.weights or pretrained_file(settings)
    try:
        tower = _build_vision_tower(shape["embed_dim"], config, quick_gelu=shape["quick_gelu"])
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        reraise_exhaustion(error)
        raise TeacherError(
            f"open_clip cannot build this tower: {error}",
            where="teacher.vision_cfg",
            fix="its keys must be fields of open_clip's CLIPVisionCfg; see open_clip's model configurations",
        ) from None
    state = visual_state(read_weights(path))
    grid = tower.grid_size
    if "positional_embedding" in state:
        state["positional_embedding"] = resize_positions(state["positional_embedding"], grid)
    load_strictly(tower, state, where=path)
    info = TeacherInfo(
        library="open_clip",
        name=settings.name,
        architecture={**shape, "vision_cfg": config},
        weights=weights_digest(tower),
        dim=shape["embed_dim"],
        rows=grid[0],
        cols=grid[1],
        class_token=True,
        image_size=settings.image_size,
        mean=settings.mean or tuple(pretrained.get("mean", CLIP_MEAN)),
        std=settings.std or tuple(pretrained.get("std", CLIP_STD)),
        precision=teacher_precision(settings.precision, device),
    )
    return OpenClipTeacher(tower, info, device)


def tower_shape(settings: TeacherSettings) -> dict[str, Any]:
    """``vision_cfg``, ``embed_dim`` and ``quick_gelu``: from the settings, else from the weights file's metadata, else
    from open_clip's model of that name."""
    from open_clip import get_model_config, list_models

    if settings.vision_cfg is not None:
        known = {**described_shape(settings.weights), "vision_cfg": settings.vision_cfg}
    elif settings.name in list_models():
        known = get_model_config(settings.name)
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
    quick_gelu = settings.quick_gelu if settings.quick_gelu is not None else bool(known.get("quick_gelu", False))
    return {"vision_cfg": dict(known["vision_cfg"]), "embed_dim": embed_dim, "quick_gelu": quick_gelu}


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
    except ValueError as error:
        raise TeacherError(
            f"the file's metadata does not describe a tower: {error}",
            where=weights,
            fix="give teacher.vision_cfg, teacher.embed_dim and teacher.quick_gelu, and a file without such metadata",
        ) from None


def check_activation(settings: TeacherSettings, quick_gelu: bool, pretrained: dict[str, Any]) -> None:
    """Refuse weights trained with another activation: open_clip only warns, and gives wrong features."""
    wanted = bool(pretrained.get("quick_gelu", False))
    if not pretrained or settings.quick_gelu is not None or wanted == quick_gelu:
        return
    plain = settings.name.removesuffix("-quickgelu")
    raise TeacherError(
        f"the weights {settings.pretrained!r} of {settings.name} were trained "
        f"{'with' if wanted else 'without'} QuickGELU, but this model is built {'without' if wanted else 'with'} it",
        where="teacher.name",
        fix=f"--set teacher.name={plain + '-quickgelu' if wanted else plain}, or force it with teacher.quick_gelu",
    )


def check_tower(config: dict[str, Any], settings: TeacherSettings) -> None:
    """Refuse towers whose tokens are not those of a plain vision transformer with a class token."""
    patch = config.get("patch_size", 16)
    reasons = {
        "it is a timm tower": bool(config.get("timm_model_name")),
        "it is a ResNet": isinstance(config.get("layers"), list | tuple),
        "it pools by attention": bool(config.get("attentional_pool")),
        "its final norm comes after pooling": bool(config.get("final_ln_after_pool")),
        "it pools the mean of its patches, so its class token is not trained": config.get("pool_type") == "avg",
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        raise TeacherError(
            f"the tower of {settings.name} does not give a class token and one token per patch: {reason}",
            where="teacher.name",
            fix="use a ViT tower; for a timm tower set teacher.kind=timm",
        )
    if not isinstance(patch, int) or patch < 1:
        raise TeacherError(
            f"the tower's patch_size is {patch!r}", where="teacher.vision_cfg", fix="give a number of pixels"
        )
    check_grid(settings.image_size, patch)


def visual_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The visual tower's part of a CLIP state, in float32."""
    prefix = "visual."
    visual = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor.float() for name, tensor in (visual or state).items()}


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1 + P, W) for another grid: bilinear, no antialiasing, the class position kept (released code)."""
    old = round((len(positions) - 1) ** 0.5)
    if (old, old) == tuple(grid) or old * old != len(positions) - 1:
        return positions
    patches = positions[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], patches.flatten(2).squeeze(0).T])
