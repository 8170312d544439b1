"""Gathers the results of runs into rows and columns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.artifact import RunArtifact, is_artifact, open_artifact
from cae2pipe.artifacts.digest import canonical_json, fingerprint
from cae2pipe.artifacts.manifest_run import SeveralTeacher
from cae2pipe.artifacts.manifest_values import UNKNOWN
from cae2pipe.comparison.rows import CURVES, PROBES, Comparison, Finished, Row, Taught
from cae2pipe.comparison.scores import read_scores
from cae2pipe.config.base import recorded
from cae2pipe.config.compare import BYTES, GridSettings, numeric_setting
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import SettingsError
from cae2pipe.models.export import WEIGHTS
from cae2pipe.runtime.foreign_names import told_apart
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.metrics import METRICS_FILE, PROBE_FILE, is_number, read_metrics, read_probes
from cae2pipe.training.student import run_settings


def gather_grid(
    grid: GridSettings,
    planned: Sequence[tuple[int, str, str]],
    out: Path,
    *,
    sets: Sequence[Path],
    labels: Sequence[str] = (),
    failed: Sequence[str] = (),
) -> Comparison:
    """All results of a grid below ``out``.

    Args:
        planned: for each run the number of its variant, its folder's name below runs, and the one below scores.
        sets: the target sets used for training. labels: of the teachers, by the positions in
        ``Variant.sets``. failed: jobs that could not be finished.
    """
    rows = [Row(variant.name, paper=variant.paper, line=variant.line) for variant in grid.variants]
    known = {open_artifact(path).fingerprint: path for path in sets}
    for variant, name, scored in planned:
        folders = [out / "scores" / scored / scored_by.kind for scored_by in grid.evaluate]
        scores = read_scores([folder for folder in folders if is_artifact(folder, "scores")])
        own = grid.variants[variant].sets
        called = [labels[position - 1] for position in own] if isinstance(own, tuple) and labels else []
        add_run(rows[variant], out / "runs" / name, scores, sets=known, along=grid.along, labels=called)
    kinds = [scored_by.kind for scored_by in grid.evaluate]
    columns, protocols = fill_columns(rows, kinds)
    wanted = len(planned) * len(kinds)
    return Comparison(grid.title, grid.about.strip(), columns, rows, protocols, wanted, grid.along, list(failed))


def gather_runs(runs: Sequence[Path], scores: Mapping[str, list[Finished]], sets: Sequence[Path]) -> Comparison:
    """Some runs. Runs that differ only in their seed share a row, which is named by its folders; the settings that
    distinguish it follow.

    Raises:
        ManifestError: a folder is not a run. SettingsError: two folders hold the same run.
    """
    groups: dict[str, dict[object, Path]] = {}
    differing: dict[str, dict[str, object]] = {}
    for run in runs:
        artifact = RunArtifact.open(run)
        settings = dict(sorted(flat(recorded(PretrainSettings, artifact.identity["settings"])).items()))
        seed = settings.pop("seed")
        # Not the set's own fingerprint, which does not depend on the images and the number of views.
        settings["target set"] = fingerprint([artifact.identity["targets"], artifact.facts["stores"]])[:8]
        if "teachers" in artifact.facts:
            several = artifact.facts["teachers"]
            settings["teachers"] = ", ".join(each["label"] for each in several)
            settings["target set"] = fingerprint([[each["targets"], each["stores"]] for each in several])[:8]
        if "init" in artifact.identity:
            settings["model.init"] = f"{artifact.facts.get('init')} {artifact.identity['init'][:8]}"
        key = canonical_json(settings)
        other = groups.setdefault(key, {}).setdefault(seed, run)
        if other != run:
            raise SettingsError(
                f"two of the folders hold the same run (seed {seed}), which would count twice",
                where=f"{other}, {run}",
                fix="give only one of them",
            )
        differing[key] = settings
    groups_named = zip(row_names(list(differing.values())), groups.values(), strict=True)
    names = [folder_name(list(group.values())) + (f" ({name})" if name else "") for name, group in groups_named]
    rows = []
    known = {open_artifact(path).fingerprint: path for path in sets}
    for name, group in zip(told_apart(names, range(1, len(names) + 1)), groups.values(), strict=True):
        rows.append(Row(name))
        for run in group.values():
            add_run(rows[-1], run, scores, sets=known, along="")
    columns, protocols = fill_columns(rows, [])
    return Comparison("Pretraining runs", "", columns, rows, protocols, len(runs) * len(columns))


def folder_name(runs: Sequence[Path]) -> str:
    """The name of a row whose runs differ only in their seed."""
    return runs[0].name + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")


def fill_columns(rows: Sequence[Row], kinds: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Assign evaluations to columns, one per protocol and data. Fills ``scores`` and ``features`` of the rows; returns
    the columns, ``kinds`` first, and the protocol of each."""
    taken: dict[str, list[tuple[str, str]]] = {kind: [] for kind in kinds}
    for one in (one for row in rows for finished in row.results for one in finished):
        ways = taken.setdefault(one.evaluation, [])
        if (one.protocol, one.data) not in ways:
            ways.append((one.protocol, one.data))
    columns, protocols = [], {}
    for kind, ways in taken.items():
        several_data = len({data for _, data in ways}) > 1
        for number, (protocol, data) in enumerate(ways or [("", "")], 1):
            column = kind if len(ways) < 2 else f"{kind} ({number})"
            columns.append(column)
            if protocol:
                protocols[column] = protocol + (f", data {fingerprint(data)[:8]}" if several_data else "")
            for row in rows:
                own = [
                    o
                    for finished in row.results
                    for o in finished
                    if (o.evaluation, o.protocol, o.data) == (kind, protocol, data)
                ]
                row.scores[column] = [one.score for one in own]
                if own:
                    row.features[column] = own[0].feature
    return columns, protocols


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings under dotted names."""
    settings: dict[str, object] = {}
    for name, value in values.items():
        settings |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return settings


def row_names(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """For each row the settings in which it differs from the most common value (of equally common ones, the first), the
    method first; empty if there are none."""
    names = sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name != "method")
    values = {name: [canonical_json(row.get(name)) for row in rows] for name in names}
    usual = {name: max(each, key=each.count) for name, each in values.items()}
    return [
        ", ".join(f"{name}={row.get(name)}" for name in names if values[name][index] != usual[name])
        for index, row in enumerate(rows)
    ]


def add_run(
    row: Row,
    run: Path,
    scores: Mapping[str, list[Finished]],
    *,
    sets: Mapping[str, Path],
    along: str,
    labels: Sequence[str] = (),
) -> None:
    """Add a run to the row of its variant. ``sets``: target sets by fingerprint. ``labels``: of the run's teachers, as
    the comparison calls them."""
    if not is_artifact(run, "run"):
        return
    artifact = RunArtifact.open(run)
    settings = run_settings(run)
    if not row.teachers and settings.loss.target != "pixels":
        row.teachers = taught(artifact, settings, sets, labels)
        sizes = [teacher.latents for teacher in row.teachers]
        row.latents = None if None in sizes else sum(filter(None, sizes))
    row.along = row.latents if along == BYTES else numeric_setting(settings, along) if along else None
    lines, damaged = read_metrics(run / METRICS_FILE, (*CURVES, "images", "images_per_s"))
    if damaged:
        row.damaged[run] = damaged
    if not row.curves:
        # Cosines to pixels are not comparable with cosines to latents.
        names = [name for name in CURVES if name == "loss" or settings.loss.target != "pixels"]
        row.curves = {name: by_epoch(lines, name) for name in names}
        probes = read_probes(run / PROBE_FILE)
        row.probes = {
            name: [(line["epoch"] + 1, line[name]) for line in probes if is_number(line.get(name))] for name in PROBES
        }
    if not artifact.complete:
        epoch = lines[-1]["epoch"] + 1 if lines else 0
        row.unfinished.append((run, f"unfinished, epoch {epoch} of {settings.epochs}"))
        return
    row.runs.append(run)
    if lines:
        row.hours.append(device_hours(lines))
    row.results.append(scores.get(artifact.units["encoder"]["files"][WEIGHTS]["sha256"], []))


def taught(
    artifact: RunArtifact, settings: PretrainSettings, sets: Mapping[str, Path], labels: Sequence[str]
) -> list[Taught]:
    """The teachers of a run. Arguments as for ``add_run``; without ``labels`` a single teacher has the model's name."""
    facts, weights = artifact.facts, settings.loss.teachers or {}
    only: SeveralTeacher = {
        **facts["teacher"],
        "label": facts["teacher"]["name"],
        "targets": artifact.identity["targets"],
        "licences": facts.get("licences", {}),
        "stores": facts["stores"],
    }
    found = []
    for number, known in enumerate(facts.get("teachers", [only])):
        root = sets.get(known["targets"])
        found.append(
            Taught(
                label=labels[number] if labels else known["label"],
                weight=weights.get(known["label"], 1.0),
                licence=known["licences"].get("teacher", UNKNOWN),
                latents=TargetSet(root).bytes_per_view()["latents"] if root and settings.targets == "cached" else None,
            )
        )
    return found


def device_hours(lines: Sequence[dict[str, Any]]) -> float:
    """Device hours of a run, summed over devices."""
    timed = (line for line in lines if line["images_per_s"])
    seconds: float = sum(line["images"] / line["images_per_s"] * line.get("devices", 1) for line in timed)
    return seconds / 3600


def by_epoch(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The mean of a figure over the steps of each epoch."""
    figures: dict[int, list[float]] = {}
    for line in lines:
        figures.setdefault(line["epoch"], []).append(line[name])
    return [statistics.fmean(figures[epoch]) for epoch in sorted(figures)]
