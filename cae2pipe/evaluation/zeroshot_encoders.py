"""Encoders whose output for an image lies in the space of their teacher, where class embeddings are.

Of a run this is what its head makes of the class token; of a teacher its own output. Both are given as the class token
of a ``FrozenEncoder``, so that features are computed and stored as for other evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cae2pipe.artifacts.artifact import RunArtifact, is_artifact
from cae2pipe.artifacts.manifest_run import RunTeacher, SeveralTeacher
from cae2pipe.artifacts.manifest_values import TeacherEntry
from cae2pipe.config.pretrain import LossSettings
from cae2pipe.errors import DamageError, SettingsError
from cae2pipe.evaluation.encoders import FrozenEncoder, FrozenTeacher, Tokens, load_encoder
from cae2pipe.methods.losses import Prediction
from cae2pipe.methods.method import Method
from cae2pipe.models.export import WEIGHTS, student_normalise, timm_state
from cae2pipe.runtime.progress import Report
from cae2pipe.teachers.protocol import TeacherInfo, TeacherOutput
from cae2pipe.teachers.weights import weights_digest
from cae2pipe.training.student import load_method, refuse_standardised, run_settings

CHOOSE = "give --teacher"
"""How fixes say that a teacher of several is chosen."""


def predicted_output(prediction: Prediction) -> Tensor:
    """A student's prediction (B, D) of its teacher's output for the whole image: of the summary, or else of the class
    token."""
    return (prediction.class_token if prediction.summary is None else prediction.summary)[:, 0]


def own_output(output: TeacherOutput, info: TeacherInfo) -> Tensor | None:
    """A teacher's own output (B, D) for the whole image: its summary, or else its class token; None without both."""
    if output.summary is not None:
        return output.summary
    return output.tokens[:, 0] if info.class_token else None


class AlignedStudent(FrozenEncoder):
    """A student with the modules that predict its teacher's latents. All patches are visible to it.

    Args:
        exported: the run's encoder, whose size and identity it has. bf16: compute in bfloat16 (autocast). label: of the
        teacher, if there are several. widths: of the outputs of all of them, by label.
    """

    resizes = False
    has_class_token = trained_class_token = True

    def __init__(
        self,
        method: Method,
        exported: FrozenEncoder,
        dim: int,
        *,
        device: torch.device,
        bf16: bool,
        label: str | None = None,
        widths: Mapping[str, int] | None = None,
    ):
        self.label, self.widths = label, widths or {}
        self.method = method.to(device).eval().requires_grad_(False)
        self.identity = {**exported.identity, "method": weights_digest(method)}
        self.image_size, self.dim, self.bf16 = exported.image_size, dim, bf16
        self.normalise = student_normalise(device)

    @torch.inference_mode()
    def tokens(self, pixels: Tensor) -> Tokens:
        images = self.normalise(pixels)
        patches = (self.image_size // self.method.encoder.patch_size) ** 2
        visible = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            prediction: Prediction = self.method(images, visible, visible[:, :0])
        return Tokens(predicted_output(prediction).float(), prediction.visible.float())


class AlignedTeacher(FrozenEncoder):
    """A teacher, with its own output for the whole image as class token."""

    resizes = True
    has_class_token = trained_class_token = True
    label: str | None = None
    widths: Mapping[str, int] = {}

    def __init__(self, frozen: FrozenTeacher, spec: str):
        self.teacher = frozen.teacher
        self.identity, self.image_size = frozen.identity, frozen.image_size
        if self.teacher.info.summary is not None:
            # Otherwise its class token is that of a FrozenTeacher, and stored features serve both.
            self.identity = {**frozen.identity, "output": "own"}
        with torch.inference_mode():
            black = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=self.teacher.device)
            output = own_output(self.teacher(black), self.teacher.info)
        if output is None:
            raise SettingsError(
                "this teacher has no output for the whole image, only patches",
                where=spec,
                fix="use a teacher with a class token, such as teacher:clip-b16",
            )
        self.dim = output.shape[1]

    def tokens(self, pixels: Tensor) -> Tokens:
        output = self.teacher(pixels)
        patches = output.tokens[:, int(self.teacher.info.class_token) :]
        return Tokens(own_output(output, self.teacher.info), patches)


def load_aligned(
    spec: str, device: torch.device, *, precision: str, report: Report, teacher: str | None = None
) -> AlignedStudent | AlignedTeacher:
    """The encoder that ``spec`` names: a run, or a teacher in one of the forms of ``load_encoder``.

    Args:
        teacher: of a run of several teachers, the label of the one whose head is used; None: as ``chosen_head``.

    Raises:
        SettingsError: it predicts no teacher's output for an image, or not that of ``teacher``. Otherwise as
        ``load_encoder``.
    """
    folder = Path(spec).parent if Path(spec).name == WEIGHTS else Path(spec)
    if is_artifact(folder, "run"):
        facts, loss = RunArtifact.open(folder).facts, run_settings(folder).loss
        if "teachers" in facts:
            refuse_standardised(loss, spec)
        number = chosen_head(facts.get("teachers"), loss, teacher, spec)
        several = facts.get("teachers", [])
        refuse_unaligned(loss, several[number] if several else facts["teacher"], spec, several)
        return aligned_student(folder, device, precision=precision, report=report, number=number)
    if teacher is not None:
        raise one_teacher(spec)
    encoder = load_encoder(spec, 0, device, precision=precision)
    if not isinstance(encoder, FrozenTeacher):
        raise SettingsError(
            "zero-shot classification needs the head that predicts the teacher's latents, and only a run has it",
            where=spec,
            fix="give a run of pretrain, or teacher:PRESET or a target set for the teacher itself",
        )
    return AlignedTeacher(encoder, spec)


