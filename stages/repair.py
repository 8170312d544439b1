"""Repair: what ``verify`` finds damaged in a shard or target set is made again from its source, and nothing else."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.artifact import ShardsArtifact, TargetsArtifact, is_artifact, journal_entries, open_artifact
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.verification import Verification
from cae2pipe.config.base import build, recorded
from cae2pipe.config.extract import CodecSettings, ExtractSettings, ShardSettings
from cae2pipe.errors import BadInputError
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.build import pack
from cae2pipe.shards.source import scan
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.recode import recode
from cae2pipe.targets.paths import SHARDS_FOLDER


def repair(
    result: Verification,
    report: Report,
    *,
    source: Path | None = None,
    labels: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
    workers: int = -1,
) -> None:
    """Make the damaged units of ``result`` again.

    Args:
        source: the images, for a shard set or one inside a target set; the shard set, for any other target set; the
            target set that a recoded one came from.
        labels: ground truth, as it was given to ``cae2pipe shard``.
        weights: the teacher's weights, where they came from a local file.

    Raises:
        BadInputError: the source is needed and was not given, or the folder is of another kind. MismatchError: the
            source is no longer the one that the set was made from. DamageError: the calibration cannot be restored.
    """
    for inner in result.inner:
        repair(inner, report, source=source, labels=labels, weights=weights, device=device, workers=workers)
    if not result.bad:
        if result.kind in ("shards", "targets") and journal_entries(result.path):
            with writing(result.path):  # what a run that was killed had finished
                open_artifact(result.path).save()
        return
    report.log(f"making again in {result.path}: {', '.join(sorted(result.bad))}")
    if result.kind == "shards":
        images = _given(source, result.path, "the images")
        repair_shards(result, report, images, labels=labels, workers=workers)
    elif result.kind == "targets" and "recoded" in TargetsArtifact.open(result.path).identity:
        original = _given(source, result.path, "the target set")
        codec = build(CodecSettings, TargetsArtifact.open(result.path).identity["settings"]["codec"], where=result.path)
        recode(original, result.path, codec, report=report, lossy_source=True, workers=workers, remake=result.bad)
    elif result.kind == "targets":
        inside = result.path / SHARDS_FOLDER
        shards = inside if is_artifact(inside, "shards") else _given(source, result.path, "the shard set")
        repair_targets(result, report, shards, weights=weights, device=device, workers=workers)
    else:
        raise BadInputError(
            f"a {result.kind} folder cannot be repaired",
            where=result.path,
            fix="delete the files that are damaged, and run the command that made it as before",
        )


def repair_shards(result: Verification, report: Report, source: Path, *, labels: Path | None, workers: int) -> None:
    raw = ShardsArtifact.open(result.path).identity["settings"]
    settings = build(ShardSettings, {**raw, "speed": {"workers": workers}}, where=result.path)
    pack(scan(source, labels), result.path, settings, report=report, remake=result.bad)


def repair_targets(
    result: Verification, report: Report, source: Path, *, weights: Path | None, device: str, workers: int
) -> None:
    if not is_artifact(source, "shards"):
        raise BadInputError(
            "this is not the shard set that the targets were made from", where=source, fix="give it: --source FOLDER"
        )
    artifact = TargetsArtifact.open(result.path)
    raw = recorded(ExtractSettings, artifact.identity["settings"])
    raw["teacher"] = {**raw["teacher"], **({} if weights is None else {"weights": str(weights)})}
    views = max((unit["view"] + 1 for unit in artifact.units.values() if "view" in unit), default=1)
    asked = artifact.facts.get("wanted")
    more = {"views": asked["views"] if asked else views, "speed": {"workers": workers, "device": device}}
    settings = build(ExtractSettings, {**raw, **more}, where=result.path)
    extract_targets(source, result.path, settings, report=report, remake=result.bad)


def _given(source: Path | None, path: Path, what: str) -> Path:
    if source is None:
        raise BadInputError(
            f"repairing this folder takes {what} that it was made from", where=path, fix="give it with --source PATH"
        )
    return source
