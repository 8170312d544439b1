"""The report of some runs: read their outputs, load their students, write one page.

Nothing is trained here. Pictures are made from stored views, with the students' newest checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from cae2pipe.errors import Cae2pipeError, SettingsError
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
    targets: Path | None,
    *,
    out: Path,
    report: Report,
    device: str = "auto",
    pixels: Path | None = None,
) -> Comparison:
    """Write ``report.html`` and ``report.md`` of some runs into ``out``.

    Args:
        scores: folders with their evaluations, at any depth. targets: the target set for pictures; None: no pictures.
        pixels: the folder with the pixels of a target set by reference.

    Raises:
        ManifestError: a folder is not a run, or ``targets`` is not a target set. SettingsError: a run is given twice.
        SourceError: a folder of scores does not exist. BadInputError: as ``check_output``.
    """
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        raise SettingsError("a run is given twice", where=", ".join(map(str, runs)), fix="give each run once")
    check_output(out)
    comparison = gather_runs(runs, read_scores(scores), [] if targets is None else [targets])
    set_backends()
    write_report(comparison, targets, out, report=report, device=pick_device(device), pixels=pixels)
    return comparison


def write_report(
    comparison: Comparison,
    targets: Path | None,
    out: Path,
    *,
    report: Report,
    device: torch.device,
    pixels: Path | str | None = None,
) -> None:
    """Write the report of a comparison."""
    gallery = Gallery()
    if targets is not None:
        gallery = make_gallery(comparison, TargetSet(targets, pixels=pixels), report, device=device)
    write_bytes(out / MARKDOWN, comparison_markdown(comparison).encode())
    write_bytes(out / HTML, comparison_html(comparison, gallery).encode())
    report.log(f"{comparison.done} of {counted(comparison.wanted, 'score')}")


def make_gallery(comparison: Comparison, targets: TargetSet, report: Report, *, device: torch.device) -> Gallery:
    """Pictures of the first seed of every variant. Variants without pictures are listed with the reason."""
    _ = targets.pixels_root  # a folder that has to be given is no reason for a page without pictures
    views = sample_views(targets)
    queries = [len(views) * number // QUERIES for number in range(QUERIES)]
    teacher = F.normalize(patches(targets, views).mean(dim=1), dim=-1)
    gallery = Gallery(views=[view.pixels for view in views], queries=queries)
    gallery.neighbours.append(NeighbourRow("teacher", nearest_views(teacher, queries, NEAREST)))
    for row in comparison.rows:
        if row.runs:
            report.phase(f"pictures of {row.name}")
            try:
                add_pictures(gallery, row.name, row.runs[0], targets=targets, views=views, report=report, device=device)
            except Cae2pipeError as error:
                gallery.left_out.append(f"{row.name} ({error.what})")
    return gallery


def add_pictures(
    gallery: Gallery,
    name: str,
    run: Path,
    *,
    targets: TargetSet,
    views: Sequence[Target],
    report: Report,
    device: torch.device,
) -> None:
    """Add a run's masks, its student's predictions, and its encoder's nearest neighbours."""
    artifact = RunArtifact.open(run)
    if not same_teacher(artifact, targets):
        used, there = artifact.facts["teacher"]["name"], targets.teacher.name
        other = " (other weights or settings)" if used == there else ""
        raise SettingsError(f"teacher mismatch: run used {used}, target set has {there}{other}")
    shown = views[:SHOWN]
    model, settings = load_student(run, targets, report)
    if settings.model.image_size != targets.view_size:
        targets = TargetSet(targets.root, image_size=settings.model.image_size, pixels=targets.pixels_root)
        views = sample_views(targets)
        shown = views[:SHOWN]
    patches_hidden = f"{settings.masked_patches} of {settings.model.grid**2} masked"
    masks = MaskRow(
        f"{settings.mask.strategy}, {patches_hidden}",
        [view.pixels for view in shown],
        [mask_of(settings, view) for view in shown],
    )
    if model.masks and masks.name not in [row.name for row in gallery.masks]:
        gallery.masks.append(masks)
    if settings.loss.target != "pixels":
        whose = name if model.masks else f"{name} (sees all patches)"
        gallery.previews[whose] = preview_latents(model, settings, targets, views=shown, device=device)
    gallery.neighbours.append(
        NeighbourRow(name, nearest_views(image_features(model, views, device), gallery.queries, NEAREST))
    )


def sample_views(targets: TargetSet) -> list[Target]:
    """First views of a few hundred images, in blocks from all parts of the set."""
    blocks = -(-targets.images // BLOCK)
    chosen = sorted({number * blocks // BLOCKS for number in range(BLOCKS)})
    return [targets[i] for block in chosen for i in range(block * BLOCK, min(targets.images, (block + 1) * BLOCK))]


def patches(targets: TargetSet, views: Sequence[Target]) -> Tensor:
    """The teacher's patch latents of some views, (N, P, D)."""
    return torch.from_numpy(np.stack([view.tokens for view in views]))[:, targets.teacher.class_token :]
