"""Runs side by side: what is finished of them, means and spreads over seeds, the paper's figures, cost."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cae2pipe.artifacts.box import MANIFEST, Box, is_box, open_box
from cae2pipe.artifacts.digest import canonical_json
from cae2pipe.config.base import build
from cae2pipe.config.compare import BYTES, GridSettings, setting
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.models.export import WEIGHTS
from cae2pipe.reporting.results import HEADLINES
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.metrics import read_lines

BLANK = "–"
READ = {"mean": "the mean patch", "class": "the class token"}
CURVES = {"loss": "loss", "centred_cosine_masked": "centred cosine, masked patches"}
"""Figures of ``metrics.jsonl`` that are drawn over epochs, with what they are called."""


@dataclass
class Row:
    """One variant, over its seeds.

    ``scores`` by evaluation, one a seed, as shares of 1; ``paper``: the paper's own, in percent; ``runs``: folders of
    what is finished; ``curves``: means by epoch of the first of them, by name as in ``CURVES``; ``hours``: device hours
    of each; ``latents``: bytes that stored latents take a view, where the target set is known; ``features``: what of
    the encoder each evaluation read; ``along``: where on the comparison's axis, ``line`` on which curve.
    """

    name: str
    scores: dict[str, list[float]] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    runs: list[Path] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    hours: list[float] = field(default_factory=list)
    latents: float | None = None
    features: dict[str, str] = field(default_factory=dict)
    along: float | None = None
    line: str = ""

    def mean(self, kind: str) -> float | None:
        """The mean score over seeds, None without one."""
        return statistics.fmean(self.scores[kind]) if self.scores.get(kind) else None

    def error(self, kind: str) -> float:
        """The standard error of that mean; 0 for a single seed, which says nothing of it."""
        found = self.scores[kind]
        return statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0


@dataclass
class Comparison:
    """What is there of a grid, or of some runs. ``protocols``: how each evaluation's scores were taken; ``along``:
    what the axis measures, or empty; ``wanted``: scores that there are to be, in all."""

    title: str
    about: str
    kinds: list[str]
    rows: list[Row]
    protocols: dict[str, str]
    wanted: int
    along: str = ""

    @property
    def done(self) -> int:
        return sum(len(found) for row in self.rows for found in row.scores.values())

    @property
    def seeds(self) -> int:
        """Runs of the variant that has most."""
        return max((len(row.runs) for row in self.rows), default=0)


Scores = dict[str, dict[str, dict[str, Any]]]
"""Results by the encoder's SHA-256, then by evaluation."""


def read_scores(roots: Iterable[Path]) -> Scores:
    """All finished evaluations of exported encoders in or below some folders."""
    found: Scores = {}
    for root in roots:
        for manifest in sorted(root.rglob(MANIFEST)):
            if not is_box(manifest.parent, "scores"):
                continue
            box = open_box(manifest.parent)
            digest, result = box.identity["encoder"].get("sha256"), box.facts.get("result")
            if digest and result:
                found.setdefault(digest, {}).setdefault(result["evaluation"], result)
    return found


def gather_grid(grid: GridSettings, planned: Sequence[tuple[int, str]], out: Path, sets: Sequence[Path]) -> Comparison:
    """All that is finished of a grid below ``out``.

    Args:
        planned: variant's place and folder's name of each run. sets: the target sets that were trained on.
    """
    kinds = [scored.kind for scored in grid.evaluate]
    rows = [Row(v.name, {kind: [] for kind in kinds}, v.paper, line=v.line) for v in grid.variants]
    protocols: dict[str, str] = {}
    known, scores = {open_box(path).fingerprint: path for path in sets}, read_scores([out / "scores"])
    for place, name in planned:
        add_run(rows[place], out / "runs" / name, scores, protocols, known, grid.along)
    wanted = len(planned) * len(kinds)
    return Comparison(grid.title, grid.about.strip(), list(kinds), rows, protocols, wanted, grid.along)


