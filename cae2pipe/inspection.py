"""What a folder is and whether it is as it was written: the work of ``cae2pipe inspect`` and ``cae2pipe verify``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cae2pipe.artifacts.box import (
    MANIFEST,
    AnyBox,
    RunBox,
    ScoresBox,
    ShardsBox,
    TargetsBox,
    check_file,
    open_box,
)
from cae2pipe.artifacts.places import entry_names, file_size
from cae2pipe.errors import Cae2pipeError, DamageError
from cae2pipe.runtime.progress import Report

if TYPE_CHECKING:
    from cae2pipe.targets.auditing import Audit


def describe(path: Path) -> dict[str, Any]:
    """What a folder made by cae2pipe is, what it was made from and what it holds, as JSON values.

    Raises:
        ManifestError: not a folder of ours, or one of an unknown format.
    """
    box = open_box(path)
    files = [entry for unit in box.units.values() for entry in unit["files"].values()]
    facts: dict[str, Any] = {
        "path": str(path),
        "kind": box.kind,
        "complete": box.complete,
        "fingerprint": box.fingerprint,
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files),
    }
    facts.update(_of_kind(box))
    facts["made_from"] = box.identity
    return facts


def _shards(box: ShardsBox) -> dict[str, Any]:
    return {
        "shards": sum(unit["samples"] > 0 for unit in box.units.values()),
        "images": sum(unit["samples"] for unit in box.units.values()),
        "rejected": box.facts.get("rejected", 0),
        "classes": len(box.identity["classes"]),
        "generations": [unit["images"] for name, unit in sorted(box.units.items()) if "images" in unit],
    }


def _targets(box: TargetsBox) -> dict[str, Any]:
    from cae2pipe.targets.target_set import TargetSet

    targets = TargetSet(box.root)
    shards: dict[int, int] = {}
    for unit in targets.stores.values():
        shards[unit["view"]] = shards.get(unit["view"], 0) + 1
    # Early sets do not say what they were to hold.
    wanted = box.facts.get("wanted")
    views, images = (wanted["views"], wanted["images"]) if wanted else (targets.views, targets.images)
    stored = sum(unit["samples"] for unit in targets.stores.values())
    return {
        "teacher": box.facts["teacher"],
        "asked_for": wanted or {"views": views, "images": images},
        "share_made": round(stored / max(1, images * views), 4),
        "images": targets.images,
        "views": targets.views,
        "shards_with_view": {str(view): count for view, count in sorted(shards.items())},
        "pixels": targets.view.pixels,
        "codec": box.identity["settings"]["codec"]["name"],
        "fidelity": targets.fidelity(),
        "bytes_per_view": {name: round(value, 1) for name, value in targets.bytes_per_view().items()},
    }


def _run(box: RunBox) -> dict[str, Any]:
    from cae2pipe.training.checkpoint import checkpoints
    from cae2pipe.training.metrics import read_metrics

    lines, damaged = read_metrics(box.root / "metrics.jsonl")
    last = lines[-1] if lines else {}
    return {
        "teacher": box.facts["teacher"],
        "stores": len(box.facts["stores"]),
        "steps": len(lines),
        "damaged_lines": damaged,
        "last_step": {name: last[name] for name in ("epoch", "loss", "centred_cosine_masked") if name in last},
        "checkpoints": [path.name for path in checkpoints(box.root / "checkpoints")],
    }


def _of_kind(box: AnyBox) -> dict[str, Any]:
    match box:
        case ShardsBox():
            return _shards(box)
        case TargetsBox():
            return _targets(box)
        case RunBox():
            return _run(box)
        case ScoresBox():
            return dict(box.facts)


@dataclass
class Verification:
    """The outcome of ``verify``: ``problems`` of this folder, the units (``bad``) they are in, and the outcome of the
    shard set inside, if there is one."""

    path: Path
    kind: str
    files: int
    own: list[Cae2pipeError] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    inner: list[Verification] = field(default_factory=list)

    @property
    def problems(self) -> list[Cae2pipeError]:
        return self.own + [problem for inner in self.inner for problem in inner.problems]

    def summary(self) -> str:
        files = self.files + sum(inner.files for inner in self.inner)
        if self.problems:
            return f"{self.path}: {len(self.problems)} problems in {files} files of this {self.kind} folder"
        return f"{self.path}: all {files} files of this {self.kind} folder are as the manifest says"


def verify(path: Path, report: Report) -> Verification:
    """Check a folder: presence, size and SHA-256 of every file, files that the manifest does not know, and for shard
    and target sets counts and keys. A shard set inside a target set is checked with it.

    Raises:
        ManifestError: not a folder of ours.
    """
    box = open_box(path)
    entries = {name: (unit, entry) for unit, content in box.units.items() for name, entry in content["files"].items()}
    result = Verification(path, box.kind, len(entries))
    report.total(len(entries), "files")
    for name, (unit, entry) in sorted(entries.items()):
        if problem := check_file(path / name, entry):
            problem.fix = _remedy(box)
            result.own.append(problem)
            result.bad.add(unit)
        report.advance()
    result.own += [
        DamageError("a file that the manifest does not know", where=path / name, fix="remove it")
        for name in _strangers(box, set(entries))
    ]
    # Keys and counts are read from the files, so these must be sound first.
    if not result.own:
        for unit, problem in _check_contents(box):
            problem.fix = _remedy(box)
            result.own.append(problem)
            result.bad.add(unit)
    if file_size(path / "shards" / MANIFEST) is not None:
        result.inner.append(verify(path / "shards", report))
    return result


def verify_live(path: Path, count: int, weights: Path | None, device: str) -> Audit:
    """Run a target set's teacher again on ``count`` of its stored views.

    Args:
        weights: the teacher's weights, where they came from a local file: sets do not say where files lie.

    Raises:
        ManifestError: not a target set. TeacherError, MismatchError: the teacher cannot be had, or is another one.
    """
    from cae2pipe.runtime.device import pick_device, set_backends
    from cae2pipe.targets.auditing import audit
    from cae2pipe.targets.target_set import TargetSet
    from cae2pipe.teachers.load import set_teacher

    set_backends()
    targets = TargetSet(path)
    teacher = set_teacher(targets.box, weights, pick_device(device), "--teacher-weights FILE")
    return audit(targets, teacher, count)


def _strangers(box: AnyBox, known: set[str]) -> list[str]:
    """Files, links and the like below the folders that the box fills, of which the manifest knows nothing."""
    folders = {"shards": ["tars"], "targets": ["images", "views", "latents", "codec.zarr"]}.get(box.kind, [])
    names = sorted(f"{folder}/{name}" for folder in folders for name in entry_names(box.root / folder))
    return [name for name in names if name not in known]


def _check_contents(box: AnyBox) -> Iterator[tuple[str, DamageError]]:
    """Units whose files contradict each other."""
    from cae2pipe.shards.tar import index_tar

    if box.kind == "shards":
        from cae2pipe.shards.shard_set import ShardSet

        shards = ShardSet.open(box.root)
        for shard in shards.shards:
            index = [(sample.key, sample.label, sample.offset, sample.size) for sample in index_tar(shard.path)]
            if index != [row[:4] for row in shards.index(shard)] or len(index) != shard.samples:
                yield shard.name, DamageError("the tar's samples are not those of its index", where=shard.path)
    if box.kind == "targets":
        from cae2pipe.targets.target_set import TargetSet

        targets = TargetSet(box.root)
        # Neighbours share a tar where views are replayed.
        indexed = functools.lru_cache(maxsize=1)(lambda tar: [sample.key for sample in index_tar(tar)])
        for name in sorted(targets.stores, key=lambda name: (targets.stores[name]["shard"], name)):
            reader = targets.reader(name)
            if indexed(reader.tar) != reader.keys():
                yield name, DamageError("the store's keys are not those of its tar", where=f"{box.root}, {name}")


def _remedy(box: AnyBox) -> str:
    if box.kind == "shards":
        return f"cae2pipe verify {box.root} --repair --source IMAGES"
    if "recoded" in box.identity:
        return f"cae2pipe verify {box.root} --repair --source TARGETS"
    if box.kind == "targets":
        shards = "" if file_size(box.root / "shards" / MANIFEST) is not None else " --source SHARDS"
        return f"cae2pipe verify {box.root} --repair{shards}"
    again = {"run": "pretrain", "scores": "evaluate"}[box.kind]
    return f"delete it, then run `cae2pipe {again}` as before"
