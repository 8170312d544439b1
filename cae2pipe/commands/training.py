"""Stage 2: pretrain, replay, export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cae2pipe.commands.jobs import run_jobs
from cae2pipe.commands.shared import Device, Out, Set, Workers, console, exits, folder, place, section


def pretrain(
    targets: Annotated[
        Path,
        typer.Argument(metavar="TARGETS", help="A target set made by extract-targets (folder or URL).", parser=place),
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
        from cae2pipe.config.base import load
        from cae2pipe.config.pretrain import PretrainSettings
        from cae2pipe.runtime.progress import progress

        values = {
            **({} if epochs is None else {"epochs": epochs}),
            **({"targets": "online"} if online else {}),
            **section("mask", repeat=repeat_masks),
            **section("speed", workers=workers, device=device),
        }
        settings = load(PretrainSettings, "pretrain", config, set_ or [], values)
        from cae2pipe.stages.pretrain import pretrain as run

        with progress("pretrain") as report:
            run(targets, out, settings, report)


def replay(
    record: Annotated[Path, typer.Argument(metavar="FILE", help="A file of a run's folder failures/.")],
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; the run's own by default.")] = None,
) -> None:
    """Go again through a training step that was not finite, and say which sample or module breaks it."""
    with exits():
        from cae2pipe.runtime.terminal import print_table
        from cae2pipe.stages.replay import replay as run

        found = run(record, device or "auto", precision)
        names = (*found["terms"], "grad_norm")
        again = {**found["terms"], "grad_norm": found["grad_norm"]}
        rows = [{"value": n, "recorded": f"{found['recorded'][n]:.6g}", "again": f"{again[n]:.6g}"} for n in names]
        print_table(console, rows)
        print_table(console, [row | {"loss": f"{row['loss']:.6g}"} for row in found["samples"]])
        for title, values in (
            ("latents that are not finite", found["inputs"]),
            ("first module with such an output", [found["module"]] if found["module"] else []),
            ("weights with such gradients", shortened(found["gradients"])),
        ):
            console.say(f"{title}: {', '.join(values) or 'none'}")


def shortened(names: list[str], most: int = 5) -> list[str]:
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
        from cae2pipe.stages.export import export as write

        for path in write(encoder, out, format_.value, scores or []):
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
        Path, typer.Argument(metavar="TARGETS", help="A target set made by extract-targets.", parser=place)
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
        from cae2pipe.artifacts.parts import parse_part
        from cae2pipe.config.base import load
        from cae2pipe.config.compare import GridSettings
        from cae2pipe.errors import Cae2pipeError
        from cae2pipe.runtime.progress import progress
        from cae2pipe.runtime.ranks import torchrun_rank

        settings = load(GridSettings, "compare", grid, set_ or [])
        from cae2pipe.stages import compare as stage

        name = report_name(grid, small)
        speed = section("speed", workers=workers, device=device).get("speed", {})
        run: Callable[..., Any] = partial(stage.compare, part=parse_part(part) if part else None)
        jobs_failed: Cae2pipeError | None = None
        if jobs > 1:
            if part or torchrun_rank().ranks > 1:
                raise typer.BadParameter("--jobs shares out all runs itself: leave --part and torchrun away")
            # What is wrong with the grid is told once, not by every job.
            stage.plan_grid(settings, targets, data, out, small, speed)
            work = partial(_compare_part, settings, targets, data, out, small, speed)
            try:
                run_jobs(work, jobs, device)
            except Cae2pipeError as error:
                jobs_failed = error
            run = stage.report_grid
        with progress("compare") as report:
            found = run(settings, name, targets, data, out, report, small=small, speed=speed)
        if found:
            print_comparison(found, out / "reports" / name)
        if jobs_failed:
            raise jobs_failed


def report_name(grid: str, small: bool) -> str:
    """What a grid's report is called: the preset, or the file without its folders and ending."""
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(grid).stem).strip("-") or "grid"
    return plain + ("-small" if small else "")


def _compare_part(
    settings: Any,
    targets: Path,
    data: Path,
    out: Path,
    small: bool,
    speed: dict[str, Any],
    part: Any,
    device: str | None,
) -> None:
    from cae2pipe.runtime.progress import Lines
    from cae2pipe.stages.compare import plan_grid, run_part

    own = {**speed, "device": device} if device else speed
    plan = plan_grid(settings, targets, data, out, small, own)
    failed = run_part(settings, plan, targets, data, out, Lines(f"compare {part}", sys.stderr), part)
    if failed:
        raise next(iter(failed.values()))


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Runs of pretrain, finished or not; or one target set.", parser=place),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder to write report.html into, for runs also report.md.", parser=folder)
    ] = Path("report"),
    targets: Annotated[
        Path | None,
        typer.Option(help="Runs: a target set to make pictures from: masks, latents, neighbours.", parser=place),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="Runs: a folder with evaluations of them, at any depth; may be repeated."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            help="A target set: the shard set that it was made from, for originals and rejects, unless it lies inside.",
            parser=place,
        ),
    ] = None,
    live: Annotated[
        int,
        typer.Option(min=0, help="A target set: also run its teacher on this many stored views, for their fidelity."),
    ] = 0,
    teacher_weights: Annotated[
        Path | None, typer.Option(help="With --live: the teacher's weights, if they came from a local file.")
    ] = None,
    device: Device = None,
) -> None:
    """One page about some runs, or about a target set.

    Of runs: scores, losses, cost, pictures; those that differ by their seed alone share a row. Of a target set: views,
    latents, fidelity, bytes, coverage, classes, rejects.
    """
    with exits():
        from cae2pipe.runtime.progress import progress
        from cae2pipe.stages.report_targets import lone_target_set, report_targets

        root = lone_target_set(paths)
        of_runs = {"--targets": targets, "--scores": scores}
        of_sets = {"--source": source, "--live": live, "--teacher-weights": teacher_weights}
        refuse_given(of_sets if root is None else of_runs, "a target set" if root is None else "runs")
        if root is not None:
            with progress("report") as lines:
                page = report_targets(
                    root, out, lines, source=source, live=live, weights=teacher_weights, device=device or "auto"
                )
            console.say(f"report: {page}")
            return
        from cae2pipe.stages.report import report_runs

        with progress("report") as lines:
            comparison = report_runs(paths, scores or [], targets, out, lines, device or "auto")
        print_comparison(comparison, out)


def refuse_given(options: dict[str, Any], kind: str) -> None:
    """Raise SettingsError where an option is given that belongs to the report of another kind."""
    from cae2pipe.errors import SettingsError

    if given := [name for name, value in options.items() if value]:
        raise SettingsError(
            f"this option belongs to the report of {kind}", where=given[0], fix=f"omit it, or give {kind}"
        )


def print_comparison(found: Any, folder: Path) -> None:
    """A comparison's table, what it says, and where its page is."""
    from cae2pipe.reporting.comparison_text import cells, findings
    from cae2pipe.runtime.terminal import print_table

    headers, rows = cells(found)
    print_table(console, [dict(zip(headers, row, strict=True)) for row in rows])
    for line in (*findings(found), f"report: {folder / 'report.html'}"):
        console.say(line)