def summary_width(loss: LossSettings, teacher: TeacherEntry) -> int | None:
    """Width of a run's head for summaries, if it has one. ``teacher``: the entry in the run's manifest."""
    width = teacher.get("summary")
    return width if loss.aligns_summary(teacher["class_token"], stored=width is not None) else None


def one_teacher(spec: str) -> SettingsError:
    """The error for a teacher that is chosen where there is one."""
    return SettingsError("a teacher is chosen, and this is not a run of several", where=spec, fix="omit --teacher")


def chosen_head(
    teachers: Sequence[SeveralTeacher] | None,
    loss: LossSettings,
    wanted: str | None,
    spec: str,
    choose: str = CHOOSE,
) -> int:
    """Which of a run's teachers is used: the one with the label ``wanted``; by default the first that was trained with
    texts, else the first, of those whose output for the whole image is predicted. ``choose``: how one is chosen.

    Raises:
        SettingsError: none of them has the label.
    """
    if teachers is None:
        if wanted is not None:
            raise one_teacher(spec)
        return 0
    labels = [each["label"] for each in teachers]
    if wanted is None:
        able = [number for number, each in enumerate(teachers) if unaligned(loss, each) is None]
        return ([number for number in able if trained_with_text(teachers[number])] or able or [0])[0]
    if wanted not in labels:
        raise SettingsError(
            f"this run has no teacher {wanted!r}", where=spec, fix=f"{choose} one of {', '.join(labels)}"
        )
    return labels.index(wanted)


def trained_with_text(teacher: RunTeacher) -> bool:
    """Whether a teacher's output lies in one space with texts, as its entry tells: a model of open_clip, or a CLIP of
    another library."""
    return teacher.get("library") == "open_clip" or "clip" in teacher["name"].lower()


def output_width(loss: LossSettings, teacher: TeacherEntry) -> int:
    """Width of a teacher's output for the whole image, as a run predicts it."""
    return summary_width(loss, teacher) or teacher["dim"]


def refuse_unaligned(
    loss: LossSettings,
    teacher: TeacherEntry,
    where: object,
    several: Sequence[SeveralTeacher] = (),
    choose: str = CHOOSE,
) -> None:
    """Raise SettingsError if a student's class token is aligned with no output of its teacher for the whole image.

    ``several``: the run's teachers, from which another one can be chosen; ``choose``: how.
    """
    if reason := unaligned(loss, teacher):
        able = [each["label"] for each in several if unaligned(loss, each) is None]
        raise SettingsError(
            f"this run cannot classify zero-shot{' with this teacher' if able else ''}: {reason}",
            where=where,
            fix=f"{choose} {' or '.join(able)}"
            if able
            else "train with latents of a teacher with a class token or a summary, such as clip-b16, loss.visible "
            "above 0 and loss.class_token=visible",
        )


def unaligned(loss: LossSettings, teacher: TeacherEntry) -> str | None:
    """Why a student's class token is aligned with no output of a teacher; None if it is."""
    without = "loss.class_token is none" if loss.class_token == "none" else f"loss.{loss.class_token} is 0"
    reasons = {
        "it was trained on pixels, which have no class token": loss.target == "pixels",
        f"its class token had no loss ({without})": not loss.aligns_class_token
        and summary_width(loss, teacher) is None,
        "its class token was aligned with no class token and no summary": not teacher["class_token"]
        and summary_width(loss, teacher) is None,
    }
    return next((text for text, holds in reasons.items() if holds), None)


def aligned_student(
    folder: Path, device: torch.device, *, precision: str, report: Report, number: int = 0
) -> AlignedStudent:
    """The student of a finished run with its head, which is in its last checkpoint. ``number``: of several teachers.

    Raises:
        ManifestError: the run is not finished. DamageError: the checkpoint is missing, or not that of the encoder.
    """
    exported = load_encoder(str(folder), 0, device, precision=precision)
    facts, loss = RunArtifact.open(folder).facts, run_settings(folder).loss
    several = facts.get("teachers", [])
    teacher = several[number] if several else facts["teacher"]
    summary = summary_width(loss, teacher)
    method, _ = load_method(folder, teacher["dim"], report, summary=summary, teacher=number)
    own, written = timm_state(method.encoder), load_file(folder / WEIGHTS)
    if own.keys() != written.keys() or not all(torch.equal(own[name], written[name]) for name in own):
        raise DamageError(
            "the newest checkpoint is not the one that the encoder was exported from, so its head is another's",
            where=folder,
            fix="restore the run's last checkpoint from a copy, or train the run again",
        )
    return AlignedStudent(
        method,
        exported,
        output_width(loss, teacher),
        device=device,
        bf16=precision == "bf16",
        label=several[number]["label"] if several else None,
        widths={each["label"]: output_width(loss, each) for each in several if unaligned(loss, each) is None},
    )
