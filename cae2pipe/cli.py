"""The command line: parses, calls a stage, prints. It has no logic of its own and imports stages late."""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from cae2pipe.artifacts.places import place as _place
from cae2pipe.errors import (
    FAILURE,
    INTERRUPTED,
    REQUEUE,
    TERMINATED,
    Cae2pipeError,
    Requeued,
    StorageError,
    Terminated,
)
from cae2pipe.version import __version__

app = typer.Typer(
    name="cae2pipe",
    help="Pretrain vision transformers from cached CLIP targets (CAE v2). Images are sharded, a frozen teacher's patch "
    "latents of augmented views are stored once, and the student trains from the store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Show presets and resolved settings.", no_args_is_help=True)
teachers_app = typer.Typer(help="List teacher presets; bring their weights to this machine.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Score an encoder.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(teachers_app, name="teachers")
app.add_typer(config_app, name="config")

console = Console()
errors = Console(stderr=True)


def place(text: str) -> Path:
    """A path or URL of the command line."""
    try:
        return _place(text)
    except Cae2pipeError as error:
        raise typer.BadParameter(str(error)) from None


Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a setting; may be repeated.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes. Default: one a core.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder or URL to make, or to go on with.", parser=place)]


class CodecName(StrEnum):
    klt = "klt"
    int8 = "int8"
    fp16 = "fp16"


@contextmanager
def exits() -> Iterator[None]:
    """Turn what a command raises into a message and an exit code; a defect of ours keeps its traceback."""

    kinds = {signal.SIGTERM: Terminated, signal.SIGUSR1: Requeued}

    def leave(number: int, frame: FrameType | None) -> None:
        raise kinds[signal.Signals(number)]

    old = {number: signal.signal(number, leave) for number in kinds}
    try:
        yield
    except Cae2pipeError as error:
        if not error.shown_elsewhere:
            errors.print("[bold red]error:[/]", end=" ")
            errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        errors.print("[bold red]error:[/]", end=" ")
        what = StorageError(
            f"the disk is full: {error.strerror}",
            where=error.filename,
            fix="free some space, then run the same command again: what is finished is kept",
        )
        errors.print(str(what), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(FAILURE) from None
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None
    except Terminated:
        errors.print("terminated; the same command goes on from here")
        raise typer.Exit(TERMINATED) from None
    except Requeued:
        errors.print("asked to leave; the same command goes on from here")
        raise typer.Exit(REQUEUE) from None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _section(section: str, /, **values: Any) -> dict[str, Any]:
    """The options that were given, as raw settings: ``{section: {...}}``, or {} where none was."""
    given = {key: value for key, value in values.items() if value is not None}
    return {section: given} if given else {}


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit
    # Reached without a command only through options that do nothing by themselves.
    if context.invoked_subcommand is None:
        console.print(context.get_help())


@app.command()
def shard(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images (class/*.jpg, or *.jpg, or splits of those), ImageNet's archives or their folder, "
            "a tar of images, a folder of WebDataset tars, or a .txt list of paths; or the URL of one.",
            parser=place,
        ),
    ],
    out: Out,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "default",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Ground truth of images without classes: ImageNet's development kit, a text file with a class a line, "
            "or Kaggle's LOC_val_solution.csv.",
            parser=place,
        ),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(help="Stop unless the source is all of this: imagenet1k, imagenet1k/val, or FILE.json."),
    ] = None,
    workers: Workers = None,
    set_: Set = None,
) -> None:
    """Pack images into shuffled WebDataset tars, checking that each can be decoded.

    Run again with more images in SOURCE, it adds tars for the new ones.
    """
    with exits():
        from cae2pipe.config.base import load
        from cae2pipe.config.extract import ShardSettings
        from cae2pipe.progress import progress
        from cae2pipe.shards.build import build_all

        settings = load(ShardSettings, "shard", config, set_ or [], _section("speed", workers=workers))
        with progress("shard") as report:
            build_all(source, out, settings, report, labels, expect)


@app.command("extract-targets")
def extract_targets(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A shard set (folder or URL), or a folder of images.", parser=place)
    ],
    out: Out,
    config: Annotated[str, typer.Option(help="Teacher preset or YAML file.")] = "clip-b16",
    views: Annotated[int | None, typer.Option(help="Views an image. Ask for more later to add them.")] = None,
    codec: Annotated[CodecName | None, typer.Option(help="How latents are compressed.")] = None,
    fidelity: Annotated[float | None, typer.Option(help="klt: mean cosine to reach on held-out images.")] = None,
    workers: Workers = None,
    device: Device = None,
    part: Annotated[str, typer.Option(help="K/N: make the K-th of N shares, e.g. 3/8 on the third of 8 machines.")] = (
        "1/1"
    ),
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what it would cost, from a few hundred images; OUT is not touched.")
    ] = False,
    calibrate_only: Annotated[bool, typer.Option("--calibrate-only", help="Calibrate the codec and stop.")] = False,
    set_: Set = None,
) -> None:
    """Stage 1: write augmented views and the teacher's per-patch latents of them into a target set.

    Under torchrun (torchrun --nproc-per-node N -m cae2pipe extract-targets ...) the ranks share the work.
    """
    with exits():
        from cae2pipe.artifacts.parts import parse_part
        from cae2pipe.config.base import load
        from cae2pipe.config.extract import ExtractSettings
        from cae2pipe.progress import progress

        values = {
            **({} if views is None else {"views": views}),
            **_section("codec", name=codec.value if codec else None, fidelity=fidelity),
            **_section("speed", workers=workers, device=device),
        }
        settings = load(ExtractSettings, "extract", config, set_ or [], values)
        from cae2pipe.stages.estimate_targets import estimate_targets
        from cae2pipe.stages.extract_targets import extract_targets as run

        if estimate:
            with progress("estimate") as report:
                found = estimate_targets(source, settings, report)
            _print_estimate(found)
            return
        with progress("extract-targets") as report:
            run(source, out, settings, report, parse_part(part), calibrate_only)


@app.command()
def recode(
    source: Annotated[
        Path,
        typer.Argument(metavar="SET", help="A target set, best one of --codec fp16 (folder or URL).", parser=place),
    ],
    out: Out,
    codec: Annotated[CodecName, typer.Option(help="How latents are compressed in OUT.")] = CodecName.klt,
    fidelity: Annotated[float, typer.Option(help="klt: mean cosine to reach on held-out images.")] = 0.999,
    lossy_source: Annotated[
        bool, typer.Option("--lossy-source", help="Allow a set that is not fp16: its error comes on top.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Threads; -1: one a core.")] = -1,
) -> None:
    """Make a target set with another codec or fidelity from one there is, without the teacher.

    On one disk the views' pixels are shared, not copied.
    """
    with exits():
        from cae2pipe.config.base import build
        from cae2pipe.config.extract import CodecSettings
        from cae2pipe.progress import progress

        settings = build(CodecSettings, {"name": codec.value, "fidelity": fidelity}, "recode")
        from cae2pipe.stages.recode import recode as run

        with progress("recode") as report:
            run(source, out, settings, report, lossy_source, workers)


def _print_estimate(found: dict[str, Any]) -> None:
    from cae2pipe.progress import duration, gigabytes
    from cae2pipe.reporting.terminal import print_table

    rows = [
        {
            "codec": row["codec"],
            "pixels a view": gigabytes(found["pixels"]),
            "latents a view": gigabytes(row["latents"]),
            "in all": gigabytes(row["bytes"]),
            "mean cosine": f"{row['mean']:.5f}",
            "1st percentile": f"{row['p1']:.5f}",
            "time here": duration(row["seconds"]),
            "paid from epoch": row["paid_from_epoch"],
        }
        for row in found["codecs"]
    ]
    print_table(console, rows)
    console.print(
        f"{found['images']} images in {found['views']} views; here {found['views_per_s']:.1f} views a second, the "
        f"teacher alone {found['teacher_per_s']:.1f}: {found['verdict']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
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
        from cae2pipe.progress import progress

        values = {
            **({} if epochs is None else {"epochs": epochs}),
            **({"targets": "online"} if online else {}),
            **_section("mask", repeat=repeat_masks),
            **_section("speed", workers=workers, device=device),
        }
        settings = load(PretrainSettings, "pretrain", config, set_ or [], values)
        from cae2pipe.stages.pretrain import pretrain as run

        with progress("pretrain") as report:
            run(targets, out, settings, report)


@app.command()
def replay(
    record: Annotated[Path, typer.Argument(metavar="FILE", help="A file of a run's folder failures/.")],
    device: Device = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; the run's own by default.")] = None,
) -> None:
    """Go again through a training step that was not finite, and say which sample or module breaks it."""
    with exits():
        from cae2pipe.reporting.terminal import print_table
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
            ("weights with such gradients", found["gradients"]),
        ):
            console.print(f"{title}: {', '.join(values) or 'none'}", markup=False, highlight=False, soft_wrap=True)


Encoder = Annotated[
    str,
    typer.Argument(
        metavar="ENCODER",
        help="A run folder; an encoder.safetensors; a .pth that CAE's authors released; random:RUN, random:PRESET or "
        "random:NAME, a student or timm model before training; timm:NAME, or timm:NAME@FILE with local weights; "
        "open_clip:NAME/TAG or open_clip:NAME@FILE; teacher:PRESET, teacher:FILE.yaml or a target set, for its teacher "
        "(@FILE as above).",
    ),
]
Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="A folder with train and val (or test): class/*.jpg each, or shard sets.")
]


@evaluate_app.command("knn")
def evaluate_knn(
    encoder: Encoder,
    data: Data,
    out: Out,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "knn",
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Accuracy of weighted nearest neighbours on frozen features."""
    _evaluate("knn", encoder, data, out, config, set_, workers=workers, device=device)


FAST_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@evaluate_app.command("linear")
def evaluate_linear(
    encoder: Encoder,
    data: Data,
    out: Out,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "linear",
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Try six learning rates at once; the best on held-out training images is taken."),
    ] = False,
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Accuracy of a linear classifier on frozen features of central crops."""
    over = [f"sweep={list(FAST_RATES)}", *(set_ or [])] if fast else set_
    _evaluate("linear", encoder, data, out, config, over, workers=workers, device=device)


def _evaluate(
    kind: str, encoder: str, data: Path, out: Path, config: str, set_: list[str] | None, **speed: Any
) -> None:
    with exits():
        from cae2pipe.config.base import load
        from cae2pipe.config.evaluate import EVALUATIONS
        from cae2pipe.progress import progress

        settings = load(EVALUATIONS[kind], "evaluate", config, set_ or [], _section("speed", **speed))
        from cae2pipe.stages.evaluate import RUNS

        with progress(f"evaluate {kind}") as report:
            result = RUNS[kind](encoder, data, out, settings, report)
        _print_score(result)


def _print_score(result: dict[str, Any]) -> None:
    from cae2pipe.reporting.terminal import print_table

    columns = ("evaluation", "encoder", "feature", "top1", "top5")
    row = {name: f"{result[name]:.4f}" if isinstance(result[name], float) else result[name] for name in columns}
    print_table(console, [row | {"train": result["images"]["train"], "val": result["images"]["val"]}])
    console.print(f"protocol: {result['protocol']}", markup=False, highlight=False, soft_wrap=True)


class ResultsFormat(StrEnum):
    table = "table"
    markdown = "markdown"
    json = "json"


@app.command()
def results(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders with scores, at any depth.")],
    format_: Annotated[ResultsFormat, typer.Option("--format", help="How to print.")] = ResultsFormat.table,
) -> None:
    """All scores of many evaluations side by side, each with its protocol."""
    with exits():
        from cae2pipe.reporting.results import as_markdown, collect, shown
        from cae2pipe.reporting.terminal import print_table

        rows = collect(folders)
        if format_ is ResultsFormat.table:
            print_table(console, [shown(row) for row in rows])
        else:
            text = as_markdown(rows) if format_ is ResultsFormat.markdown else json.dumps(rows, indent=1)
            console.print(text, markup=False, highlight=False, soft_wrap=True)


@config_app.command("list")
def config_list() -> None:
    """The presets of every stage."""
    with exits():
        from cae2pipe.config.base import preset_names
        from cae2pipe.config.stages import STAGES

        for stage in STAGES:
            console.print(f"{stage}: {', '.join(preset_names(stage))}", highlight=False)


@config_app.command("show")
def config_show(
    stage: Annotated[str, typer.Argument(help="shard, extract, pretrain or evaluate.")],
    preset: Annotated[str, typer.Argument(help="Preset or YAML file.")],
    set_: Set = None,
) -> None:
    """The resolved settings of a preset, each with a line of documentation."""
    with exits():
        from cae2pipe.config.base import load, show
        from cae2pipe.config.stages import settings_class

        console.print(
            show(load(settings_class(stage, preset), stage, preset, set_ or [])), markup=False, soft_wrap=True
        )


@teachers_app.command("list")
def teachers_list() -> None:
    """Teacher presets, and whether their weights are at hand."""
    with exits():
        from cae2pipe.reporting.terminal import print_table
        from cae2pipe.teachers.presets import list_presets

        print_table(console, list_presets())


@teachers_app.command("fetch")
def teachers_fetch(name: Annotated[str, typer.Argument(help="A preset's name.")]) -> None:
    """Bring a preset's weights into the local cache, for use without a network."""
    with exits():
        from cae2pipe.teachers.presets import fetch

        for path in fetch(name):
            console.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Any folder made by cae2pipe, or its URL.", parser=place)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a folder is, what it was made from, and what it holds."""
    with exits():
        from cae2pipe.inspection import describe
        from cae2pipe.reporting.terminal import print_facts

        facts = describe(path)
        if as_json:
            sys.stdout.write(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        else:
            print_facts(console, facts)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Any folder made by cae2pipe, or its URL.", parser=place)],
    repair: Annotated[bool, typer.Option("--repair", help="Make again exactly what is damaged, then check.")] = False,
    source: Annotated[
        Path | None,
        typer.Option(help="With --repair: the images or the shard set that it was made from.", parser=place),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="With --repair: the ground truth that shard was given.", parser=place)
    ] = None,
    live: Annotated[
        int, typer.Option(min=0, help="Target sets: also run the teacher again on this many stored views.")
    ] = 0,
    teacher_weights: Annotated[
        Path | None,
        typer.Option(help="With --live or --repair: the teacher's weights, if they came from a local file."),
    ] = None,
    device: Annotated[str, typer.Option(help="With --live or --repair: auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Check every file of a folder against its manifest: presence, size, SHA-256, counts and keys."""
    with exits():
        from cae2pipe.inspection import verify as check
        from cae2pipe.progress import progress

        with progress("verify") as report:
            result = check(path, report)
        for problem in result.problems:
            errors.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        if repair:
            from cae2pipe.stages.repair import repair as mend

            with progress("repair") as report:
                mend(result, report, source, labels, teacher_weights, device)
                result = check(path, report) if result.problems else result
            for problem in result.problems:
                errors.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        console.print(result.summary(), highlight=False, soft_wrap=True)
        if result.problems:
            raise typer.Exit(FAILURE)
        if live:
            _verify_live(path, live, teacher_weights, device)


def _verify_live(path: Path, live: int, weights: Path | None, device: str) -> None:
    from cae2pipe.inspection import verify_live

    found = verify_live(path, live, weights, device)
    console.print(
        f"the teacher on {found.views} stored views: mean cosine {found.raw:.5f} ({found.expected:.5f} by the "
        f"manifest), centred {found.centred:.5f}, worst view {found.worst:.5f} ({found.worst_view})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if not found.sound:
        errors.print("these are not the teacher's latents of these views", style="bold red")
        raise typer.Exit(FAILURE)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="The folder to make, or to go on with.")] = Path("demo"),
    teacher: Annotated[str, typer.Option(help="Teacher preset.")] = "lite0",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """The whole pipeline in minutes, on photographs that pip brings; ends with a table and a report."""
    with exits():
        from cae2pipe.demo.measures import rows
        from cae2pipe.demo.run import run_demo
        from cae2pipe.reporting.terminal import print_table

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        result = run_demo(out, teacher, device, say)
        print_table(console, rows(result))
        say(f"\nreport: {out / 'report.html'}")


def main() -> None:
    app()
