"""Python API for many runs: grids; and pages about runs and about target sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cae2pipe.api.path_lists import Paths, known_pixels, local_paths, optional_local, optional_path, target_roots
from cae2pipe.api.settings import Overrides, given, resolve
from cae2pipe.api.telling import Progress, reporting
from cae2pipe.artifacts.arguments import checked
from cae2pipe.artifacts.artifact import is_artifact
from cae2pipe.artifacts.storage import to_local_path, to_path
from cae2pipe.artifacts.work_share import parse_part
from cae2pipe.comparison.rows import Comparison
from cae2pipe.config.base import Settings
from cae2pipe.config.compare import GridSettings
from cae2pipe.errors import SettingsError
from cae2pipe.reporting.comparison_text import cells, findings
from cae2pipe.stages.compare import compare as run_compare
from cae2pipe.stages.report import HTML, report_runs
from cae2pipe.stages.report_targets import TargetSetReport
from cae2pipe.stages.report_targets import report_targets as run_report_targets
from cae2pipe.targets.target_set import TargetSet


@dataclass(frozen=True)
class Compared:
    """Runs side by side: ``page`` is the report, ``comparison`` the data in it."""

    page: Path
    comparison: Comparison

    def table(self) -> list[dict[str, str]]:
        """One row per variant, as text: scores with their spread over seeds, loss, bytes, time."""
        headers, rows = cells(self.comparison)
        return [dict(zip(headers, row, strict=True)) for row in rows]

    def findings(self) -> list[str]:
        """Whether the paper's order of the variants holds here, one sentence per score."""
        return list(findings(self.comparison))


def report_name(grid: str, small: bool) -> str:
    """The name of a grid's report: the preset, or the file name without its suffix."""
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(grid).stem).strip("-") or "grid"
    return plain + ("-small" if small else "")


@checked
def compare(
    grid: str | Path | Settings,
    targets: str | Path | Sequence[str | Path],
    data: str | Path,
    *,
    out: str | Path,
    overrides: Overrides = None,
    name: str | None = None,
    small: bool = False,
    part: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = True,
) -> Compared | None:
    """Train and score every run of a grid, and write a report: ``cae2pipe compare``. Existing results are reused.

    Args:
        grid: preset, YAML file or settings.
        targets: a target set; or several, of other teachers over the same views. Variants that name no ``sets`` train
            from all of them.
        data: labelled images with train and val.
        out: the folder of runs, scores and reports; grids may share one.
        overrides: settings of the grid to change.
        name: of the report; the preset's if None.
        small: the grid's small scale.
        part: ``K/N``, one of N shares of the runs.
        workers: processes of every run.
        device: auto, cpu, cuda, cuda:1, ...

    Returns:
        The comparison; under torchrun, None in all processes but the main one.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    located = {"set.data.pixels": known_pixels(targets)}
    settings = resolve(GridSettings, "compare", grid, overrides=overrides, arguments=located)
    called = name or report_name("grid" if isinstance(grid, Settings) else str(grid), small)
    folder = to_local_path(out, output=True)
    with reporting(progress, "compare") as report:
        comparison = run_compare(
            settings,
            called,
            target_roots(targets),
            data=to_local_path(data),
            out=folder,
            report=report,
            small=small,
            part=parse_part(part) if part else None,
            speed=given(workers=workers, device=device),
        )
    return Compared(folder / "reports" / called / HTML, comparison) if comparison else None


@checked
def report(
    runs: Paths,
    *,
    out: str | Path = "report",
    targets: str | Path | Sequence[str | Path] | None = None,
    pixels: str | Path | None = None,
    scores: Paths = (),
    device: str = "auto",
    progress: Progress = True,
) -> Compared:
    """Write one page about some runs: ``cae2pipe report RUN...``.

    Args:
        runs: folders of ``pretrain``, finished or not.
        out: the folder of ``report.html`` and ``report.md``.
        targets: a target set for pictures; or several, of other teachers over its views.
        pixels: the folder or URL with the pixels of target sets by reference; by default that of an open set.
        scores: folders with evaluations of the runs, at any depth.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    folders = local_paths(runs)
    if not folders:
        raise SettingsError("no run is given", where="runs", fix="give at least one run of pretrain")
    for folder in folders:
        if is_artifact(folder, "targets"):
            raise SettingsError(
                "this is a target set, not a run",
                where=folder,
                fix="call report_targets for a page about it, or report(runs, targets=...) for pictures from it",
            )
    with reporting(progress, "report") as told:
        comparison = report_runs(
            folders,
            local_paths(scores),
            target_roots(targets) if targets else [],
            out=to_path(out),
            report=told,
            device=device,
            pixels=known_pixels(targets, pixels),
        )
    return Compared(to_path(out) / HTML, comparison)


@checked
def report_targets(
    targets: TargetSet | str | Path,
    *,
    out: str | Path = "report",
    source: str | Path | None = None,
    live: int = 0,
    teacher_weights: str | Path | None = None,
    device: str = "auto",
    pixels: str | Path | None = None,
    progress: Progress = True,
) -> TargetSetReport:
    """Write one page about a target set: ``cae2pipe report TARGETS``. The set may be incomplete or damaged.

    Args:
        targets: an open target set, its folder or URL. out: the folder of ``report.html``.
        source: the shard set that it was made from, for originals and rejected images; None: the one inside it.
        live: number of stored views to run the teacher on, for fidelity by component and token.
        teacher_weights: a local file, if the teacher's weights came from one. device: where the teacher runs.
        pixels: the folder or URL with the pixels of a set by reference; by default that of an open set.

    Raises:
        Cae2pipeError: says what is wrong, where, and how to fix it.
    """
    root = to_path(targets)
    if is_artifact(root, "run"):
        raise SettingsError("this is a run, not a target set", where=root, fix="call report for a page about it")
    with reporting(progress, "report") as told:
        return run_report_targets(
            root,
            to_path(out),
            report=told,
            source=optional_path(source),
            live=live,
            weights=optional_local(teacher_weights),
            device=device,
            pixels=known_pixels(targets, pixels),
        )
