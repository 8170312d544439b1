"""Add a teacher to a target set: a set by reference in ``TARGETS/teachers/LABEL``, whose pixels are those of the set.

The first set stays as it is, byte for byte, so runs that began with it resume. The added teacher has an identity of its
own, and its set is made, resumed and grown by ``extract_targets``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

from cae2pipe.artifacts.artifact import MANIFEST, TargetsArtifact, is_artifact
from cae2pipe.artifacts.difference import first_difference
from cae2pipe.artifacts.inside import inside
from cae2pipe.artifacts.manifest_targets import TargetsIdentity
from cae2pipe.artifacts.storage import is_local
from cae2pipe.artifacts.work_share import WHOLE, WorkShare
from cae2pipe.config.base import fingerprinted
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import MismatchError, ReadOnlyError, SettingsError, command
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.ranks import torchrun_rank
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.paths import TEACHERS_FOLDER, is_store
from cae2pipe.targets.shared_pixels import added_sets, parent_set
from cae2pipe.targets.stored_source import as_source
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.labels import label, teacher_key
from cae2pipe.teachers.load import LoadedTeacher, load_teacher, named_without_paths
from cae2pipe.teachers.resuming import canonical, teacher_as_begun


def add_teacher(
    source: Path,
    settings: ExtractSettings,
    *,
    report: Report,
    part: WorkShare = WHOLE,
    calibrate_only: bool = False,
    pixels: Path | None = None,
) -> TargetsArtifact:
    """Make, resume or grow the set of another teacher of the views of ``source``, inside of it.

    Args:
        part, calibrate_only: as of ``extract_targets``.
        pixels: the folder with the pixels of ``source``, if it is by reference itself.

    Raises:
        SettingsError: ``source`` is no target set, or that of an added teacher. MismatchError: the teacher is that of
        the set, or was added with other settings. ReadOnlyError: ``source`` cannot be written. BadInputError: a link
        leads out of ``source``. Otherwise as ``extract_targets``.
    """
    refuse_others(source)
    set_backends()
    targets = TargetSet(source, pixels=pixels)
    chosen = as_source(settings, targets)
    report.phase("loading the teacher")
    place = place_of(targets, chosen)
    inside(source, f"{TEACHERS_FOLDER}/{place.folder.name}/{MANIFEST}")
    try:
        artifact = extract_targets(
            source,
            place.folder,
            settings,
            report=report,
            part=part,
            calibrate_only=calibrate_only,
            by_reference=True,
            pixels=pixels,
            loaded=place.loaded,
        )
    except ReadOnlyError as error:
        error.fix = "give an OUT and --by-reference in place of --add: the set stays as it is, and OUT has the latents"
        raise
    if any(map(is_store, artifact.units)):
        named = ("--set", f"data.pixels={pixels}") if pixels else ()
        report.log(f"train from both: {command('pretrain', targets.root, artifact.root, 'RUN', *named)}")
    return artifact


def check_added(source: Path, settings: ExtractSettings, pixels: Path | None = None) -> None:
    """Raise what ``add_teacher`` would, before anything is made: for estimates."""
    refuse_others(source)
    targets = TargetSet(source, pixels=pixels)
    place_of(targets, as_source(settings, targets))


def refuse_others(source: Path) -> None:
    """Raise SettingsError unless a teacher can be added to this set."""
    if is_local(source) and not source.exists():
        raise SettingsError("there is no such target set", where=source, fix="check the path of SOURCE")
    if not is_artifact(source, "targets"):
        raise SettingsError(
            "a teacher is added to a target set, and this is none",
            where=source,
            fix="give a target set, or an output folder instead of --add",
        )
    if (parent := parent_set(source)) is not None:
        raise SettingsError(
            "this is the set of an added teacher", where=source, fix=f"add the teacher to the first set: {parent}"
        )


class Place(NamedTuple):
    """The folder of an added teacher, and the teacher."""

    folder: Path
    loaded: LoadedTeacher


def place_of(targets: TargetSet, settings: ExtractSettings) -> Place:
    """Where a set holds, or will hold, the latents of another teacher.

    Raises:
        MismatchError: the teacher is that of the set, or was added with other settings. SettingsError: its grid is not
        that of the set.
    """
    device = pick_device(settings.speed.device, torchrun_rank())
    added = {folder: TargetsArtifact.open(folder) for folder in added_sets(targets.root)}
    for folder, artifact in added.items():
        begun = named_without_paths(teacher_as_begun(settings.teacher, artifact))
        if fingerprinted(begun) == artifact.identity["settings"]["teacher"]:
            precision = artifact.identity["teacher"].get("precision")
            teacher = load_teacher(begun, device, begun=precision)
            if teacher.info.identity() == artifact.identity["teacher"]:
                return Place(folder, LoadedTeacher((begun, precision), teacher))
    new = named_without_paths(canonical(settings.teacher))
    teacher = load_teacher(new, device)
    loaded = LoadedTeacher((new, None), teacher)
    described: Any = {"settings": {"teacher": fingerprinted(new)}, "teacher": teacher.info.identity()}
    identity = cast(TargetsIdentity, described)
    if teacher_key(identity) == teacher_key(targets.artifact.identity):
        raise MismatchError(
            f"this is the set's own teacher, {targets.label}", where=targets.root, fix="give another --teacher"
        )
    for folder, artifact in added.items():
        if teacher_key(identity) == teacher_key(artifact.identity):
            if not artifact.units:  # its calibration failed: other settings are as good
                return Place(folder, loaded)
            there: Any = {"settings": {"teacher": artifact.identity["settings"]["teacher"]}}
            there["teacher"] = artifact.identity["teacher"]
            name, old, now = first_difference(there, described) or ("", "", "")
            raise MismatchError(
                f"this teacher is already added, as {folder.name}, with {name} = {old!r} instead of {now!r}",
                where=folder,
                fix="give the same --teacher and settings as then, or remove this folder",
            )
    grid, first = (teacher.info.rows, teacher.info.cols), (targets.teacher.rows, targets.teacher.cols)
    if grid != first:
        raise SettingsError(
            f"the grid of this teacher is {grid[0]} x {grid[1]}, that of the set {first[0]} x {first[1]}: no student "
            "learns from both",
            where=targets.root,
            fix=f"--set 'teacher.grid=[{first[0]},{first[1]}]', or give an OUT and --by-reference in place of --add",
        )
    name = label(identity, [targets.label, *(folder.name for folder in added)])
    return Place(targets.root / TEACHERS_FOLDER / name, loaded)
