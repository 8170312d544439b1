"""Stage 2: pretrain, replay, export."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cae2pipe.commands.jobs import run_jobs
from cae2pipe.commands.shared import (
    Device,
    LocalOut,
    Pixels,
    Set,
    Workers,
    console,
    exits,
    folder_or_url,
    local_folder,
    local_path,
    path_or_url,
)


class PretrainCommand(TyperCommand):
    """Says of a target set alone that the run is missing: the parser takes the last name for the run, and misses the
    sets."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if error.param is None or error.param.name != "targets":
                raise
            from cae2pipe.artifacts.artifact import is_artifact
            from cae2pipe.errors import command

            only = self.make_parser(ctx).parse_args(given)[0].get("out")
            if not (isinstance(only, str) and is_artifact(path_or_url(only), "targets")):
                raise
            what = f"this is a target set, and the folder of the run is missing: {command('pretrain', only, 'RUN')}"
            raise typer.BadParameter(what, ctx=ctx, param_hint="OUT") from None


def pretrain(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="TARGETS...",
            help="A target set made by extract-targets (folder or URL); or several, of other teachers over its views.",
            parser=path_or_url,
        ),
    ],
    out: LocalOut,
    config: Annotated[str, typer.Option(help="Preset (tiny, small, base, large, huge) or YAML file.")] = "base",
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    repeat_masks: Annotated[
        int | None, typer.Option(help="Masks per loaded view and step; use it if reading is the bottleneck.")
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Run the teacher in every step instead of reading its latents.")
    ] = False,
    probe: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Measure kNN accuracy during training, on a folder with train and val, as evaluate.",
            parser=local_path,
        ),
    ] = None,
    probe_targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGETS",
            help="Measure the loss on this target set of held-out images (same teacher; repeatable: a set of each).",
        ),
    ] = None,
    every: Annotated[int | None, typer.Option(help="Epochs between these measurements (default: 10).")] = None,
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Stage 2: train a student from cached targets; ends with encoder.safetensors.

    Under torchrun (torchrun --nproc-per-node N -m cae2pipe pretrain ...) the ranks share every batch. On SIGTERM
    (exit code 143) and SIGUSR1 (75) the step is finished and a checkpoint written; rerun the same command to resume.
    """
    with exits():
        from cae2pipe.api.runs import pretrain

        pretrain(
            targets,
            out,
            config=config,
            overrides=set_,
            epochs=epochs,
            repeat_masks=repeat_masks,
            online=online,
            probe=probe,
            probe_targets=probe_targets,
            every=every,
            workers=workers,
            device=device,
        )


def replay(
    record: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file from the folder failures/ of a run.", parser=local_path)
    ],
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16 (default: the run's).")] = None,
) -> None:
    """Replay a training step with a NaN or Inf, and show which sample or module causes it."""
    with exits():
        from cae2pipe.runtime.terminal import print_table
        from cae2pipe.stages.replay import replay as run

        replayed = run(record, device or "auto", precision)
        names = (*replayed["terms"], "grad_norm")
        again = {**replayed["terms"], "grad_norm": replayed["grad_norm"]}
        rows = [
            {"value": n, "recorded": f"{replayed['recorded'][n]:.6g}", "replayed": f"{again[n]:.6g}"} for n in names
        ]
        print_table(console, rows)
        print_table(console, [row | {"loss": f"{row['loss']:.6g}"} for row in replayed["samples"]])
        for title, values in (
            ("non-finite latents", replayed["inputs"]),
            ("first module with a non-finite output", [replayed["module"]] if replayed["module"] else []),
            ("weights with non-finite gradients", first_few(replayed["gradients"])),
        ):
            console.say(f"{title}: {', '.join(values) or 'none'}")


def first_few(names: list[str], most: int = 5) -> list[str]:
    """The first few of many names, and how many more there are."""
    return names if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]


class ExportFormat(StrEnum):
    timm = "timm"
    open_clip = "open_clip"
    hf = "hf"


def export(
    encoder: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run folder, an encoder.safetensors, or a .pth released by CAE's authors."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder, not a URL.", parser=local_folder)],
    format_: Annotated[ExportFormat, typer.Option("--format", help="Target library; hf: transformers' ViTModel.")] = (
        ExportFormat.timm
    ),
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with evaluations for the model card (repeatable).", parser=local_path),
    ] = None,
) -> None:
    """Export an encoder for timm, open_clip or transformers, with a model card."""
    with exits():
        from cae2pipe.api.runs import export
        from cae2pipe.runtime.progress import progress

        with progress("export", brief=True) as report:
            report.phase(f"writing {encoder} for {format_.value}")
            files = export(encoder, out, format=format_.value, scores=scores or [])
        for path in files:
            console.say(str(path))


def compare(
    grid: Annotated[
        str,
        typer.Argument(
            metavar="GRID",
            help="Preset (table1 to table5, figure2, figure3, rivals, views, fidelity, teachers; `cae2pipe config "
            "list`) or YAML file.",
        ),
    ],
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="TARGETS...",
            help="A target set made by extract-targets; or several, of other teachers over its views. Students then "
            "learn from all of them, but where the grid names the sets of a variant, as `teachers` does.",
            parser=path_or_url,
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Labelled images for evaluation: a folder with train and val.", parser=local_path
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Output folder, not a URL (created, or resumed if it exists); grids may share it.",
            parser=local_folder,
        ),
    ],
    small: Annotated[bool, typer.Option("--small", help="The grid's small scale, for few cores.")] = False,
    part: Annotated[
        str | None, typer.Option(help="K/N: only the K-th of N shares of the runs, e.g. one share per machine.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Parallel runs, each in its own process and on its own CUDA device.")
    ] = 1,
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Train and score many variants on the same views; ends with OUT/reports/GRID/report.html and report.md.

    Rerun the same command to resume. Finished runs and scores are reused, also those of other grids.
    """
    with exits():
        if jobs > 1:
            if part:
                raise typer.BadParameter("--jobs splits the runs itself: omit --part")
            _compare_jobs(
                grid, targets, data, out=out, set_=set_, small=small, jobs=jobs, workers=workers, device=device
            )
            return
        from cae2pipe.api.comparisons import compare

        compared = compare(
            grid, targets, data, out=out, overrides=set_, small=small, part=part, workers=workers, device=device
        )
        # Under torchrun, only one process has it.
        if compared:
            print_comparison(compared.comparison, compared.page.parent)


