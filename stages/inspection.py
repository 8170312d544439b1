"""Inspect: the kind, origin and content of a folder.

Not named ``inspect.py``: if this were the current folder, Python would import it instead of the standard library's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cae2pipe.artifacts.artifact import (
    AnyArtifact,
    RunArtifact,
    ScoresArtifact,
    ShardsArtifact,
    TargetsArtifact,
    open_artifact,
)
from cae2pipe.artifacts.manifest_values import UNKNOWN, Licences


def known_licences(licences: Licences) -> dict[str, str]:
    """The licences of teacher and images, or that they are unknown."""
    return {"teacher": licences.get("teacher", UNKNOWN), "data": licences.get("data", UNKNOWN)}


if TYPE_CHECKING:
    from cae2pipe.targets.target_set import TargetSet


def inspect_folder(path: Path) -> dict[str, Any]:
    """Kind, origin and content of a folder made by cae2pipe, as JSON values.

    Raises:
        ManifestError: the folder is not one of cae2pipe's, or has an unknown format version.
    """
    artifact = open_artifact(path)
    sizes = [entry["bytes"] for unit in artifact.units.values() for entry in unit["files"].values()]
    facts: dict[str, Any] = {
        "path": str(path),
        "kind": artifact.kind,
        "complete": artifact.complete,
        "fingerprint": artifact.fingerprint,
        "files": len(sizes),
        "bytes": sum(sizes),
    }
    facts.update(_of_kind(artifact))
    facts["made_from"] = artifact.identity
    return facts


def _shards(artifact: ShardsArtifact) -> dict[str, Any]:
    return {
        "shards": sum(unit["samples"] > 0 for unit in artifact.units.values()),
        "images": sum(unit["samples"] for unit in artifact.units.values()),
        "rejected": artifact.facts.get("rejected", 0),
        "classes": len(artifact.identity["classes"]),
        "licence": artifact.facts.get("licence", UNKNOWN),
        "generations": [unit["images"] for name, unit in sorted(artifact.units.items()) if "images" in unit],
    }


def _targets(artifact: TargetsArtifact) -> dict[str, Any]:
    from cae2pipe.targets.target_set import TargetSet

    targets = TargetSet(artifact.root)
    shards: dict[int, int] = {}
    for unit in targets.stores.values():
        shards[unit["view"]] = shards.get(unit["view"], 0) + 1
    # Sets of early versions do not record their planned content.
    wanted = artifact.facts.get("wanted")
    views, images = (wanted["views"], wanted["images"]) if wanted else (targets.views, targets.images)
    stored = sum(unit["samples"] for unit in targets.stores.values())
    return {
        "teacher": artifact.facts["teacher"],
        "licences": known_licences(artifact.facts.get("licences", {})),
        "asked_for": wanted or {"views": views, "images": images},
        "share_made": round(stored / max(1, images * views), 4),
        "images": targets.images,
        "views": targets.views,
        "shards_with_view": {str(view): count for view, count in sorted(shards.items())},
        "pixels": targets.view.pixels,
        **({"pixels_elsewhere": _referred(artifact)} if artifact.by_reference else {}),
        "codec": artifact.identity["settings"]["codec"]["name"],
        "fidelity": targets.fidelity(),
        "bytes_per_view": {name: round(value, 1) for name, value in targets.bytes_per_view().items()},
        **({"groups": _groups(targets)} if len(targets.groups) > 1 else {}),
        **({"added_teachers": added} if (added := _added(artifact)) else {}),
    }


def _referred(artifact: TargetsArtifact) -> dict[str, int]:
    """The files with pixels that a set by reference lists."""
    from cae2pipe.targets.shared_pixels import shared_pixels

    files = shared_pixels(artifact).values()
    return {"files": len(files), "bytes": sum(entry["bytes"] for entry in files)}


def _added(artifact: TargetsArtifact) -> dict[str, Any]:
    """The sets of added teachers by their labels."""
    from cae2pipe.targets.paths import is_store
    from cae2pipe.targets.shared_pixels import added_sets

    known = {}
    for folder in added_sets(artifact.root):
        added = TargetsArtifact.open(folder)
        files = [entry["bytes"] for unit in added.units.values() for entry in unit["files"].values()]
        known[folder.name] = {
            "name": added.identity["teacher"]["name"],
            "complete": added.complete,
            "fingerprint": added.fingerprint,
            "licences": known_licences(added.facts.get("licences", {})),
            "stores": sum(map(is_store, added.units)),
            "files": len(files),
            "bytes": sum(files),
        }
    return known


def _groups(targets: TargetSet) -> dict[str, Any]:
    return {
        name: {
            "tokens": targets.groups[name].layout.tokens,
            "dim": targets.groups[name].layout.dim,
            "fidelity": targets.fidelity(name),
            "bytes_per_view": round(size, 1),
        }
        for name, size in targets.group_bytes_per_view().items()
    }


def _run(artifact: RunArtifact) -> dict[str, Any]:
    from cae2pipe.training.checkpoint import CHECKPOINTS_FOLDER, checkpoints
    from cae2pipe.training.metrics import METRICS_FILE, PROBE_FILE, read_metrics, read_probes

    lines, damaged = read_metrics(artifact.root / METRICS_FILE)
    last = lines[-1] if lines else {}
    probes = read_probes(artifact.root / PROBE_FILE)
    return {
        "teacher": artifact.facts["teacher"],
        **({"teachers": _teachers(artifact)} if "teachers" in artifact.facts else {}),
        **({"init": artifact.facts["init"]} if "init" in artifact.facts else {}),
        "licences": known_licences(artifact.facts.get("licences", {})),
        "stores": len(artifact.facts["stores"]),
        "steps": len(lines),
        "damaged_lines": damaged,
        "last_step": {name: last[name] for name in ("epoch", "loss", "centred_cosine_masked") if name in last},
        **({"last_probe": probes[-1]} if probes else {}),
        "checkpoints": [path.name for path in checkpoints(artifact.root / CHECKPOINTS_FOLDER)],
    }


def _teachers(artifact: RunArtifact) -> dict[str, Any]:
    """All teachers of a run by their labels, if there are several."""
    return {
        known["label"]: {
            **{name: known[name] for name in ("name", "dim", "class_token")},
            "licences": known_licences(known["licences"]),
            "stores": len(known["stores"]),
        }
        for known in artifact.facts["teachers"]
    }


def _of_kind(artifact: AnyArtifact) -> dict[str, Any]:
    match artifact:
        case ShardsArtifact():
            return _shards(artifact)
        case TargetsArtifact():
            return _targets(artifact)
        case RunArtifact():
            return _run(artifact)
        case ScoresArtifact():
            return dict(artifact.facts)