def gather_runs(runs: Sequence[Path], scores: Scores, sets: Sequence[Path]) -> Comparison:
    """Some runs, those that differ by their seed alone in one row, named by the settings that set it apart, or else by
    its first folder.

    Raises:
        ManifestError: a folder is no run.
    """
    groups: dict[str, list[Path]] = {}
    differing: dict[str, dict[str, Any]] = {}
    for run in runs:
        box = open_box(run, "run")
        values = {**flat(box.identity["settings"]), "targets": box.identity["targets"][:8]}
        values.pop("seed")
        key = canonical_json(values)
        groups.setdefault(key, []).append(run)
        differing[key] = values
    names = row_names(list(differing.values()))
    rows = [Row(name or group[0].name) for name, group in zip(names, groups.values(), strict=True)]
    protocols: dict[str, str] = {}
    known = {open_box(path).fingerprint: path for path in sets}
    for row, group in zip(rows, groups.values(), strict=True):
        for run in group:
            add_run(row, run, scores, protocols, known, "")
    kinds = list(protocols)
    return Comparison("Pretraining runs", "", kinds, rows, protocols, len(runs) * len(kinds))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def row_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row the settings in which it is not as most rows are (of two as common, as the first); empty where there
    are none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [canonical_json(row.get(name)) for row in rows] for name in names}
    usual = {name: max(found, key=found.count) for name, found in values.items()}
    return [
        ", ".join(f"{name}={row.get(name)}" for name in names if values[name][place] != usual[name])
        for place, row in enumerate(rows)
    ]


def add_run(
    row: Row, run: Path, scores: Scores, protocols: dict[str, str], sets: Mapping[str, Path], along: str
) -> None:
    """Add a run to its variant, if it is finished. ``sets``: target sets by fingerprint."""
    if not is_box(run, "run"):
        return
    box = open_box(run)
    targets = sets.get(box.identity["targets"])
    if targets and row.latents is None and reads_latents(box):
        row.latents = TargetSet(targets).bytes_per_view()["latents"]
    if along == BYTES:
        row.along = row.latents
    elif along:
        value = setting(build(PretrainSettings, box.identity["settings"], where=run), along)
        row.along = value if isinstance(value, int | float) else None
    if not box.complete:
        return
    row.runs.append(run)
    lines = read_lines(run / "metrics.jsonl")
    row.hours.append(device_hours(lines))
    if not row.curves:
        # Cosines with pixels say nothing beside those with latents.
        pixels = box.identity["settings"]["loss"].get("target") == "pixels"
        row.curves = {name: by_epoch(lines, name) for name in CURVES if name == "loss" or not pixels}
    for kind, result in scores.get(box.units["encoder"]["files"][WEIGHTS]["sha256"], {}).items():
        row.scores.setdefault(kind, []).append(result[HEADLINES.get(kind, ("top1", ""))[0]])
        row.features[kind] = result["feature"]
        protocols.setdefault(kind, result["protocol"])


def reads_latents(run: Box) -> bool:
    """Whether a run trains on stored latents."""
    settings = run.identity["settings"]
    return bool(settings["targets"] == "cached" and settings["loss"].get("target") != "pixels")


def device_hours(lines: Sequence[dict[str, Any]]) -> float:
    """Hours that all devices of a run were busy, together."""
    timed = (line for line in lines if line["images_per_s"])
    return sum(line["images"] / line["images_per_s"] * line.get("devices", 1) for line in timed) / 3600


