"""Verify: check a folder against its manifest, and that the contents of a set fit together."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cae2pipe.artifacts.artifact import MANIFEST, AnyArtifact, TargetsArtifact, open_artifact
from cae2pipe.artifacts.file_checks import check_file
from cae2pipe.artifacts.manifest_values import FileEntry
from cae2pipe.artifacts.storage import entry_names, file_size, file_sizes
from cae2pipe.artifacts.transfer import MARKS
from cae2pipe.artifacts.verification import Verification
from cae2pipe.errors import DamageError, SettingsError, command
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.paths import (
    CODEC_FOLDER,
    IMAGES_FOLDER,
    LATENTS_FOLDER,
    SHARDS_FOLDER,
    VIEWS_FOLDER,
    is_store,
)
from cae2pipe.targets.shared_pixels import added_sets, find_pixels, no_pixels, parent_set, shared_pixels

if TYPE_CHECKING:
    from cae2pipe.targets.auditing import Audit


def verify(path: Path, report: Report, pixels: Path | None = None) -> Verification:
    """Check a folder: presence, size and SHA-256 of every file, unlisted files, and for shard and target sets counts
    and keys. A shard set inside a target set is checked with it, and so are the sets of added teachers.

    Args:
        pixels: the folder with the pixels of a set by reference, which are checked with it.

    Raises:
        ManifestError: the folder is not one of cae2pipe's. SettingsError: ``pixels`` is needed or does not apply.
    """
    artifact = open_artifact(path)
    folder: Path | None = path
    if isinstance(artifact, TargetsArtifact):
        folder, _ = find_pixels(artifact, pixels)
    elif pixels is not None:
        raise SettingsError("this is no target set", where="pixels (--pixels)", fix="omit it")
    if folder is None:
        raise no_pixels(path, min(shared_pixels(artifact), default=VIEWS_FOLDER))
    return _verify(artifact, folder, report)


def _verify(
    artifact: AnyArtifact,
    pixels: Path,
    report: Report,
    *,
    checked: Mapping[str, FileEntry] | None = None,
    contents: bool = True,
) -> Verification:
    """``pixels``: the folder with the pixels; ``checked``: those that have been checked, with their entries.
    ``contents``: whether what the files hold can be checked."""
    root = artifact.root
    entries = {path: (name, entry) for name, unit in artifact.units.items() for path, entry in unit["files"].items()}
    referred = shared_pixels(artifact)
    elsewhere = {path: entry for path, entry in referred.items() if checked is None or checked.get(path) != entry}
    result = Verification(root, artifact.kind, len(entries) + len(elsewhere), pixels=pixels if referred else None)
    report.phase("checking files")
    report.total(result.files, "files")
    for name, (unit, entry) in sorted(entries.items()):
        if problem := check_file(root / name, entry):
            problem.fix = _remedy(artifact)
            result.own.append(problem)
            result.bad.add(unit)
        report.advance()
    for name, entry in sorted(elsewhere.items()):
        if problem := check_file(pixels / name, entry):
            problem.fix = f"{command('verify', pixels, '--repair')}, if this is the folder with the set's pixels"
            result.own.append(problem)
        report.advance()
    strangers = _strangers(artifact, set(entries))
    if strangers and file_sizes(root / MARKS):
        again = "run the same `cae2pipe copy` command again"
        result.own.append(DamageError("the copy to this folder is not finished", where=root, fix=again))
    else:
        result.own += [
            DamageError("a file that is not in the manifest", where=root / name, fix="remove it") for name in strangers
        ]
    # Keys and counts are read from the files, so the files are checked first.
    if contents and not result.own:
        report.phase("checking that the contents fit together")
        for unit, problem in _check_contents(artifact, pixels):
            problem.fix = _remedy(artifact)
            result.own.append(problem)
            result.bad.add(unit)
    if file_size(root / SHARDS_FOLDER / MANIFEST) is not None:
        shards = open_artifact(root / SHARDS_FOLDER)
        result.inner.append(_verify(shards, shards.root, report))
    for folder in added_sets(root) if artifact.kind == "targets" else ():
        added = TargetsArtifact.open(folder)
        sound = not result.own and any(map(is_store, added.units))
        known = {path: entry for path, (_, entry) in entries.items()} | referred
        result.inner.append(_verify(added, pixels, report, checked=known, contents=sound))
    return result


def verify_live(
    path: Path, count: int, weights: Path | None, *, device: str, report: Report, pixels: Path | None = None
) -> Audit:
    """Run a target set's teacher again on ``count`` stored views.

    Args:
        weights: the teacher's weights, if they came from a local file, whose path sets do not record.
        pixels: the folder with the pixels of a set by reference.

    Raises:
        ManifestError: the folder is not a target set. TeacherError, MismatchError: the teacher is not available, or is
        another one.
    """
    from cae2pipe.runtime.device import pick_device, set_backends
    from cae2pipe.targets.auditing import audit
    from cae2pipe.targets.target_set import TargetSet
    from cae2pipe.teachers.load import set_teacher

    set_backends()
    targets = TargetSet(path, pixels=pixels)
    report.phase("loading the teacher")
    teacher = set_teacher(targets.artifact, weights, pick_device(device), option="--teacher-weights FILE")
    return audit(targets, teacher, count, report=report)


def _strangers(artifact: AnyArtifact, known: set[str]) -> list[str]:
    """Files, links and others below the folders of the artifact that are not in the manifest."""
    units = [IMAGES_FOLDER, VIEWS_FOLDER, LATENTS_FOLDER, CODEC_FOLDER]
    folders = {"shards": ["tars"], "targets": units}.get(artifact.kind, [])
    names = sorted(f"{folder}/{name}" for folder in folders for name in entry_names(artifact.root / folder))
    return [name for name in names if name not in known]


def _check_contents(artifact: AnyArtifact, pixels: Path) -> Iterator[tuple[str, DamageError]]:
    """Units whose files are inconsistent."""
    from cae2pipe.shards.tar import index_tar

    if artifact.kind == "shards":
        from cae2pipe.shards.shard_set import ShardSet

        shards = ShardSet.open(artifact.root)
        for shard in shards.shards:
            index = [(sample.key, sample.label, sample.offset, sample.size) for sample in index_tar(shard.path)]
            if index != [row[:4] for row in shards.index(shard)] or len(index) != shard.samples:
                yield shard.name, DamageError("the samples in the tar differ from its index", where=shard.path)
    if artifact.kind == "targets":
        from cae2pipe.targets.target_set import TargetSet

        targets = TargetSet(artifact.root, pixels=pixels)
        # Replayed views of a shard share a tar and are consecutive.
        indexed = functools.lru_cache(maxsize=1)(lambda tar: [sample.key for sample in index_tar(tar)])
        for name in sorted(targets.stores, key=lambda name: (targets.stores[name]["shard"], name)):
            reader = targets.reader(name)
            if indexed(reader.tar) != reader.records().keys:
                yield name, DamageError("the keys in the store differ from its tar", where=f"{artifact.root}, {name}")


def _remedy(artifact: AnyArtifact) -> str:
    if artifact.kind == "shards":
        return command("verify", artifact.root, "--repair", "--source", "IMAGES")
    if "recoded" in artifact.identity:
        return command("verify", artifact.root, "--repair", "--source", "TARGETS")
    if isinstance(artifact, TargetsArtifact):
        known = parent_set(artifact.root) or file_size(artifact.root / SHARDS_FOLDER / MANIFEST) is not None
        shards = () if known else ("--pixels", "TARGETS") if artifact.by_reference else ("--source", "SHARDS")
        return command("verify", artifact.root, "--repair", *shards)
    again = {"run": "pretrain", "scores": "evaluate"}[artifact.kind]
    return f"delete it, then rerun `cae2pipe {again}` with the same arguments"
