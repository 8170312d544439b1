"""From views and latents to the loss, on the device: the module that is compiled and wrapped by DDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cae2pipe.config.pretrain import LossSettings, PretrainSettings
from cae2pipe.errors import SettingsError
from cae2pipe.loading.joining import labels_of, of_teacher, prefix_of
from cae2pipe.methods.losses import (
    Distances,
    Prediction,
    alignment_loss,
    by_teacher,
    centred_cosine,
    combined,
    sample_losses,
    weighted_mean,
)
from cae2pipe.models.export import student_normalise
from cae2pipe.runtime.world import World
from cae2pipe.targets.groups import SUMMARY
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.alignment import Alignment
from cae2pipe.training.compilation import compile_in_place
from cae2pipe.training.parallel import blocks_of
from cae2pipe.training.standardisation import Standardisation, standardises, stored_standardisation
from cae2pipe.training.target_spec import target_spec

TERMS = ("loss", "loss_visible", "loss_masked", "centred_cosine_visible", "centred_cosine_masked")
"""Outputs of an objective, in order. Only the first has a gradient."""
OF_TEACHER = ("loss", "centred_cosine_visible", "centred_cosine_masked")
"""Further ones of each of several teachers: ``loss/LABEL``, ..."""


class Objective(nn.Module):
    """A method with its loss on the latents of its teachers: the sum over them of weight x loss, each as
    ``alignment_loss`` of its own latents.

    With ``drop_teachers`` the teacher with the largest weighted loss on an image always counts, and each other one is
    dropped for this image with that probability (Sariyildiz et al., 2024, UNIC); the last columns of ``drop`` are its
    random numbers.

    Args:
        model: the method, whose heads are for ``teachers`` in their order.
        labels: of the teachers, if there are several.
        bf16: compute the model in bfloat16 (autocast); the loss stays in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossSettings,
        teachers: Sequence[Alignment],
        *,
        labels: Sequence[str] = (),
        bf16: bool,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.bf16 = model, loss, bf16
        self.teachers = nn.ModuleList(teachers)
        self.labels = tuple(labels)
        self.terms = (*TERMS, *(f"{name}/{label}" for label in labels for name in OF_TEACHER))
        self.columns = len(teachers) if loss.drop_teachers else 0
        self.normalise = student_normalise()

    @property
    def parts(self) -> list[Alignment]:
        """The teachers."""
        return [cast(Alignment, each) for each in self.teachers]

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
        """The terms of ``terms``, float32: this part's share of each mean over the global batch. ``loss_visible`` and
        ``loss_masked`` are weighted sums over teachers of the losses that count, the cosines means over teachers. Of
        several teachers, ``loss/LABEL`` is that of all images, without its weight.

        Args:
            pixels: (B, 3, H, W) uint8.
            latents: the codec's arrays over B views, with ``norms`` (B, T) if lengths count; or ``raw`` (B, T, D), the
            output of a teacher; or ``decoded``, final targets. Summaries: the arrays of their group (``summary/...``),
            ``raw_summary`` or ``decoded_summary`` (B, 1, W). Those of the second teacher are ``teacher-1/...``.
            visible, masked, drop, weights: as in ``Batch``, with r masks per view. real: scalar, the number of images
            in the global batch that are not padding, counted once per mask.
        """
        repeat = len(visible) // len(pixels)
        parts, drop, draws = self.parts, *self._split(drop)
        with torch.no_grad():
            own = [of_teacher(number, latents) for number in range(len(parts))]
            targets = [part.target(arrays) for part, arrays in zip(parts, own, strict=True)]
            summaries = [part.summary_target(arrays) for part, arrays in zip(parts, own, strict=True)]
            images = self.normalise(pixels)
            if repeat > 1:  # repeat(1) would copy too: over a gigabyte of pixels at batch 2048
                images, weights = (x.repeat_interleave(repeat, dim=0) for x in (images, weights))
                targets = [target.repeat_interleave(repeat, dim=0) for target in targets]
                summaries = [None if each is None else each.repeat_interleave(repeat, dim=0) for each in summaries]
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            whole = cast(Prediction, self.model(images, visible, masked, drop))
        predictions = by_teacher(whole, [part.width for part in parts], [part.pooled for part in parts])
        losses = [
            alignment_loss(
                prediction,
                target,
                visible,
                masked=masked,
                settings=self.loss,
                weights=weights,
                has_class_token=part.class_token,
                summary=summary,
                real=real,
            )
            for part, prediction, target, summary in zip(parts, predictions, targets, summaries, strict=True)
        ]
        with torch.no_grad():
            cosines = [
                centred_cosine(
                    prediction,
                    target,
                    visible,
                    masked=masked,
                    mean=part.mean,
                    weights=weights,
                    has_class_token=part.class_token,
                    real=real,
                )
                for part, prediction, target in zip(parts, predictions, targets, strict=True)
            ]
            figures = [torch.stack([each.total.detach(), *own]) for each, own in zip(losses, cosines, strict=True)]
        if draws is not None:
            distances = [each.distances for each in losses]
            losses = [
                combined(*each, settings=self.loss, weights=kept, real=real)
                for each, kept in zip(distances, self._kept(distances, weights, draws), strict=True)
            ]

        def summed(values: list[Tensor]) -> Tensor:
            return torch.stack([part.weight * value for part, value in zip(parts, values, strict=True)]).sum()

        total = summed([each.total for each in losses])
        if whole.extra is not None and whole.masked is not None:
            total = total + weighted_mean(whole.extra, weights, real)
        seen, hidden = summed([each.visible.detach() for each in losses]), summed([x.masked.detach() for x in losses])
        mean_cosines = torch.stack(figures)[:, 1:].mean(dim=0)
        return torch.cat([torch.stack([total, seen, hidden]), mean_cosines, *(figures if self.labels else ())])

    def _split(self, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """The method's columns of uniforms, and those of the teachers."""
        return (drop[:, : -self.columns], drop[:, -self.columns :]) if self.columns else (drop, None)

    def _kept(self, distances: Sequence[Distances], weights: Tensor, draws: Tensor) -> list[Tensor]:
        """The weights (B,) of samples for each teacher: zero where it is dropped."""
        own = [part.weight * sample_losses(*each, self.loss) for part, each in zip(self.parts, distances, strict=True)]
        largest = torch.stack(own, dim=1).argmax(dim=1, keepdim=True)
        keep = (draws >= self.loss.drop_teachers).scatter(1, largest, True)
        return [torch.where(keep[:, number], weights, 0) for number in range(keep.shape[1])]

    def decoded_targets(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The final targets of all teachers, in the form in which ``forward`` takes them as latents."""
        return {
            prefix_of(number) + name: tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part.decoded_targets(of_teacher(number, latents)).items()
        }

    def place(self, device: torch.device) -> None:
        """Copy the constants of the codecs to a device."""
        for part in self.parts:
            part.place(device)


def teacher_weights(loss: LossSettings, labels: Sequence[str], where: object) -> list[float]:
    """The weights of teachers' losses. Raises SettingsError for a weight of a teacher that is not there."""
    given = loss.teachers or {}
    if unknown := sorted(given.keys() - set(labels)):
        raise SettingsError(
            f"loss.teachers gives a weight to {unknown[0]!r}, which is no teacher of these target sets",
            where=str(where),
            fix=f"use {', '.join(labels)}",
        )
    return [given.get(label, 1.0) for label in labels]


def make_objective(
    model: nn.Module,
    targets: TargetSet,
    settings: PretrainSettings,
    *,
    others: Sequence[TargetSet] = (),
    stores: Sequence[str] | None = None,
    read: Sequence[TargetSet] = (),
) -> Objective:
    """The method with its loss on a set's latents, or on the pixels of its views.

    Args:
        others: sets of further teachers. stores: those that statistics for standardising are taken from (default: all).
        read: sets of the same teachers whose latents are given instead; means and standardisation stay.
    """
    sets = (targets, *others)
    labels = labels_of(sets) if others else []
    weights = teacher_weights(settings.loss, labels, "loss.teachers") if others else [1.0]
    teachers = [
        make_alignment(each, settings, read=given, weight=weight, stores=stores, several=bool(others))
        for each, given, weight in zip(sets, read or sets, weights, strict=True)
    ]
    return Objective(model, settings.loss, teachers, labels=labels, bf16=settings.precision == "bf16")


def make_alignment(
    targets: TargetSet,
    settings: PretrainSettings,
    *,
    read: TargetSet,
    weight: float,
    stores: Sequence[str] | None,
    several: bool,
) -> Alignment:
    """The targets of one teacher, perhaps of several. Arguments as for ``make_objective``."""
    spec = target_spec(settings, targets)
    standard: tuple[Standardisation | None, Standardisation | None] = (None, None)
    if several and standardises(settings.loss):
        pooled = stored_standardisation(targets, SUMMARY, stores) if spec.summary else None
        standard = (stored_standardisation(targets, stores=stores), pooled)
    return Alignment(
        settings.loss,
        read.layout.codec,
        # Standardised targets have a mean of zero.
        mean=torch.zeros(spec.dim) if standard[0] else spec.mean,
        class_token=spec.class_token,
        summary=None if spec.summary is None else read.groups[SUMMARY].layout.codec,
        pooled=spec.summary,
        weight=weight,
        standard=standard,
    )


def compile_objective(objective: Objective, world: World, backend: object = "inductor") -> None:
    """Compile in place: one graph, or block by block if weights are sharded, as each is gathered separately."""
    # Copying the codec's constants inside the graph would make the second step compile again.
    objective.place(world.device)
    compile_in_place(blocks_of(objective) if world.parallel == "fsdp" else [objective], backend)
