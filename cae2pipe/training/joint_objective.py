"""The loss of a student of several teachers: a head for each over the same tokens, the weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cae2pipe.config.pretrain import LossSettings, PretrainSettings
from cae2pipe.errors import SettingsError
from cae2pipe.loading.joining import labels_of, of_teacher, prefix_of
from cae2pipe.methods.losses import (
    LossTerms,
    Prediction,
    by_teacher,
    centred_cosine,
    combined,
    sample_losses,
    token_losses,
    weighted_mean,
)
from cae2pipe.models.export import student_normalise
from cae2pipe.targets.codecs import Codec
from cae2pipe.targets.groups import SUMMARY
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.objective import TERMS, Alignment
from cae2pipe.training.standardisation import Standardisation, standardises, stored_standardisation
from cae2pipe.training.target_spec import target_spec

OF_TEACHER = ("loss", "centred_cosine_visible", "centred_cosine_masked")
"""Terms of every teacher; in metrics ``loss/LABEL``, ..."""


class TeacherAlignment(Alignment):
    """The targets of one of several teachers.

    Args:
        width: D. pooled: width of the summary, None if it is no target. weight: of its loss. standard: of tokens and of
        summaries, if lengths count. Others as for ``Alignment``.
    """

    def __init__(
        self,
        loss: LossSettings,
        codec: Codec,
        *,
        mean: Tensor,
        class_token: bool,
        width: int,
        pooled: int | None,
        weight: float,
        summary: Codec | None = None,
        standard: Sequence[Standardisation | None] = (None, None),
    ):
        super().__init__(loss, codec, mean=mean, class_token=class_token, summary=summary)
        self.width, self.pooled, self.weight = width, pooled, weight
        for name, given in zip(("tokens", "summaries"), standard, strict=True):
            self.register_buffer(f"{name}_mean", None if given is None else given.mean, persistent=False)
            self.register_buffer(f"{name}_matrix", None if given is None else given.matrix, persistent=False)

    def target(self, latents: Mapping[str, Tensor]) -> Tensor:
        found = super().target(latents)
        return found if "decoded" in latents else self._standard(found, "tokens")

    def summary_target(self, latents: Mapping[str, Tensor]) -> Tensor | None:
        found = super().summary_target(latents)
        return found if found is None or "decoded_summary" in latents else self._standard(found, "summaries")

    def _standard(self, tokens: Tensor, name: str) -> Tensor:
        mean, matrix = getattr(self, f"{name}_mean"), getattr(self, f"{name}_matrix")
        return tokens if mean is None else (tokens - mean) @ matrix


class JointObjective(nn.Module):
    """A method with its loss on the latents of several teachers; otherwise as ``Objective``.

    The latents of the second teacher are named ``teacher-1/tokens``, ... The loss is the sum over teachers of
    weight x loss, each as ``alignment_loss`` of its own latents. With ``drop_teachers`` the teacher with the largest
    weighted loss on an image always counts, and each other one is dropped for this image with that probability
    (Sariyildiz et al., 2024, UNIC); the last columns of ``drop`` are its random numbers.

    Args:
        model: the method, whose heads are for ``teachers`` in their order. labels: of the teachers. bf16: as for
        ``Objective``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossSettings,
        teachers: Sequence[TeacherAlignment],
        *,
        labels: Sequence[str],
        bf16: bool,
    ):
        super().__init__()
        self.model, self.loss, self.bf16 = model, loss, bf16
        self.teachers = nn.ModuleList(teachers)
        self.labels = list(labels)
        self.terms = (*TERMS, *(f"{name}/{label}" for label in labels for name in OF_TEACHER))
        self.normalise = student_normalise()
        self.columns = len(teachers) if loss.drop_teachers else 0

    @property
    def parts(self) -> list[TeacherAlignment]:
        """The teachers."""
        return [cast(TeacherAlignment, each) for each in self.teachers]

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
        ``loss_masked`` are weighted sums over teachers of the losses that count, the cosines means over teachers. A
        teacher's own ``loss/LABEL`` is that of all images, without its weight. Arguments as for ``Objective``."""
        repeat = len(visible) // len(pixels)
        parts, drop, draws = self.parts, *self._split(drop)
        with torch.no_grad():
            own = [of_teacher(number, latents) for number in range(len(parts))]
            targets = [part.target(arrays) for part, arrays in zip(parts, own, strict=True)]
            summaries = [part.summary_target(arrays) for part, arrays in zip(parts, own, strict=True)]
            images = self.normalise(pixels)
            if repeat > 1:
                images, weights = (x.repeat_interleave(repeat, dim=0) for x in (images, weights))
                targets = [target.repeat_interleave(repeat, dim=0) for target in targets]
                summaries = [None if each is None else each.repeat_interleave(repeat, dim=0) for each in summaries]
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            whole = cast(Prediction, self.model(images, visible, masked, drop))
        predictions = by_teacher(whole, [part.width for part in parts], [part.pooled for part in parts])
        losses = [
            token_losses(
                prediction,
                target,
                visible,
                masked=masked,
                settings=self.loss,
                has_class_token=part.class_token,
                summary=summary,
            )
            for part, prediction, target, summary in zip(parts, predictions, targets, summaries, strict=True)
        ]
        with torch.no_grad():
            figures = []
            for part, prediction, target, own_losses in zip(parts, predictions, targets, losses, strict=True):
                mean_loss = combined(*own_losses, settings=self.loss, weights=weights, real=real).total
                cosines = centred_cosine(
                    prediction,
                    target,
                    visible,
                    masked=masked,
                    mean=part.mean,
                    weights=weights,
                    has_class_token=part.class_token,
                    real=real,
                )
                figures.append(torch.stack([mean_loss, *cosines]))
            kept = [weights] * len(parts) if draws is None else self._kept(losses, weights, draws)
        counted: list[LossTerms] = [
            combined(*each, settings=self.loss, weights=mask, real=real)
            for each, mask in zip(losses, kept, strict=True)
        ]

        def summed(values: list[Tensor]) -> Tensor:
            return torch.stack([part.weight * value for part, value in zip(parts, values, strict=True)]).sum()

        total = summed([each.total for each in counted])
        if whole.extra is not None and whole.masked is not None:
            total = total + weighted_mean(whole.extra, weights, real)
        means = [
            summed([each.visible.detach() for each in counted]),
            summed([each.masked.detach() for each in counted]),
        ]
        cosines_of_all = torch.stack(figures)[:, 1:].mean(dim=0)
        return torch.cat([torch.stack([total, *means]), cosines_of_all, torch.cat(figures)])

    def _split(self, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """The method's columns of uniforms, and those of the teachers."""
        return (drop[:, : -self.columns], drop[:, -self.columns :]) if self.columns else (drop, None)

    def _kept(self, losses: Sequence[tuple[Tensor, Tensor | None]], weights: Tensor, draws: Tensor) -> list[Tensor]:
        """The weights (B,) of samples for each teacher: zero where it is dropped."""
        own = [part.weight * sample_losses(*each, self.loss) for part, each in zip(self.parts, losses, strict=True)]
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


def make_joint_objective(
    model: nn.Module, sets: Sequence[TargetSet], settings: PretrainSettings, *, stores: Sequence[str] | None = None
) -> JointObjective:
    """The method with its loss on the latents of several sets. ``stores``: those that statistics for standardising are
    taken from (default: all)."""
    labels = labels_of(sets)
    weights = teacher_weights(settings.loss, labels, "loss.teachers")
    teachers = []
    for targets, weight in zip(sets, weights, strict=True):
        spec = target_spec(settings, targets)
        standard: tuple[Standardisation | None, Standardisation | None] = (None, None)
        if standardises(settings.loss):
            pooled = stored_standardisation(targets, SUMMARY, stores) if spec.summary else None
            standard = (stored_standardisation(targets, stores=stores), pooled)
        teachers.append(
            TeacherAlignment(
                settings.loss,
                targets.layout.codec,
                # Standardised targets have a mean of zero.
                mean=torch.zeros(spec.dim) if standard[0] else spec.mean,
                class_token=spec.class_token,
                width=spec.dim,
                pooled=spec.summary,
                weight=weight,
                summary=None if spec.summary is None else targets.groups[SUMMARY].layout.codec,
                standard=standard,
            )
        )
    return JointObjective(model, settings.loss, teachers, labels=labels, bf16=settings.precision == "bf16")
