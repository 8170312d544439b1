"""Stage 1: from images to views and the teacher's latents.

Read from top to bottom: take this process's part, open the source, load the teacher, calibrate the codec once. Then,
shard by shard, render the missing views, run the teacher on the pixels that loaders of the set will see, encode and
write. A finished (view, shard) pair is never made again. The same inputs give the same bytes, however the work is
split.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.artifact import MANIFEST, TargetsArtifact, is_artifact, refuse_foreign
from cae2pipe.artifacts.atomic import remove_debris
from cae2pipe.artifacts.difference import Difference
from cae2pipe.artifacts.lock import holding, writing
from cae2pipe.artifacts.manifest import REFERRING
from cae2pipe.artifacts.manifest_values import Licences
from cae2pipe.artifacts.provenance import tell_changes
from cae2pipe.artifacts.staging import remove_stages
from cae2pipe.artifacts.storage import file_size, is_local, is_shared
from cae2pipe.artifacts.work_share import WHOLE, WorkShare
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.extract import ExtractSettings, ShardSettings, TeacherSettings, as_begun
from cae2pipe.config.resume_options import completed_as, resuming
from cae2pipe.errors import BadInputError, MismatchError, SettingsError, SourceError, command
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.processes import worker_count
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.runtime.wording import counted
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.targets.calibrating import ensure_calibration, make_calibration
from cae2pipe.targets.extraction import make_views
from cae2pipe.targets.images import make_images
from cae2pipe.targets.missing import MissingUnits, check_space, missing_units, wanted
from cae2pipe.targets.paths import CODEC, SHARDS_FOLDER
from cae2pipe.targets.shared_pixels import is_added, parent_set, refers_to_nothing
from cae2pipe.targets.stored_calibration import is_calibrated
from cae2pipe.targets.stored_source import Source, StoredSource, as_source
from cae2pipe.targets.target_set import TargetSet, recorded_view
from cae2pipe.teachers.labels import recorded_teacher, spelled, spelling
from cae2pipe.teachers.licences import teacher_licence
from cae2pipe.teachers.load import LoadedTeacher, load_teacher, named_without_paths
from cae2pipe.teachers.resuming import canonical, same_model, teacher_as_begun
from cae2pipe.teachers.telling import teacher_lines


def extract_targets(
    source: Path,
    out: Path,
    settings: ExtractSettings,
    *,
    report: Report,
    part: WorkShare = WHOLE,
    calibrate_only: bool = False,
    remake: Collection[str] | None = None,
    by_reference: bool = False,
    pixels: Path | None = None,
    loaded: LoadedTeacher | None = None,
) -> TargetsArtifact:
    """Make, or resume making, the target set ``out`` from a shard set, a folder of images or another target set.

    Args:
        source: a shard set, a folder of images, or a target set, whose views are used. ``out``: the target set's
            folder. Both may be URLs of remote storage.
        part: this process's share of the shards; torchrun's ranks divide it further.
        calibrate_only: stop once the set has its calibration.
        remake: make exactly these units again, even if they look complete.
        by_reference: list the files with pixels of the source, a target set, but do not hold them. A set that has been
            begun stays as it is.
        pixels: the folder with the pixels of a source that is by reference itself.
        loaded: the teacher, if it has been loaded.

    Raises:
        SourceError, TeacherError, MismatchError, ManifestError, LockedError: see their messages.
    """
    rank = torchrun_rank()
    part = part.split(rank.rank, rank.ranks)
    set_backends()
    with_views = open_stored(source, out, pixels, adding=loaded is not None)
    if with_views:
        settings = as_source(settings, with_views.targets)
    with writing(out, part):
        # Errors should show before hours of sharding.
        refuse_foreign(out)
        begun = file_size(out / MANIFEST) is not None
        if begun and part == WHOLE and not TargetsArtifact.open(out).units:
            # Its calibration failed: the settings that the error asked for are as good.
            begun = False
        if begun:
            settings = resumed(TargetsArtifact.open(out), settings, report)
            refuse_other_pixels(out, settings, with_views is not None)
            by_reference = refers(out, asked=by_reference)
        else:
            settings = settings.model_copy(update={"teacher": canonical(settings.teacher)})
        if by_reference and not with_views:
            raise refers_to_nothing(source)
        settings = settings.model_copy(update={"teacher": named_without_paths(settings.teacher)})
        device = pick_device(settings.speed.device, rank)
        stored = TargetsArtifact.open(out).identity["teacher"].get("precision") if begun else None
        if loaded and loaded.of == (settings.teacher, stored):
            teacher = loaded.teacher
        else:
            report.phase("loading the teacher")
            teacher = load_teacher(settings.teacher, device, begun=stored)
        for line in teacher_lines(teacher):
            report.log(line)
        content = {"settings": fingerprinted(settings), "teacher": teacher.info.identity()}
        completed, fix = completed_as(ExtractSettings), partial(set_remedy, out=out, from_views=bool(with_views))
        if begun:
            TargetsArtifact.open_same(out, content, fix, completed=completed)
        shards = with_views or open_source(source, out, settings, report=report)
        restart = part == WHOLE and not begun
        form = REFERRING if by_reference else None
        artifact = TargetsArtifact.open_or_create(
            out, content, facts={"classes": shards.classes}, fix=fix, completed=completed, format=form, restart=restart
        )
        missing = missing_units(artifact, shards, settings.views, part=part, remake=remake)
        remove_leftovers(out, missing, part)
        artifact.facts |= {"classes": shards.classes, "wanted": wanted(artifact, shards, settings.views)}
        artifact.facts["licences"] = licences(settings, shards, artifact.facts.get("licences", {}))
        if not missing and is_calibrated(artifact) and (artifact.complete or part != WHOLE) and remake is None:
            holds = f"{counted(settings.views, 'view')} of " + (f"part {part}" if part != WHOLE else "all shards")
            report.log(f"nothing to do: {out} has {holds} ({counted(len(shards.shards), 'shard')})")
            save_targets(artifact, shards, settings.views)
            return artifact
        asked = settings.speed.workers
        workers = worker_count(asked) if asked < 0 else -(-asked // rank.on_machine)
        if not (is_shared(out) and is_shared(source)):
            workers = 0  # other processes cannot read what is in this process's memory
        tell_changes(artifact.facts, teacher.device, report)
        if remake is not None and CODEC in remake:
            make_calibration(artifact, shards, teacher, settings=settings, workers=workers, report=report)
        artifact = ensure_calibration(
            artifact, shards, teacher, settings=settings, workers=workers, part=part, report=report
        )
        if calibrate_only:
            report.log("calibration finished (--calibrate-only)")
            return artifact
        check_space(artifact, shards, missing)
        try:
            reducing = [lacking.shard for lacking in missing if lacking.images]
            if isinstance(shards, StoredSource):
                shards.fetch_images(artifact, reducing, report)
            else:
                make_images(artifact, shards, reducing, settings=settings.view, workers=workers, report=report)
            if any(lacking.views for lacking in missing):
                make_views(
                    artifact, shards, missing, teacher=teacher, settings=settings, workers=workers, report=report
                )
        finally:
            save_targets(artifact, shards, settings.views)
        return artifact


def resumed(artifact: TargetsArtifact, settings: ExtractSettings, report: Report) -> ExtractSettings:
    """The settings, with values that were not given taken from the set: changed defaults must neither make the original
    command fail nor add views."""
    stored = artifact.identity["settings"]
    teacher = teacher_as_begun(settings.teacher, artifact)
    refuse_other_teacher(artifact, teacher)
    updates: dict[str, Any] = {"codec": as_begun(settings.codec, stored["codec"]), "teacher": teacher}
    # Sets of early versions do not record their planned content.
    if "views" not in settings.model_fields_set and "wanted" in artifact.facts:
        updates["views"] = artifact.facts["wanted"]["views"]
    begun = settings.model_copy(update=updates)
    if (begun.views, begun.codec) != (settings.views, settings.codec):
        report.log(f"using the settings of this set: --views {begun.views} --fidelity {begun.codec.fidelity:g}")
    return begun


def refuse_other_teacher(artifact: TargetsArtifact, teacher: TeacherSettings) -> None:
    """Raise MismatchError, before the teacher is loaded, if a set was begun with another model."""
    if same_model(teacher, recorded_teacher(artifact.identity)):
        return
    root, own, other = artifact.root, spelling(artifact.identity), spelled(teacher)
    file = f"@{teacher.weights}" if teacher.weights else ""
    add = command("extract-targets", root, "--teacher", f"{other}{file}", "--add")
    raise MismatchError(
        f"this set was made with the teacher {own} (settings.teacher.name), and {other} is requested now",
        where=root / MANIFEST,
        fix=f"--teacher {shlex.quote(own)} resumes it (with @FILE behind it if its weights are a local file); "
        + ("use" if parent_set(root) else f"`{add}` adds the other teacher; or use")
        + " another output folder",
    )


def licences(settings: ExtractSettings, shards: Source, known: Licences) -> Licences:
    """The licences of teacher and images: those that are given or declared now, else those that the set has."""
    now = {"teacher": teacher_licence(settings.teacher), "data": settings.shard.licence or shards.licence}
    found: Any = {name: licence for name, licence in now.items() if licence}
    return {**known, **found}


def set_remedy(differences: Sequence[Difference], out: Path, from_views: bool) -> str:
    """What to do if a set was begun with other settings. ``from_views``: its views are those of its source."""
    added = parent_set(out) is not None
    other = "remove this folder to add the teacher again, or use" if added else "use another output folder, or"
    without = ("teacher", "view") if from_views else ("teacher",)
    return resuming(ExtractSettings, differences, f"{other} the settings this one was made with", without=without)


def refuse_other_pixels(out: Path, settings: ExtractSettings, from_views: bool) -> None:
    """Raise MismatchError if a set's views are replayed and stored ones are requested, or the reverse."""
    there = recorded_view(TargetsArtifact.open(out).identity["settings"]).pixels
    if there != settings.view.pixels:
        raise MismatchError(
            f"view.pixels mismatch: this set {there}, settings {settings.view.pixels}",
            where=out / MANIFEST,
            fix="use the source that this set was made from, or another output folder"
            if from_views
            else f"--set view.pixels={there}, or use another output folder",
        )


