"""The calibration of a set during extraction: made once, by the first process that needs it."""

from __future__ import annotations

from typing import Any

import torch

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.lock import can_lock, holding
from cae2pipe.artifacts.manifest_targets import group_entry
from cae2pipe.artifacts.provenance import provenance
from cae2pipe.artifacts.work_share import WHOLE, WorkShare
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import BadInputError
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.targets.calibration import Calibration, Fidelity
from cae2pipe.targets.calibration_sample import run_sample
from cae2pipe.targets.codecs import unit_tokens
from cae2pipe.targets.manifest_facts import codec_facts, teacher_facts
from cae2pipe.targets.store_layout import PATCHES
from cae2pipe.targets.stored_calibration import is_calibrated, store_calibration
from cae2pipe.targets.target_set import make_layout
from cae2pipe.teachers.protocol import Teacher


def ensure_calibration(
    artifact: TargetsArtifact,
    shards: ShardSet,
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
    shards: ShardSet,
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

    def facts(calibration: Calibration, fidelity: Fidelity) -> dict[str, Any]:
        of_teacher = teacher_facts(teacher, outputs[0])
        group = group_entry(of_teacher, codec.name, codec.level)
        layout = make_layout(group, calibration)
        of_codec = codec_facts(outputs, layout, calibration, fidelity=fidelity, pixel_bytes=sum(map(len, jpegs)))
        return {
            "teacher": of_teacher,
            "codec": of_codec,
            "groups": {PATCHES: group},
            **provenance(teacher.device),
        }

    unit = torch.cat([unit_tokens(output.tokens)[0] for output in outputs])
    store_calibration(artifact, codec, unit, facts=facts, report=report)
