"""The calibration of a set during extraction: made once, by the first process that needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.lock import can_lock, holding
from cae2pipe.artifacts.manifest_targets import group_entries
from cae2pipe.artifacts.provenance import provenance
from cae2pipe.artifacts.work_share import WHOLE, WorkShare
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import BadInputError
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.calibration_sample import run_sample
from cae2pipe.targets.codecs import unit_tokens
from cae2pipe.targets.groups import group_tokens, groups_in, make_groups
from cae2pipe.targets.manifest_facts import codec_facts, expect_bytes, teacher_facts
from cae2pipe.targets.stored_calibration import Fitted, is_calibrated, store_calibration
from cae2pipe.targets.stored_source import Source
from cae2pipe.teachers.protocol import Teacher, TeacherOutput


def ensure_calibration(
    artifact: TargetsArtifact,
    shards: Source,
    teacher: Teacher,
    *,
    settings: ExtractSettings,
    workers: int,
    part: WorkShare,
    report: Report,
) -> TargetsArtifact:
    """The artifact with its calibration. The first process makes or restores it; all others wait.

    Raises:
        BadInputError: several parts start without a calibration on storage without locks, where two could make it.
        DamageError: the lost calibration cannot be reproduced.
    """
    if is_calibrated(artifact):
        return artifact
    if part != WHOLE and not can_lock(artifact.root):
        raise BadInputError(
            "this storage cannot create a file only if it is absent, so parts cannot agree on who calibrates",
            where=artifact.root,
            fix="run the same command once with --calibrate-only and without --part, then start the parts",
        )
    facts = artifact.facts
    with holding(artifact.root, "calibration", lambda: report.waits_for("another process to calibrate")):
        artifact = TargetsArtifact.open(artifact.root)
        artifact.facts |= facts
        if not is_calibrated(artifact):
            make_calibration(artifact, shards, teacher, settings=settings, workers=workers, report=report)
    return artifact


def make_calibration(
    artifact: TargetsArtifact,
    shards: Source,
    teacher: Teacher,
    *,
    settings: ExtractSettings,
    workers: int,
    report: Report,
) -> None:
    """Fit mean, basis and step on view 0 of the first images; shards are shuffled, so these are a fair sample.

    Raises:
        DamageError: the set had a calibration, and it cannot be reproduced.
    """
    codec = settings.codec
    report.phase(f"calibrating the {codec.name} codec on up to {codec.calibration} images")
    outputs, jpegs = run_sample(shards, teacher, settings, images=codec.calibration, workers=workers, report=report)
    report.phase(f"fitting the {codec.name} codec")

    def facts(fitted: Mapping[str, Fitted]) -> dict[str, Any]:
        of_teacher = teacher_facts(teacher, outputs[0])
        entries = group_entries(of_teacher, codec.name, codec.level)
        groups = make_groups(entries, {name: calibration for name, (calibration, _) in fitted.items()})
        of_codec = codec_facts(groups, {name: fidelity for name, (_, fidelity) in fitted.items()})
        expect_bytes(of_codec, groups, outputs, pixel_bytes=sum(map(len, jpegs)))
        return {"teacher": of_teacher, "codec": of_codec, "groups": entries, **provenance(teacher.device)}

    store_calibration(artifact, codec, unit_samples(outputs), facts=facts, report=report)


def unit_samples(outputs: Sequence[TeacherOutput]) -> Iterator[tuple[str, Tensor]]:
    """The unit tokens of each group, one after the other: they take as much memory as the outputs themselves."""
    for group in groups_in(outputs[0]):
        yield group, torch.cat([unit_tokens(group_tokens(output, group))[0] for output in outputs])
