"""The report of some runs: read their outputs, load their students, write one page.

Nothing is trained here. Pictures are made from stored views, with the students' newest checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.artifacts.atomic import write_bytes
from cae2pipe.comparison.gathering import gather_runs
from cae2pipe.comparison.rows import Comparison
from cae2pipe.comparison.scores import read_scores
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import Cae2pipeError, SettingsError
from cae2pipe.loading.joining import join_sets, labels_of, located
from cae2pipe.reporting.comparison_page import comparison_html
from cae2pipe.reporting.comparison_text import comparison_markdown
from cae2pipe.reporting.gallery import Gallery, MaskRow, NeighbourRow, nearest_views
from cae2pipe.reporting.output_folder import check_output
from cae2pipe.runtime.device import pick_device, set_backends
from cae2pipe.runtime.progress import Report
from cae2pipe.runtime.wording import counted
from cae2pipe.targets.chunks import BLOCK
from cae2pipe.targets.target_set import Target, TargetSet
from cae2pipe.training.student import image_features, load_student, mask_of, preview_latents, same_teacher

MARKDOWN, HTML = "report.md", "report.html"

SHOWN = 4
"""Number of stored views whose masks and latents are shown."""
QUERIES, NEAREST = 3, 6
"""Numbers of queries and of neighbours for each."""
BLOCKS = 8
"""Number of blocks of 64 views that are searched for neighbours."""


def report_runs(
    runs: Sequence[Path],
    scores: Sequence[Path],
    targets: Sequence[Path],
    *,
    out: Path,
    report: Report,
    device: str = "auto",
    pixels: Path | None = None,
) -> Comparison:
    """Write ``report.html`` and ``report.md`` of some runs into ``out``.

    Args:
        scores: folders with their evaluations, at any depth.
        targets: the sets for pictures, of several teachers over the same views; none: no pictures.
        pixels: the folder with the pixels of target sets by reference.

    Raises:
        ManifestError: a folder is not a run, or one of ``targets`` is not a target set. SettingsError: a run is given
        twice, or as ``join_sets``. MismatchError: as ``join_sets``. SourceError: a folder of scores does not exist.
        BadInputError: as ``check_output``.
    """
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        raise SettingsError("a run is given twice", where=", ".join(map(str, runs)), fix="give each run once")
    check_output(out)
    comparison = gather_runs(runs, read_scores(scores), targets)
    set_backends()
    sets: Sequence[TargetSet] = ()
    if targets:
        joined = located(join_sets([TargetSet(root) for root in targets]), pixels)
        sets = joined.sets
        if joined.note:
            report.log(joined.note)
    write_report(comparison, sets, out, report=report, device=pick_device(device))
    return comparison


def write_report(
    comparison: Comparison, sets: Sequence[TargetSet], out: Path, *, report: Report, device: torch.device
) -> None:
    """Write the report of a comparison. ``sets``: target sets for pictures, with the same views."""
    gallery = make_gallery(comparison, sets, report, device=device) if sets else Gallery()
    for name in gallery.left_out:
        report.log(f"no pictures of {name}")
    write_bytes(out / MARKDOWN, comparison_markdown(comparison).encode())
    write_bytes(out / HTML, comparison_html(comparison, gallery).encode())
    report.log(f"{comparison.done} of {counted(comparison.wanted, 'score')}")


@dataclass(frozen=True)
class Shown:
    """A target set and some of its views, for pictures of the teacher that ``name`` stands for."""

    name: str
    targets: TargetSet
    views: Sequence[Target]


def make_gallery(comparison: Comparison, sets: Sequence[TargetSet], report: Report, *, device: torch.device) -> Gallery:
    """Pictures of the first seed of every variant. Variants without pictures are listed with the reason."""
    for each in sets:
        _ = each.pixels_root  # a folder that has to be given is no reason for a page without pictures
    names = ["teacher"] if len(sets) == 1 else [f"teacher {name}" for name in labels_of(sets)]
    shown = [Shown(name, targets, sample_views(targets)) for name, targets in zip(names, sets, strict=True)]
    views = shown[0].views
    queries = [len(views) * number // QUERIES for number in range(QUERIES)]
    gallery = Gallery(views=[view.pixels for view in views], queries=queries)
    for one in shown:
        teacher = F.normalize(patches(one.targets, one.views).mean(dim=1), dim=-1)
        gallery.neighbours.append(NeighbourRow(one.name, nearest_views(teacher, queries, NEAREST)))
    for row in comparison.rows:
        if row.runs:
            report.phase(f"pictures of {row.name}")
            try:
                add_pictures(gallery, row.name, row.runs[0], shown=shown, report=report, device=device)
            except Cae2pipeError as error:
                gallery.left_out.append(f"{row.name} ({error.what})")
    return gallery


def add_pictures(
    gallery: Gallery, name: str, run: Path, *, shown: Sequence[Shown], report: Report, device: torch.device
) -> None:
    """Add a run's masks, its student's predictions of every teacher that it learned from, and its encoder's nearest
    neighbours."""
    artifact = RunArtifact.open(run)
    own = [one for one in shown if same_teacher(artifact, one.targets)]
    if not own:
        used, there = artifact.facts["teacher"]["name"], ", ".join(one.targets.teacher.name for one in shown)
        other = " (other weights or settings)" if used == there else ""
        raise SettingsError(f"teacher mismatch: run used {used}, target set has {there}{other}")
    for number, one in enumerate(own):
        targets, views = one.targets, one.views
        model, settings = load_student(run, targets, report)
        if settings.model.image_size != targets.view_size:
            size, stores = settings.model.image_size, targets.stores
            targets = TargetSet(targets.root, image_size=size, pixels=targets.pixels_root).only(stores)
            views = sample_views(targets)
        if settings.loss.target != "pixels":
            whose = name if model.masks else f"{name} (sees all patches)"
            previews = preview_latents(model, settings, targets, views=views[:SHOWN], device=device)
            gallery.previews.setdefault(one.name, {})[whose] = previews
        if number == 0:
            add_masks(gallery, settings, views[:SHOWN], masks=model.masks)
            features = image_features(model, views, device)
            gallery.neighbours.append(NeighbourRow(name, nearest_views(features, gallery.queries, NEAREST)))


def add_masks(gallery: Gallery, settings: PretrainSettings, views: Sequence[Target], *, masks: bool) -> None:
    """Add the masks of a run, unless its method has none or the same kind is there already."""
    patches_hidden = f"{settings.masked_patches} of {settings.model.grid**2} masked"
    row = MaskRow(
        f"{settings.mask.strategy}, {patches_hidden}",
        [view.pixels for view in views],
        [mask_of(settings, view) for view in views],
    )
    if masks and row.name not in [known.name for known in gallery.masks]:
        gallery.masks.append(row)


def sample_views(targets: TargetSet) -> list[Target]:
    """First views of a few hundred images, in blocks from all parts of the set."""
    blocks = -(-targets.images // BLOCK)
    chosen = sorted({number * blocks // BLOCKS for number in range(BLOCKS)})
    return [targets[i] for block in chosen for i in range(block * BLOCK, min(targets.images, (block + 1) * BLOCK))]


def patches(targets: TargetSet, views: Sequence[Target]) -> Tensor:
    """The teacher's patch latents of some views, (N, P, D)."""
    return torch.from_numpy(np.stack([view.tokens for view in views]))[:, targets.teacher.class_token :]