def by_epoch(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    """A figure's mean over the steps of each epoch."""
    found: dict[int, list[float]] = {}
    for line in lines:
        found.setdefault(line["epoch"], []).append(line[name])
    return [statistics.fmean(found[epoch]) for epoch in sorted(found)]


def spread(values: Sequence[float]) -> str:
    """Percent: the mean, with the standard deviation over seeds where there are several."""
    if not values:
        return BLANK
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def order_of(rows: Sequence[Row], kind: str) -> str:
    """Names from the best to the worst; ``≈`` between neighbours that are nearer than a standard error of their
    difference."""
    ranked = sorted(rows, key=lambda row: -(row.mean(kind) or 0.0))
    return chained(ranked, lambda before, after: " > " if better(before, after, kind) else " ≈ ")


def chained(rows: Sequence[Row], sign: Callable[[Row, Row], str]) -> str:
    """Names of rows with a sign between each and the next."""
    return rows[0].name + "".join(sign(before, after) + after.name for before, after in itertools.pairwise(rows))


def better(first: Row, second: Row, kind: str) -> bool:
    """Whether the first one's mean is above the second one's by more than the standard error of the difference."""
    a, b = first.mean(kind), second.mean(kind)
    assert a is not None
    assert b is not None
    return a - b > math.hypot(first.error(kind), second.error(kind))


def findings(found: Comparison) -> list[str]:
    """For each evaluation that the paper has too: whether its order of the variants holds here."""
    lines = []
    for kind in found.kinds:
        rows = [row for row in found.rows if kind in row.paper and row.mean(kind) is not None]
        if len(rows) > 1:
            lines.append(finding(rows, kind))
    return lines


def finding(rows: Sequence[Row], kind: str) -> str:
    """Whether the paper's order of some variants, all of which have its figure and one here, holds."""
    ranked = sorted(rows, key=lambda row: -row.paper[kind])
    paper = chained(ranked, lambda before, after: " > " if before.paper[kind] > after.paper[kind] else " = ")
    pairs = [(a, b) for a in rows for b in rows if a.paper[kind] > b.paper[kind]]
    against = [f"{b.name} is above {a.name}" for a, b in pairs if better(b, a, kind)]
    unsure = [f"{a.name}, {b.name}" for a, b in pairs if not better(a, b, kind)]
    if against:
        verdict = "does not hold: " + "; ".join(against)
    elif unsure:
        verdict = "holds, but for what is too near to tell: " + "; ".join(unsure)
    else:
        verdict = "holds"
    seeds = min(len(row.scores[kind]) for row in rows)
    doubt = " (one seed: of their spread this says nothing)" if seeds == 1 else ""
    return f"{kind}: the paper's order, {paper}, {verdict}{doubt}. Here {order_of(rows, kind)}."


def cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table."""
    papers = [kind for kind in found.kinds if any(kind in row.paper for row in found.rows)]
    long = any(hours >= 1 for row in found.rows for hours in row.hours)
    time = "device h a run" if long else "device min a run"
    headers = ["variant", *found.kinds, *(f"{kind}, paper" for kind in papers), "loss", "kB a view", time]
    rows = []
    for row in found.rows:
        paper = [f"{row.paper[kind]:.1f}" if kind in row.paper else BLANK for kind in papers]
        losses = row.curves.get("loss")
        loss = f"{losses[-1]:.3f}" if losses else BLANK
        size = BLANK if row.latents is None else f"{row.latents / 1000:.1f}"
        took = f"{statistics.fmean(row.hours) * (1 if long else 60):.3g}" if row.hours else BLANK
        rows.append([row.name, *(spread(row.scores.get(kind, [])) for kind in found.kinds), *paper, loss, size, took])
    return headers, rows


def notes(found: Comparison) -> list[str]:
    """What must be known to read the table."""
    lines = [
        f"{found.done} of {found.wanted} scores, {found.seeds} seed{'s' if found.seeds != 1 else ''}; percent, mean ± "
        "standard deviation over seeds. loss: mean of the last epoch of the first seed, each variant's own; kB a view: "
        "stored latents; the time is that of training alone, over all devices."
    ]
    for kind, protocol in found.protocols.items():
        features = sorted({row.features[kind] for row in found.rows if kind in row.features})
        lines.append(f"{kind}: {protocol}; on {', '.join(READ.get(name, name) for name in features)}.")
    return lines


def comparison_markdown(found: Comparison) -> str:
    """The report in Markdown."""
    headers, rows = cells(found)
    lines = [f"# {found.title}", "", *([found.about, ""] if found.about else [])]
    lines += ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines += ["", *(f"- {line}" for line in (*findings(found), *notes(found)))]
    lines += ["", "| variant | runs |", "|---|---|"]
    lines += [f"| {row.name} | {', '.join(run.name for run in row.runs) or BLANK} |" for row in found.rows]
    return "\n".join(lines).rstrip() + "\n"
