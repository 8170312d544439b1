"""Repair: rebuild from the source exactly those units of a shard or target set that ``verify`` finds damaged."""

from __future__ import annotations

from pathlib import Path

from cae2pipe.artifacts.artifact import ShardsArtifact, TargetsArtifact, is_artifact, journal_entries, open_artifact
from cae2pipe.artifacts.atomic import find_debris, remove_debris
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.storage import is_local
from cae2pipe.artifacts.verification import Verification
from cae2pipe.config.base import build, recorded
from cae2pipe.config.extract import CodecSettings, ExtractSettings, ShardSettings
from cae2pipe.errors import BadInputError
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.build import pack
from cae2pipe.shards.source import scan
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.recode import recode
from cae2pipe.targets.paths import SHARDS_FOLDER
from cae2pipe.targets.shared_pixels import parent_set


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
    """Rebuild the damaged units of ``result``.

    Args:
        source: for a shard set, also one inside a target set, the images; for other target sets the shard set or the
            target set that they were made from; for a recoded target set the original target set.
        labels: the ground truth that was given to ``cae2pipe shard``.
        weights: the teacher's weights, if they came from a local file.

    Raises:
        BadInputError: the source is needed but was not given, or folders of this kind cannot be repaired.
        MismatchError: the source has changed since the set was made. DamageError: the calibration cannot be restored.
    """
    shards = [inner for inner in result.inner if inner.kind == "shards"]
    for inner in shards:
        repair(inner, report, source=source, labels=labels, weights=weights, device=device, workers=workers)
    _repair_own(result, report, source, labels=labels, weights=weights, device=device, workers=workers)
    # Their pixels are those of this set.
    for inner in result.inner:
        if inner not in shards:
            repair(inner, report, weights=weights, device=device, workers=workers)


def _repair_own(
    result: Verification,
    report: Report,
    source: Path | None,
    *,
    labels: Path | None,
    weights: Path | None,
    device: str,
    workers: int,
) -> None:
    if not result.bad:
        if result.kind in ("shards", "targets"):
            tidy(result.path)
        return
    count = counted(len(result.bad), "damaged unit")
    report.log(f"rebuilding {count} in {result.path}: {', '.join(sorted(result.bad))}")
    if result.kind == "shards":
        images = _given(source, result.path, "the images")
        repair_shards(result, report, images, labels=labels, workers=workers)
    elif result.kind == "targets" and "recoded" in TargetsArtifact.open(result.path).identity:
        original = _given(source, result.path, "the target set")
        codec = build(CodecSettings, TargetsArtifact.open(result.path).identity["settings"]["codec"], where=result.path)
        recode(original, result.path, codec, report=report, lossy_source=True, workers=workers, remake=result.bad)
    elif result.kind == "targets":
        known = [parent_set(result.path), result.path / SHARDS_FOLDER, None if source else result.pixels]
        made_from = next((path for path in known if path and is_artifact(path)), None)
        made_from = made_from or _given(source, result.path, "the shard set")
        repair_targets(result, report, made_from, weights=weights, device=device, workers=workers)
    else:
        raise BadInputError(
            f"a {result.kind} folder cannot be repaired",
            where=result.path,
            fix="delete the damaged files, and rerun the command that made the folder",
        )


def tidy(root: Path) -> None:
    """Keep what a killed process had finished in an intact set, and remove what it had not."""
    local = is_local(root)
    if journal_entries(root) or (local and find_debris(root)):
        with writing(root):
            if local:
                remove_debris(root)
            open_artifact(root).save()


def repair_shards(result: Verification, report: Report, source: Path, *, labels: Path | None, workers: int) -> None:
    raw = ShardsArtifact.open(result.path).identity["settings"]
    settings = build(ShardSettings, {**raw, "speed": {"workers": workers}}, where=result.path)
    pack(scan(source, labels), result.path, settings, report=report, remake=result.bad)


def repair_targets(
    result: Verification, report: Report, source: Path, *, weights: Path | None, device: str, workers: int
) -> None:
    if not (is_artifact(source, "shards") or is_artifact(source, "targets")):
        raise BadInputError(
            "this is neither the shard set nor the target set that the targets were made from",
            where=source,
            fix="use the original one: --source FOLDER",
        )
    artifact = TargetsArtifact.open(result.path)
    raw = recorded(ExtractSettings, artifact.identity["settings"])
    raw["teacher"] = {**raw["teacher"], **({} if weights is None else {"weights": str(weights)})}
    views = max((unit["view"] + 1 for unit in artifact.units.values() if "view" in unit), default=1)
    asked = artifact.facts.get("wanted")
    more = {"views": asked["views"] if asked else views, "speed": {"workers": workers, "device": device}}
    settings = build(ExtractSettings, {**raw, **more}, where=result.path)
    referring = is_artifact(source, "targets") and TargetsArtifact.open(source).by_reference
    pixels = result.pixels if referring else None
    extract_targets(source, result.path, settings, report=report, remake=result.bad, pixels=pixels)


def _given(source: Path | None, path: Path, what: str) -> Path:
    if source is None:
        raise BadInputError(
            f"repairing this folder needs {what} that it was made from", where=path, fix="add --source PATH"
        )
    return source
