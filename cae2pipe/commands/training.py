"""Stage 2: pretrain, replay, export."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cae2pipe.commands.jobs import run_jobs
from cae2pipe.commands.shared import Device, Out, Set, Workers, console, exits, folder, path_or_url, section


def pretrain(
    targets: Annotated[
        Path,
        typer.Argument(
            metavar="TARGETS", help="A target set made by extract-targets (folder or URL).", parser=path_or_url
        ),
    ],
    out: Out,
    config: Annotated[str, typer.Option(help="Preset (tiny, small, base, large, huge) or YAML file.")] = "base",
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    repeat_masks: Annotated[
        int | None, typer.Option(help="Masks that each loaded view is trained under in one step: where reading limits.")
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Run the teacher in every step instead of reading its latents.")
    ] = False,
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Stage 2: train a student from cached targets; ends with encoder.safetensors.

    Under torchrun (torchrun --nproc-per-node N -m cae2pipe pretrain ...) the ranks share every batch. SIGTERM (exit
    code 143) and SIGUSR1 (75) end the step, write a checkpoint and leave; the same command goes on.
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
            workers=workers,
            device=device,
        )


def replay(
    record: Annotated[Path, typer.Argument(metavar="FILE", help="A file of a run's folder failures/.")],
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; the run's own by default.")] = None,
) -> None:
    """Go again through a training step that was not finite, and say which sample or module breaks it."""
    with exits():
        from cae2pipe.runtime.terminal import print_table
        from cae2pipe.stages.replay import replay as run

        replayed = run(record, device or "auto", precision)
        names = (*replayed["terms"], "grad_norm")
        again = {**replayed["terms"], "grad_norm": replayed["grad_norm"]}
        rows = [{"value": n, "recorded": f"{replayed['recorded'][n]:.6g}", "again": f"{again[n]:.6g}"} for n in names]
        print_table(console, rows)
        print_table(console, [row | {"loss": f"{row['loss']:.6g}"} for row in replayed["samples"]])
        for title, values in (
            ("latents that are not finite", replayed["inputs"]),
            ("first module with such an output", [replayed["module"]] if replayed["module"] else []),
            ("weights with such gradients", first_few(replayed["gradients"])),
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
            metavar="RUN", help="A run folder, an encoder.safetensors, or a .pth that CAE's authors released."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.", parser=folder)],
    format_: Annotated[ExportFormat, typer.Option("--format", help="Whose layout; hf is transformers' ViTModel.")] = (
        ExportFormat.timm
    ),
    scores: Annotated[
        list[Path] | None, typer.Option(help="A folder with evaluations for the model card; may be repeated.")
    ] = None,
) -> None:
    """Write an encoder as timm, open_clip or transformers read it, with a model card."""
    with exits():
        from cae2pipe.api.runs import export

        for path in export(encoder, out, format=format_.value, scores=scores or []):
            console.say(str(path))


def compare(
    grid: Annotated[
        str,
        typer.Argument(
            metavar="GRID",
            help="Preset (table1 to table5, figure2, figure3, rivals, views, fidelity; `cae2pipe config list`) or YAML "
            "file.",
        ),
    ],
    targets: Annotated[
        Path, typer.Argument(metavar="TARGETS", help="A target set made by extract-targets.", parser=path_or_url)
    ],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Labelled images to score on, as evaluate takes them.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to make, or to go on with; grids may share one.", parser=folder),
    ],
    small: Annotated[bool, typer.Option("--small", help="The grid's small scale, for few cores.")] = False,
    part: Annotated[
        str | None, typer.Option(help="K/N: only the K-th of N shares of the runs, e.g. one share a machine.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at once, each in a process of its own and on a CUDA device of its own.")
    ] = 1,
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Train and score many variants on one target set; ends with OUT/reports/GRID/report.html and report.md.

    Run again, it goes on: what is trained or scored already stays as it is, be it for another grid.
    """
    with exits():
        if jobs > 1:
            if part:
                raise typer.BadParameter("--jobs shares out all runs itself: omit --part")
            _compare_jobs(
                grid, targets, data, out=out, set_=set_, small=small, jobs=jobs, workers=workers, device=device
            )
            return
        from cae2pipe.api.comparisons import compare

        compared = compare(
            grid, targets, data, out=out, overrides=set_, small=small, part=part, workers=workers, device=device
        )
        # Under torchrun one process has it.
        if compared:
            print_comparison(compared.comparison, compared.page.parent)


def _compare_jobs(
    grid: str,
    targets: Path,
    data: Path,
    *,
    out: Path,
    set_: list[str] | None,
    small: bool,
    jobs: int,
    workers: int | None,
    device: str | None,
) -> None:
    """Share a grid's runs out among processes of this machine, and write the report of what they made."""
    from cae2pipe.api.comparisons import report_name
    from cae2pipe.config.base import load
    from cae2pipe.config.compare import GridSettings
    from cae2pipe.errors import Cae2pipeError
    from cae2pipe.runtime.progress import progress
    from cae2pipe.runtime.ranks import torchrun_rank
    from cae2pipe.stages.compare import plan_grid, report_grid

    if torchrun_rank().ranks > 1:
        raise typer.BadParameter("--jobs shares out all runs itself: omit torchrun")
    settings = load(GridSettings, "compare", grid, overrides=set_ or [])
    speed = section("speed", workers=workers, device=device).get("speed", {})
    # What is wrong with the grid is told once, not by every job.
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
    targets: Path,
    data: Path,
    out: Path,
    part: Any,
    device: str | None,
    *,
    small: bool,
    speed: dict[str, Any],
) -> None:
    from cae2pipe.runtime.progress import Lines
    from cae2pipe.stages.compare import plan_grid, run_part

    own = {**speed, "device": device} if device else speed
    plan = plan_grid(settings, targets, data, out=out, small=small, speed=own)
    report = Lines(f"compare {part}", sys.stderr)
    failed = run_part(settings, plan, targets, data=data, out=out, report=report, part=part)
    if failed:
        raise next(iter(failed.values()))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs of pretrain, finished or not.")],
    out: Annotated[
        Path, typer.Option(help="The folder to write report.html and report.md into.", parser=folder)
    ] = Path("report"),
    targets: Annotated[
        Path | None,
        typer.Option(help="A target set to make pictures from: masks, latents, neighbours.", parser=path_or_url),
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="A folder with evaluations of the runs, at any depth; may be repeated.")
    ] = None,
    device: Device = None,
) -> None:
    """One page about some runs: scores, losses, cost, pictures. Runs that differ by their seed alone share a row."""
    with exits():
        from cae2pipe.runtime.progress import progress
        from cae2pipe.stages.report import report_runs

        with progress("report") as progress_report:
            comparison = report_runs(
                runs, scores or [], targets, out=out, report=progress_report, device=device or "auto"
            )
        print_comparison(comparison, out)


def print_comparison(comparison: Any, folder: Path) -> None:
    """A comparison's table, what it says, and where its page is."""
    from cae2pipe.reporting.comparison_text import cells, findings
    from cae2pipe.runtime.terminal import print_table

    headers, rows = cells(comparison)
    print_table(console, [dict(zip(headers, row, strict=True)) for row in rows])
    for line in (*findings(comparison), f"report: {folder / 'report.html'}"):
        console.say(line)
