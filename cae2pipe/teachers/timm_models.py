"""Models of timm as teachers: tokens after the final norm, or a feature map, and the model's own pooled output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.teachers.protocol import Teacher, TeacherInfo, TeacherOutput, class_attention

Pool = Callable[[Tensor], Tensor]
"""From what a model's forward_features gives to its output for the whole image (B, W)."""


class TimmViT(Teacher):
    """A vision transformer: class token and patches; distillation and register tokens are dropped.

    ``project``: applied to every token after the final norm, or None. ``pool``: gives the summary, if it is wanted.
    """

    def __init__(
        self,
        model: Any,
        info: TeacherInfo,
        device: torch.device,
        *,
        project: Callable[[Tensor], Tensor] | None = None,
        pool: Pool | None = None,
    ):
        super().__init__(info, device)
        self.model = model.to(device).eval().requires_grad_(False)
        self.project = project
        self.pool = pool if info.summary else None
        last = model.blocks[-1]
        if info.class_token and _is_plain(last):
            last.register_forward_pre_hook(self._attend)
            self.attends = True

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        x, taps = token_features(self.model, pixels, self.info.layers)
        summary = self.pool(x) if self.pool else None
        layers = {block: self._chosen(tap) for block, tap in zip(self.info.layers, taps, strict=True)}
        return TeacherOutput(self._chosen(x), self._attention, summary, layers)

    def _chosen(self, x: Tensor) -> Tensor:
        if isinstance(self.model.norm, nn.Identity):
            # Models that pool the patches' mean apply their final norm after pooling.
            x = self.model.fc_norm(x)
        patches = x[:, self.model.num_prefix_tokens :]
        tokens = torch.cat([x[:, :1], patches], dim=1) if self.info.class_token else patches
        return self.project(tokens) if self.project else tokens

    def _attend(self, block: Any, arguments: tuple[Tensor, ...]) -> None:
        x, attn = block.norm1(arguments[0]), block.attn
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        prefix = self.model.num_prefix_tokens
        attention = class_attention(attn.q_norm(q[:, :, :1]), attn.k_norm(k))
        self._attention = attention[:, prefix - 1 :]


class TimmFeatureMap(Teacher):
    """One feature map of a model that has no token per patch. There is no class token.

    ``norm``: the map is the last, and passes through the model's final norm. ``pool``: as for `TimmViT`.
    """

    def __init__(
        self,
        model: Any,
        stage: int,
        info: TeacherInfo,
        *,
        device: torch.device,
        norm: bool = False,
        pool: Pool | None = None,
    ):
        super().__init__(info, device)
        self.model = model.to(device).eval().requires_grad_(False)
        self.stage = stage
        self.norm = norm
        self.pool = pool if info.summary else None

    def tokens(self, pixels: Tensor) -> TeacherOutput:
        if self.pool is None and not self.norm:
            return TeacherOutput(_rows(feature_map(self.model, pixels, self.stage)), None)
        x, tokens = last_map(self.model, pixels, norm=self.norm)
        return TeacherOutput(_rows(tokens), None, self.pool(x) if self.pool else None)


def feature_map(model: Any, pixels: Tensor, stage: int) -> Tensor:
    """Feature map ``stage`` (B, C, h, w), counted as timm's ``features_only`` does, without a final norm."""
    maps: list[Tensor] = model.forward_intermediates(
        pixels, indices=[stage], stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps[0]


def last_map(model: Any, pixels: Tensor, *, norm: bool) -> tuple[Tensor, Tensor]:
    """What the model's forward_features gives, and its last feature map (B, C, h, w), after its final norm if wanted.

    Models that pool before their norm, such as ConvNeXt, apply it to each position here, as DINOv3 does.
    """
    own = norm and not _refuses_norm(model)
    x, maps = model.forward_intermediates(pixels, indices=[len(model.feature_info) - 1], output_fmt="NCHW", norm=own)
    features: Tensor = maps[0]
    if norm:
        features = _finished(x, features)
        for after in (getattr(getattr(model, "head", None), "norm", None), _pooled_norm(model)):
            if isinstance(after, nn.LayerNorm) and after.normalized_shape == (features.shape[1],):
                given = features.permute(0, 2, 3, 1)
                given = F.layer_norm(given, after.normalized_shape, after.weight, after.bias, after.eps)
                features = given.permute(0, 3, 1, 2)
    return x, features


def _finished(x: Any, features: Tensor) -> Tensor:
    """The last map as forward_features ends in it: timm's forward_intermediates omits the final activation of NFNet and
    Xception, and gives EfficientViM's map another layer's norm."""
    if isinstance(x, Tensor) and x.ndim == 4 and x.shape == features.shape:
        return x
    if isinstance(x, list) and x[-1].shape == features.flatten(2).shape:
        final: Tensor = x[-1].reshape(features.shape)
        return final
    return features


def token_features(model: Any, pixels: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """What the model's forward_features gives (B, T, W), and the same after each of the given blocks, from 1."""
    if not layers:
        return model.forward_features(pixels), []
    x, taps = model.forward_intermediates(
        pixels,
        indices=[block - 1 for block in layers],
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
    )
    # With prefix tokens each tap is a pair.
    return x, [torch.cat([tap[1], tap[0]], dim=1) if isinstance(tap, tuple) else tap for tap in taps]


def trains_class_token(model: Any) -> bool:
    """Whether a model's own output reads its class token. Where the patches' mean is pooled before the final norm, or
    all tokens by attention, the class token is a by-product. DINOv3's is trained, though timm pools the mean."""
    if getattr(model, "cls_token", None) is None:
        return False
    pool = getattr(model, "global_pool", "token")
    return pool == "token" or (pool == "avg" and not isinstance(model.norm, nn.Identity))


def own_output(model: Any, x: Tensor, *, projected: bool) -> Tensor:
    """The model's own output for the whole image (B, W): pooled, normed, projected if its head is a projection."""
    pooled: Tensor
    if trains_class_token(model) and model.global_pool != "token":
        pooled = x[:, 0]
    else:
        pooled = model.forward_head(x) if projected else model.forward_head(x, pre_logits=True)
    return pooled.flatten(1) if pooled.ndim == 4 and pooled.shape[-2:] == (1, 1) else pooled


def _rows(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)


def _refuses_norm(model: Any) -> bool:
    """Whether a model's forward_intermediates asserts that no norm is asked for. Its norm comes after pooling."""
    from timm.models.hiera import Hiera
    from timm.models.hieradet_sam2 import HieraDet

    return isinstance(model, Hiera | HieraDet)


def _pooled_norm(model: Any) -> nn.Module | None:
    """The norm of a ViT that applies its final norm after pooling."""
    return getattr(model, "fc_norm", None) if isinstance(getattr(model, "norm", None), nn.Identity) else None


def _is_plain(block: Any) -> bool:
    """Whether ``TimmViT._attend`` recomputes a block's attention correctly. Other blocks have biases, rotary positions
    or norms in other positions under the same names."""
    from timm.models.vision_transformer import Attention, Block

    return type(block) is Block and type(block.attn) is Attention