def open_stored(source: Path, out: Path, pixels: Path | None, *, adding: bool) -> StoredSource | None:
    """The source, if it is a target set. ``adding``: whether a teacher is added to it.

    Raises:
        BadInputError: ``out`` is in it, and not an added teacher. DamageError, ManifestError: it is damaged, or has no
        view yet. SettingsError: ``pixels`` is needed or does not apply.
    """
    if not is_artifact(source, "targets"):
        if pixels is not None:
            raise SettingsError("the source is no target set", where="pixels (--pixels)", fix="omit it")
        return None
    inside = is_local(out) and is_local(source) and source.resolve() in (out.resolve(), *out.resolve().parents)
    if inside and not (is_added(out, source) and (adding or file_size(out / MANIFEST) is not None)):
        raise BadInputError(
            "the output folder is, or is inside of, the source",
            where=out,
            fix="use another folder, or omit it and give --add to add a teacher to the source",
        )
    return StoredSource.of(TargetSet(source, pixels=pixels))


def refers(out: Path, *, asked: bool) -> bool:
    """Whether a set that has been begun is by reference. Raises MismatchError if that is asked, and it is not."""
    there = TargetsArtifact.open(out).by_reference
    if asked and not there:
        raise MismatchError(
            "this set holds its pixels itself, and --by-reference is given",
            where=out / MANIFEST,
            fix="omit --by-reference, or use another output folder",
        )
    return there