def _compare_jobs(
    grid: str,
    targets: list[Path],
    data: Path,
    *,
    out: Path,
    set_: list[str] | None,
    small: bool,
    jobs: int,
    workers: int | None,
    device: str | None,
) -> None:
    """Split a grid's runs among processes of this machine, then write the report."""
    from cae2pipe.api.comparisons import report_name
    from cae2pipe.api.settings import given
    from cae2pipe.config.base import load
    from cae2pipe.config.compare import GridSettings
    from cae2pipe.errors import Cae2pipeError
    from cae2pipe.evaluation.grid_plan import plan_grid
    from cae2pipe.runtime.progress import progress
    from cae2pipe.runtime.ranks import torchrun_rank
    from cae2pipe.stages.compare import report_grid

    if torchrun_rank().ranks > 1:
        raise typer.BadParameter("--jobs splits the runs itself: start it without torchrun")
    settings = load(GridSettings, "compare", grid, overrides=set_ or [])
    speed = given(workers=workers, device=device)
    # So that errors in the grid are reported once, not by every job.
    plan_grid(settings, targets, data, out=out, small=small, speed=speed)
    failed: Cae2pipeError | None = None
    try:
        run_jobs(partial(_compare_part, settings, targets, data, out, small=small, speed=speed), jobs, device)
    except Cae2pipeError as error:
        failed = error
    name = report_name(grid, small)
    with progress("compare") as report:
        comparison = report_grid(settings, name, targets, data=data, out=out, report=report, small=small, speed=speed)
    print_comparison(comparison, out / "reports" / name)
    if failed:
        raise failed


