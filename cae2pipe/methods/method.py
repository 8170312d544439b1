"""Base class of pretraining methods: an encoder, and the modules that predict the teacher's latents from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from cae2pipe.config.pretrain import ModelSettings
from cae2pipe.errors import SettingsError
from cae2pipe.methods.losses import Prediction
from cae2pipe.models.encoder import build_encoder
from cae2pipe.models.layers import EPS, Stack, initialise
from cae2pipe.models.regressor import Regressor

T = TypeVar("T")


class Widths(int):
    """The width of the latents of several teachers side by side, the sum of ``parts``: what ``target_dim`` is if there
    are several. ``latent_head`` then gives each its own head."""

    parts: tuple[int, ...]

    def __new__(cls, parts: Sequence[int]) -> Widths:
        widths = super().__new__(cls, sum(parts))
        widths.parts = tuple(parts)
        return widths

    def __getnewargs__(self) -> tuple[tuple[int, ...]]:  # type: ignore[override]  # for copies
        return (self.parts,)


class Heads(nn.ModuleList):
    """A head for each teacher over the same tokens; gives their latents side by side."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([head(tokens) for head in self], dim=-1)


class Method(nn.Module, ABC):
    """A student in training. Only ``encoder`` is exported.

    Its losses are those of ``methods.losses``, selected and weighted by the run's settings. Its stacks of blocks are
    attributes of the method: each has its columns of ``drop``, in the order in which they were set, the encoder's
    first.

    Args:
        settings: shape of the student.

    ``masks``: masked patches are hidden from it. ``token_width``: width of the class token that it gives to
    ``summarise``; None if it does not predict summaries.
    """

    masks = True
    token_width: int | None = None

    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.encoder = build_encoder(settings)
        self.register_module("summary_head", None)

    def add_summary(self, settings: ModelSettings, width: int) -> None:
        """Add the head for summaries of ``width`` dimensions, of the same form as that for tokens.

        Raises:
            SettingsError: the method does not predict summaries.
        """
        if self.token_width is None:
            raise SettingsError(
                f"the method {type(self).__name__} does not predict the teacher's summary",
                where="loss.summary",
                fix="--set loss.summary=false, or give the method token_width and the summary of its Prediction",
            )
        self.summary_head = latent_head(settings, self.token_width, width)

    def summarise(self, class_token: Tensor) -> Tensor | None:
        """The summary (B, 1, W) predicted from the class token (B, 1, ``token_width``) as the head for tokens takes it;
        None if it is not a target."""
        if self.summary_head is None:
            return None
        summary: Tensor = self.summary_head(class_token)
        return summary

    @property
    def drop_columns(self) -> int:
        """Columns of drop path uniforms that ``forward`` takes, those of all stacks."""
        return sum(self._drop_columns())

    def split_drop(self, drop: Tensor | None) -> Sequence[Tensor | None]:
        """Each stack's columns of ``drop``, which is as in ``forward``. Without other stacks the encoder takes all."""
        columns = self._drop_columns()
        return [None] * len(columns) if drop is None else drop.split(columns, dim=1)

    def _drop_columns(self) -> list[int]:
        return [child.drop_columns for child in self.children() if isinstance(child, Stack)]

    def recompute(self, on: bool) -> None:
        """Set whether activations inside blocks are recomputed in the backward pass instead of kept."""
        for module in self.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = on  # type: ignore[assignment]

    @abstractmethod
    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor, drop: Tensor | None = None) -> Prediction:
        """Predicted latents.

        Args:
            pixels: (B, 3, H, W), normalised.
            visible, masked: (B, V) and (B, M) int64 patch indices.
            drop: (B, drop_columns) uniforms in [0, 1). Ignored in eval mode.
        """


def predictor_stack(kind: Callable[..., T], settings: ModelSettings, **options: bool) -> T:
    """A regressor or decoder of the shape that ``predictor_*`` describe, freshly initialised. ``options``: its other
    arguments."""
    return kind(
        width=settings.predictor_width,
        depth=settings.predictor_depth,
        heads=settings.predictor_heads,
        grid=settings.grid,
        layer_scale=settings.predictor_layer_scale,
        drop=settings.drop_path,
        **options,
    )


def regressor_stack(settings: ModelSettings) -> Regressor:
    """The regressor that the settings describe, freshly initialised."""
    return predictor_stack(
        Regressor,
        settings,
        final_norm=settings.predictor_norm,
        relative_positions=settings.relative_positions,
        rotary_positions=settings.rotary_positions,
    )


def latent_head(settings: ModelSettings, width: int, target_dim: int) -> nn.Sequential | Heads:
    """From tokens to latents: in the paper Linear, then LayerNorm; in the released code the reverse. Of several
    teachers (``Widths``): one such head for each."""
    if isinstance(target_dim, Widths):
        return Heads(latent_head(settings, width, part) for part in target_dim.parts)
    linear = nn.Linear(width, target_dim)
    if settings.head == "fc-ln":
        head = nn.Sequential(linear, nn.LayerNorm(target_dim, eps=EPS))
    else:
        head = nn.Sequential(nn.LayerNorm(width, eps=EPS), linear)
    head.apply(initialise)
    return head


def bridge(width: int, other: int) -> nn.Module:
    """Linear and LayerNorm between tokens of different widths; the identity if they are equal."""
    if width == other:
        return nn.Identity()
    between = nn.Sequential(nn.Linear(width, other), nn.LayerNorm(other, eps=EPS))
    between.apply(initialise)
    return between
