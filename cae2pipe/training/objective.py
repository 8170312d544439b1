"""From views and stored latents to the loss, on the device: the module that is compiled and wrapped by DDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae2pipe.config.pretrain import LossSettings, PretrainSettings
from cae2pipe.methods.losses import Prediction, alignment_loss, centred_cosine
from cae2pipe.models.export import student_normalise
from cae2pipe.runtime.world import World
from cae2pipe.targets.codecs import Codec
from cae2pipe.targets.groups import SUMMARY
from cae2pipe.targets.store_layout import arrays_of
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.compilation import compile_in_place
from cae2pipe.training.parallel import blocks_of
from cae2pipe.training.target_spec import target_spec

TERMS = ("loss", "loss_visible", "loss_masked", "centred_cosine_visible", "centred_cosine_masked")
"""Outputs of an objective, in order. Only the first has a gradient."""


class Alignment(nn.Module):
    """The targets of one teacher, from its stored latents.

    Args:
        loss: distance, reduction and weights.
        codec: the codec of the stored latents.
        mean: the targets' mean unit token (D,).
        class_token: whether there is a target for the class token.
        summary: the codec of stored summaries, if they are targets.
    """

    def __init__(
        self,
        loss: LossSettings,
        codec: Codec,
        *,
        mean: Tensor,
        class_token: bool,
        summary: Codec | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.codec = codec
        self.class_token = class_token
        self.summary = summary
        self.mean: Tensor
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32), persistent=False)

    def target(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents (B, T, D) float32: of unit length, or of original length if ``norms`` are given."""
        if "decoded" in latents:
            return latents["decoded"]
        if "raw" in latents:
            return self._of_teacher(latents["raw"])
        return decoded(self.codec, latents)

    def summary_target(self, latents: Mapping[str, Tensor]) -> Tensor | None:
        """Summaries (B, 1, W) float32 as ``target`` gives latents; None if they are no targets."""
        if self.summary is None:
            return None
        if "decoded_summary" in latents:
            return latents["decoded_summary"]
        if "raw_summary" in latents:
            return self._of_teacher(latents["raw_summary"])
        return decoded(self.summary, arrays_of(SUMMARY, latents))

    def _of_teacher(self, raw: Tensor) -> Tensor:
        return F.normalize(raw, dim=-1) if self.loss.kind == "cosine" else raw

    def decoded_targets(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The final targets, in the form in which ``forward`` takes them as latents."""
        summary = self.summary_target(latents)
        return {"decoded": self.target(latents), **({} if summary is None else {"decoded_summary": summary})}

    def place(self, device: torch.device) -> None:
        """Copy the constants of the codecs to a device."""
        self.codec.place(device)
        if self.summary is not None:
            self.summary.place(device)


class Objective(Alignment):
    """A method with its loss.

    Args:
        model: the method.
        bf16: compute the model in bfloat16 (autocast); the loss stays in float32.
        Others as for ``Alignment``.
    """

    terms = TERMS

    def __init__(
        self,
        model: nn.Module,
        loss: LossSettings,
        codec: Codec,
        *,
        mean: Tensor,
        class_token: bool,
        summary: Codec | None = None,
        bf16: bool,
    ) -> None:
        super().__init__(loss, codec, mean=mean, class_token=class_token, summary=summary)
        self.model = model
        self.bf16 = bf16
        self.normalise = student_normalise()

    def forward(
        self,
        pixels: Tensor,
        latents: Mapping[str, Tensor],
        visible: Tensor,
        masked: Tensor,
        drop: Tensor,
        weights: Tensor,
        real: Tensor,
    ) -> Tensor:
        """The terms of ``TERMS``, float32 (5,): this part's share of each mean over the global batch.

        Args:
            pixels: (B, 3, H, W) uint8.
            latents: the codec's arrays over B views, with ``norms`` (B, T) if lengths count; or ``raw`` (B, T, D), the
            output of a teacher; or ``decoded``, final targets. Summaries: the arrays of their group (``summary/...``),
            ``raw_summary`` or ``decoded_summary`` (B, 1, W). visible, masked, drop, weights: as in ``Batch``, with r
            masks per view. real: scalar, the number of images in the global batch that are not padding, counted once
            per mask.
        """
        repeat = len(visible) // len(pixels)
        with torch.no_grad():
            target, summary = self.target(latents), self.summary_target(latents)
            images = self.normalise(pixels)
            if repeat > 1:  # repeat(1) would copy too: over a gigabyte of pixels at batch 2048
                target, images, weights = (x.repeat_interleave(repeat, dim=0) for x in (target, images, weights))
                summary = None if summary is None else summary.repeat_interleave(repeat, dim=0)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            prediction = cast(Prediction, self.model(images, visible, masked, drop))
        loss = alignment_loss(
            prediction,
            target,
            visible,
            masked=masked,
            settings=self.loss,
            weights=weights,
            has_class_token=self.class_token,
            summary=summary,
            real=real,
        )
        with torch.no_grad():
            cosines = centred_cosine(
                prediction,
                target,
                visible,
                masked=masked,
                mean=self.mean,
                weights=weights,
                has_class_token=self.class_token,
                real=real,
            )
        return torch.stack([loss.total, loss.visible.detach(), loss.masked.detach(), *cosines])


def decoded(codec: Codec, arrays: Mapping[str, Tensor]) -> Tensor:
    """A group's tokens (B, T, D) float32: of unit length, or of original length if there are ``norms``."""
    target = codec.decode(arrays)
    return target * arrays["norms"].float().unsqueeze(-1) if "norms" in arrays else target


def make_objective(model: nn.Module, targets: TargetSet, settings: PretrainSettings) -> Objective:
    """The method with its loss on a set's latents, or on the pixels of its views."""
    spec, bf16 = target_spec(settings, targets), settings.precision == "bf16"
    return Objective(
        model,
        settings.loss,
        targets.layout.codec,
        mean=spec.mean,
        class_token=spec.class_token,
        summary=None if spec.summary is None else targets.groups[SUMMARY].layout.codec,
        bf16=bf16,
    )


def compile_objective(objective: Any, world: World, backend: Any = "inductor") -> None:
    """Compile in place: one graph, or block by block if weights are sharded, as each is gathered separately."""
    # Copying the codec's constants inside the graph would make the second step compile again.
    objective.place(world.device)
    compile_in_place(blocks_of(objective) if world.parallel == "fsdp" else [objective], backend)
