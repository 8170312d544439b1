"""Repair: what ``verify`` finds damaged in a shard or target set is made again from its source, and nothing else."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.box import ShardsBox, TargetsBox, is_box, journal_entries, open_box
from cae2pipe.artifacts.lock import writing
from cae2pipe.config.base import build, recorded
from cae2pipe.config.extract import CodecSettings, ExtractSettings, ShardSettings
from cae2pipe.errors import BadInputError
from cae2pipe.inspection import Verification
from cae2pipe.runtime.progress import Report
from cae2pipe.shards.build import pack
from cae2pipe.shards.source import scan
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.recode import recode


def repair(
    found: Verification,
    report: Report,
    source: Path | None = None,
    labels: Path | None = None,
    weights: Path | None = None,
    device: str = "auto",
    workers: int = -1,
) -> None:
    """Make the damaged units of ``found`` again.

    Args:
        source: the images, for a shard set or one inside a target set; the shard set, for any other target set; the
            target set that a recoded one came from.
        labels: ground truth, as it was given to ``cae2pipe shard``.
        weights: the teacher's weights, where they came from a local file.

    Raises:
        BadInputError: the source is needed and was not given, or the folder is of another kind. MismatchError: the
            source is no longer the one that the set was made from. DamageError: the calibration cannot be restored.
    """
    for inner in found.inner:
        repair(inner, report, source, labels, weights, device, workers)
    if not found.bad:
        if found.kind in ("shards", "targets") and journal_entries(found.path):
            with writing(found.path):  # what a run that was killed had finished
                open_box(found.path).save()
        return
    report.log(f"making again in {found.path}: {', '.join(sorted(found.bad))}")
    if found.kind == "shards":
        repair_shards(found, report, _given(source, found.path, "the images"), labels, workers)
    elif found.kind == "targets" and "recoded" in TargetsBox.open(found.path).identity:
        original = _given(source, found.path, "the target set")
        codec = build(CodecSettings, TargetsBox.open(found.path).identity["settings"]["codec"], where=found.path)
        recode(original, found.path, codec, report, lossy_source=True, workers=workers, remake=found.bad)
    elif found.kind == "targets":
        inside = found.path / "shards"
        shards = inside if is_box(inside, "shards") else _given(source, found.path, "the shard set")
        repair_targets(found, report, shards, weights, device, workers)
    else:
        raise BadInputError(
            f"a {found.kind} folder cannot be repaired",
            where=found.path,
            fix="delete the files that are damaged, and run the command that made it as before",
        )


def repair_shards(found: Verification, report: Report, source: Path, labels: Path | None, workers: int) -> None:
    raw = ShardsBox.open(found.path).identity["settings"]
    settings = build(ShardSettings, {**raw, "speed": {"workers": workers}}, where=found.path)
    pack(scan(source, labels), found.path, settings, report, remake=found.bad)


def repair_targets(
    found: Verification, report: Report, source: Path, weights: Path | None, device: str, workers: int
) -> None:
    if not is_box(source, "shards"):
        raise BadInputError(
            "this is not the shard set that the targets were made from", where=source, fix="give it: --source FOLDER"
        )
    box = TargetsBox.open(found.path)
    raw = recorded(ExtractSettings, box.identity["settings"])
    raw["teacher"] = {**raw["teacher"], **({} if weights is None else {"weights": str(weights)})}
    views = max((unit["view"] + 1 for unit in box.units.values() if "view" in unit), default=1)
    wanted = box.facts.get("wanted")
    more = {"views": wanted["views"] if wanted else views, "speed": {"workers": workers, "device": device}}
    settings = build(ExtractSettings, {**raw, **more}, where=found.path)
    extract_targets(source, found.path, settings, report, remake=found.bad)


def _given(source: Path | None, path: Path, what: str) -> Path:
    if source is None:
        raise BadInputError(
            f"repairing this folder takes {what} that it was made from", where=path, fix="give it with --source PATH"
        )
    return source