def _compare_part(
    settings: Any,
    targets: list[Path],
    data: Path,
    out: Path,
    part: Any,
    device: str | None,
    *,
    small: bool,
    speed: dict[str, Any],
) -> None:
    from cae2pipe.evaluation.grid_plan import plan_grid
    from cae2pipe.runtime.progress import Lines
    from cae2pipe.stages.compare import run_part

    own = {**speed, "device": device} if device else speed
    plan = plan_grid(settings, targets, data, out=out, small=small, speed=own)
    report = Lines(f"compare {part}", sys.stderr)
    failed = run_part(plan, data=data, out=out, report=report, part=part)
    if failed:
        raise next(iter(failed.values()))


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Runs of pretrain, finished or not; or one target set (folder or URL).",
            parser=path_or_url,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder (or URL) for report.html and, for runs, report.md.", parser=folder_or_url)
    ] = Path("report"),
    targets: Annotated[
        list[Path] | None,
        typer.Option(
            help="For runs: a target set for pictures of masks, latents and neighbours (repeatable: a set of each "
            "teacher).",
            parser=path_or_url,
        ),
    ] = None,
    pixels: Pixels = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="For runs: a folder with evaluations of them, at any depth (repeatable).", parser=local_path),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            help="For a target set: its shard set, for originals and rejected images (default: the one inside it).",
            parser=path_or_url,
        ),
    ] = None,
    live: Annotated[
        int,
        typer.Option(
            min=0,
            help="For a target set: also run its teacher on N stored views, to show where latents lose fidelity.",
            metavar="N",
        ),
    ] = 0,
    teacher_weights: Annotated[
        Path | None,
        typer.Option(help="With --live: the teacher's weights, if they came from a local file.", parser=local_path),
    ] = None,
    device: Device = None,
) -> None:
    """Write one page about some runs, or about a target set.

    Of runs: scores, losses, cost, pictures; runs that differ only in their seed share a row. Of a target set: views,
    latents, fidelity, bytes, coverage, classes, rejected images.
    """
    with exits():
        from cae2pipe.api import comparisons
        from cae2pipe.stages.report_targets import only_target_set

        target_set = only_target_set(paths)
        of_runs = {"--targets": targets, "--scores": scores}
        of_sets = {"--source": source, "--live": live, "--teacher-weights": teacher_weights}
        refuse_given(of_sets if target_set is None else of_runs, "runs" if target_set is None else "a target set")
        if target_set is not None:
            shown = comparisons.report_targets(
                target_set,
                out=out,
                source=source,
                live=live,
                teacher_weights=teacher_weights,
                device=device or "auto",
                pixels=pixels,
            )
            console.say(f"report: {shown.page}")
        else:
            compared = comparisons.report(
                paths, out=out, targets=targets or (), pixels=pixels, scores=scores or (), device=device or "auto"
            )
            print_comparison(compared.comparison, out)


def refuse_given(options: dict[str, Any], kind: str) -> None:
    """Raise SettingsError if an option is given that does not apply to the report of ``kind``."""
    from cae2pipe.errors import SettingsError

    if given := [name for name, value in options.items() if value]:
        raise SettingsError(f"this option does not apply to a report of {kind}", where=given[0], fix="omit it")


def print_comparison(comparison: Any, folder: Path) -> None:
    """Print a comparison's table, its findings, and the path of its page."""
    from cae2pipe.reporting.comparison_text import cells, findings
    from cae2pipe.runtime.terminal import print_table

    headers, rows = cells(comparison)
    print_table(console, [dict(zip(headers, row, strict=True)) for row in rows])
    for line in (*findings(comparison), f"report: {folder / 'report.html'}"):
        console.say(line)
