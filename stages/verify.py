"""Verify: check a folder against its manifest, and that the contents of a set fit together."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cae2pipe.artifacts.artifact import MANIFEST, AnyArtifact, open_artifact
from cae2pipe.artifacts.file_checks import check_file
from cae2pipe.artifacts.storage import entry_names, file_size, file_sizes
from cae2pipe.artifacts.transfer import MARKS
from cae2pipe.artifacts.verification import Verification
from cae2pipe.errors import DamageError
from cae2pipe.runtime.progress import Report
from cae2pipe.targets.paths import CODEC_FOLDER, IMAGES_FOLDER, LATENTS_FOLDER, SHARDS_FOLDER, VIEWS_FOLDER

if TYPE_CHECKING:
    from cae2pipe.targets.auditing import Audit


def verify(path: Path, report: Report) -> Verification:
    """Check a folder: presence, size and SHA-256 of every file, unlisted files, and for shard and target sets counts
    and keys. A shard set inside a target set is checked with it.

    Raises:
        ManifestError: the folder is not one of cae2pipe's.
    """
    artifact = open_artifact(path)
    entries = {path: (name, entry) for name, unit in artifact.units.items() for path, entry in unit["files"].items()}
    result = Verification(path, artifact.kind, len(entries))
    report.phase("checking files")
    report.total(len(entries), "files")
    for name, (unit, entry) in sorted(entries.items()):
        if problem := check_file(path / name, entry):
            problem.fix = _remedy(artifact)
            result.own.append(problem)
            result.bad.add(unit)
        report.advance()
    strangers = _strangers(artifact, set(entries))
    if strangers and file_sizes(path / MARKS):
        again = "run the same `cae2pipe copy` command again"
        result.own.append(DamageError("the copy to this folder is not finished", where=path, fix=again))
    else:
        result.own += [
            DamageError("a file that is not in the manifest", where=path / name, fix="remove it") for name in strangers
        ]
    # Keys and counts are read from the files, so the files are checked first.
    if not result.own:
        report.phase("checking that the contents fit together")
        for unit, problem in _check_contents(artifact):
            problem.fix = _remedy(artifact)
            result.own.append(problem)
            result.bad.add(unit)
    if file_size(path / SHARDS_FOLDER / MANIFEST) is not None:
        result.inner.append(verify(path / SHARDS_FOLDER, report))
    return result


def verify_live(path: Path, count: int, weights: Path | None, *, device: str, report: Report) -> Audit:
    """Run a target set's teacher again on ``count`` stored views.

    Args:
        weights: the teacher's weights, if they came from a local file, whose path sets do not record.

    Raises:
        ManifestError: the folder is not a target set. TeacherError, MismatchError: the teacher is not available, or is
        another one.
    """
    from cae2pipe.runtime.device import pick_device, set_backends
    from cae2pipe.targets.auditing import audit
    from cae2pipe.targets.target_set import TargetSet
    from cae2pipe.teachers.load import set_teacher

    set_backends()
    targets = TargetSet(path)
    report.phase("loading the teacher")
    teacher = set_teacher(targets.artifact, weights, pick_device(device), option="--teacher-weights FILE")
    return audit(targets, teacher, count, report=report)


def _strangers(artifact: AnyArtifact, known: set[str]) -> list[str]:
    """Files, links and others below the folders of the artifact that are not in the manifest."""
    units = [IMAGES_FOLDER, VIEWS_FOLDER, LATENTS_FOLDER, CODEC_FOLDER]
    folders = {"shards": ["tars"], "targets": units}.get(artifact.kind, [])
    names = sorted(f"{folder}/{name}" for folder in folders for name in entry_names(artifact.root / folder))
    return [name for name in names if name not in known]


def _check_contents(artifact: AnyArtifact) -> Iterator[tuple[str, DamageError]]:
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

        targets = TargetSet(artifact.root)
        # Replayed views of a shard share a tar and are consecutive.
        indexed = functools.lru_cache(maxsize=1)(lambda tar: [sample.key for sample in index_tar(tar)])
        for name in sorted(targets.stores, key=lambda name: (targets.stores[name]["shard"], name)):
            reader = targets.reader(name)
            if indexed(reader.tar) != reader.records().keys:
                yield name, DamageError("the keys in the store differ from its tar", where=f"{artifact.root}, {name}")


def _remedy(artifact: AnyArtifact) -> str:
    if artifact.kind == "shards":
        return f"cae2pipe verify {artifact.root} --repair --source IMAGES"
    if "recoded" in artifact.identity:
        return f"cae2pipe verify {artifact.root} --repair --source TARGETS"
    if artifact.kind == "targets":
        shards = "" if file_size(artifact.root / SHARDS_FOLDER / MANIFEST) is not None else " --source SHARDS"
        return f"cae2pipe verify {artifact.root} --repair{shards}"
    again = {"run": "pretrain", "scores": "evaluate"}[artifact.kind]
    return f"delete it, then rerun `cae2pipe {again}` with the same arguments"