def open_source(source: Path, out: Path, settings: ExtractSettings, *, report: Report) -> ShardSet:
    """The shard set to read: the source itself, or one inside ``out`` made from a folder of images."""
    if is_artifact(source, "shards"):
        return ShardSet.open_with_images(source)
    if is_artifact(source):
        raise SourceError(
            "this folder is neither a shard set nor a target set",
            where=source,
            fix="use a shard set, a folder of images, or a target set",
        )
    with holding(out, "sharding", lambda: report.waits_for("another process to shard the images")):
        report.log(f"sharding {source} into {out / SHARDS_FOLDER}")
        return build_shard_set(source, out / SHARDS_FOLDER, sharding(settings), report=report)


def sharding(settings: ExtractSettings) -> ShardSettings:
    """Settings of the sharding before extraction: the same number of workers, unless its own settings give one."""
    if settings.shard.speed.workers >= 0:
        return settings.shard
    speed = settings.shard.speed.model_copy(update={"workers": settings.speed.workers})
    return settings.shard.model_copy(update={"speed": speed})


def remove_leftovers(out: Path, missing: list[MissingUnits], part: WorkShare) -> None:
    """Remove partial files of a killed run, but never those that another part is writing now."""
    if part == WHOLE and is_local(out):
        remove_debris(out)
    remove_stages(out, [name for lacking in missing for name in lacking.units])


def save_targets(artifact: TargetsArtifact, shards: Source, views: int) -> None:
    """Write the manifest; the set is complete once every part has finished its share."""
    whole = not isinstance(shards, StoredSource) or shards.complete(views)
    artifact.save(complete=lambda merged: whole and CODEC in merged.units and not missing_units(merged, shards, views))
