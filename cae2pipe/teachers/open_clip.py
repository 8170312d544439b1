"""Visual towers of open_clip's own: all tokens through the final norm and the projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.hub import pretrained_file
from cae2pipe.teachers.open_clip_towers import assumed, build_tower, is_resnet, native_size, normalisation, tower_shape
from cae2pipe.teachers.protocol import (
    Outputs,
    Teacher,
    TeacherInfo,
    TeacherOutput,
    check_grid,
    class_attention,
)
from cae2pipe.teachers.weights import load_strictly, read_weights, weights_digest


class OpenClipTeacher(Teacher):
    """A CLIP vision transformer: all tokens in the space shared with text, or, where its output does not read its class
    token, the patches after the final norm."""

    def __init__(self, tower: Any, info: TeacherInfo, device: torch.device, *, project: bool = True):
        super().__init__(info, device)
        self.tower = tower.to(device).eval().requires_grad_(False)
        self.project = project
        last = self.tower.transformer.resblocks[-1]
        if info.class_token and isinstance(getattr(last, "attn", None), nn.MultiheadAttention):
            last.register_forward_pre_hook(self._attend)
            self.attends = True

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        x = self.tower._embeds(pixels)
        layers = {}
        if self.info.layers:
            x, taps = self.tower.transformer.forward_intermediates(x, indices=[n - 1 for n in self.info.layers])
            layers = {block: self._chosen(tap) for block, tap in zip(self.info.layers, taps, strict=True)}
        else:
            x = self.tower.transformer(x)
        summary = pooled(self.tower, x) if self.info.summary else None
        return TeacherOutput(self._chosen(x), self._attention, summary, layers)

    def _chosen(self, x: Tensor) -> Tensor:
        tokens: Tensor = final_norm(self.tower)(x)
        tokens = tokens if self.info.class_token else tokens[:, 1:]
        return tokens @ self.tower.proj if self.project else tokens

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


class OpenClipResNet(Teacher):
    """The last feature map of CLIP's ResNet, before its attention pool."""

    def __init__(self, tower: Any, info: TeacherInfo, device: torch.device):
        super().__init__(info, device)
        self.tower = tower.to(device).eval().requires_grad_(False)

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        x = self.tower.stem(pixels)
        for part in (self.tower.layer1, self.tower.layer2, self.tower.layer3, self.tower.layer4):
            x = part(x)
        summary = self.tower.attnpool(x) if self.info.summary else None
        return TeacherOutput(x.flatten(2).transpose(1, 2), None, summary)


def pooled(tower: Any, x: Tensor) -> Tensor:
    """What ``encode_image`` gives, (B, W), from the last block's tokens."""
    own: Tensor = tower._pool(x)[0]
    return own if tower.proj is None else own @ tower.proj


def final_norm(tower: Any) -> Any:
    """The norm of tokens: the tower's own, or that of its attention pool."""
    return tower.ln_post if tower.attn_pool is None else tower.attn_pool.ln_k


def reads_class_token(tower: Any) -> bool:
    """Whether the tower's output is its class token."""
    return tower.attn_pool is None and tower.pool_type == "tok"


def load_open_clip(settings: TeacherSettings, device: torch.device) -> Teacher:
    """The visual tower that the settings name.

    Raises:
        TeacherError: unknown model or tag, weights that are missing or do not fit, or an activation that differs from
            the weights' training.
    """
    from open_clip import get_pretrained_cfg

    shape = tower_shape(settings)
    pretrained = get_pretrained_cfg(settings.name, settings.pretrained) if settings.pretrained else {}
    config = shape["vision_cfg"]
    mean, std = normalisation(settings, pretrained)
    if config.get("timm_model_name"):
        from cae2pipe.teachers.open_clip_timm import load_trunk

        return load_trunk(settings, shape, device, mean=mean, std=std)
    if settings.stage is not None:
        raise TeacherError("the tower has no feature maps to choose from", where="teacher.stage", fix="omit it")
    check_activation(settings, shape["quick_gelu"], pretrained)
    tower = build_tower(shape)
    outputs = tower_outputs(tower, settings, shape)
    path = settings.weights or pretrained_file(settings)
    state = visual_state(read_weights(path))
    if "positional_embedding" in state:
        state["positional_embedding"] = resize_positions(state["positional_embedding"], (outputs.rows, outputs.cols))
    if "attnpool.positional_embedding" in state:
        name = "attnpool.positional_embedding"
        state[name] = resize_positions(state[name], (outputs.rows, outputs.cols))
    # Counters of batches are not weights, and fp16 exports omit them.
    own = tower.state_dict()
    state |= {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in state}
    load_strictly(tower, state, where=path)
    architecture: dict[str, Any] = {**shape, "vision_cfg": config}
    project = projects_tokens(tower, settings)
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
        image_size=config["image_size"],
        mean=mean,
        std=std,
        precision=settings.precision,
        summary=outputs.summary,
        layers=tuple(settings.layers),
    )
    teacher: Teacher
    if is_resnet(config):
        teacher = OpenClipResNet(tower, info, device)
    else:
        teacher = OpenClipTeacher(tower, info, device, project=project)
    teacher.native, teacher.assumed = native_size(settings), assumed(settings)
    return teacher


def projects_tokens(tower: Any, settings: TeacherSettings) -> bool:
    """Whether the projection is applied to all tokens. Raises TeacherError if that is asked of a tower that pools."""
    plain = hasattr(tower, "transformer") and reads_class_token(tower) and tower.proj is not None
    if settings.project and not plain:
        raise TeacherError(
            f"the tower of {settings.name} pools its tokens before they are projected",
            where="teacher.project",
            fix="omit it; teacher.summary gives the projected embedding",
        )
    return plain and settings.project is not False


def tower_outputs(tower: Any, settings: TeacherSettings, shape: dict[str, Any]) -> Outputs:
    """Which latents a tower of open_clip's own gives. Raises TeacherError for layers that it does not have."""
    config, width = shape["vision_cfg"], shape["embed_dim"]
    blocks = 0 if is_resnet(config) else len(tower.transformer.resblocks)
    if wrong := [block for block in settings.layers if not 1 <= block <= blocks]:
        raise TeacherError(
            f"the tower of {settings.name} has no block {wrong[0]}" + (f", only 1 to {blocks}" if blocks else ""),
            where="teacher.layers",
            fix="change it",
        )
    if is_resnet(config):
        check_grid(config["image_size"], 32)
        side = config["image_size"] // 32
        wanted = settings.summary if settings.summary is not None else settings.output == "own"
        return Outputs(tower.layer4[-1].bn3.num_features, side, side, False, width if wanted else None)
    class_token = reads_class_token(tower)
    wanted = settings.summary if settings.summary is not None else settings.output == "own" and not class_token
    dim = width if projects_tokens(tower, settings) else tower.conv1.out_channels
    return Outputs(dim, tower.grid_size[0], tower.grid_size[1], class_token, width if wanted else None)


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


def latents_shape(settings: TeacherSettings) -> Outputs:
    """Which latents a tower gives, without its weights."""
    shape = tower_shape(settings)
    if shape["vision_cfg"].get("timm_model_name"):
        from cae2pipe.teachers.open_clip_timm import trunk_outputs

        return trunk_outputs(settings, shape)
    with torch.device("meta"):
        return tower_outputs(build_tower(shape), settings, shape)


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
