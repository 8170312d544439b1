"""The command line as one app. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cae2pipe.commands import data, evaluation, folders, presets, training
from cae2pipe.commands.shared import console, exits, local_folder
from cae2pipe.version import __version__


def example(*arguments: str) -> str:
    """The last lines of a command's help, one for each example."""
    return "\n\n".join(f"Example: cae2pipe {each}" for each in arguments)


app = typer.Typer(
    name="cae2pipe",
    help="Pretrain vision transformers from cached CLIP targets (CAE v2). Images are sharded, a frozen teacher's patch "
    "latents of augmented views are stored once, and the student trains from the store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Show presets and resolved settings.", no_args_is_help=True)
teachers_app = typer.Typer(help="List teacher presets; download their weights.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Score an encoder.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(teachers_app, name="teachers")
app.add_typer(config_app, name="config")

app.command(epilog=example("shard photos/train shards"))(data.shard)
app.command("extract-targets", epilog=example("extract-targets shards targets --config clip-b16"))(data.extract_targets)
app.command(epilog=example("recode targets-fp16 targets --codec klt --fidelity 0.97"))(data.recode)
app.command(cls=training.PretrainCommand, epilog=example("pretrain targets runs/base --config base"))(training.pretrain)
app.command(epilog=example("replay runs/base/failures/step-00012345.pt"))(training.replay)
app.command(epilog=example("export runs/base exported --format timm"))(training.export)
app.command(epilog=example("compare table2 targets imagenet compared"))(training.compare)
app.command(
    epilog=example("report runs/base runs/mvp --scores scores --targets targets", "report targets --source shards")
)(training.report)
evaluate_app.command("knn", epilog=example("evaluate knn runs/base imagenet scores/base"))(evaluation.evaluate_knn)
evaluate_app.command("linear", epilog=example("evaluate linear runs/base imagenet scores/base"))(
    evaluation.evaluate_linear
)
evaluate_app.command("attentive", epilog=example("evaluate attentive runs/base imagenet scores/base"))(
    evaluation.evaluate_attentive
)
evaluate_app.command("finetune", epilog=example("evaluate finetune runs/base imagenet scores/base"))(
    evaluation.evaluate_finetune
)
evaluate_app.command(
    "zeroshot", epilog=example("evaluate zeroshot runs/base imagenet scores/base --text open_clip:ViT-B-16/openai")
)(evaluation.evaluate_zeroshot)
evaluate_app.command("segment", epilog=example("evaluate segment runs/base ade20k scores/base"))(
    evaluation.evaluate_segment
)
evaluate_app.command("detect", epilog=example("evaluate detect runs/base coco scores/base --cascade"))(
    evaluation.evaluate_detect
)
app.command(epilog=example("results scores --format markdown"))(evaluation.results)
config_app.command("list", epilog=example("config list"))(presets.config_list)
config_app.command("show", epilog=example("config show pretrain base"))(presets.config_show)
teachers_app.command("list", epilog=example("teachers list"))(presets.teachers_list)
teachers_app.command("fetch", epilog=example("teachers fetch clip-b16"))(presets.teachers_fetch)
app.command(epilog=example("inspect targets"))(folders.inspect)
app.command(epilog=example("copy targets s3://bucket/targets", "copy s3://bucket/targets /scratch/targets"))(
    folders.copy
)
app.command(epilog=example("verify targets --repair --source shards"))(folders.verify)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        console.say(__version__)
        raise typer.Exit
    # Without a command, only options that do nothing on their own lead here.
    if context.invoked_subcommand is None:
        console.print(context.get_help())


@app.command(epilog=example("demo demo"))
def demo(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="[OUT]", help="Output folder, not a URL (created, or resumed if it exists).", parser=local_folder
        ),
    ] = Path("demo"),
    teacher: Annotated[str, typer.Option(help="Teacher preset.")] = "lite0",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Run the whole pipeline in minutes on photographs that pip installs; ends with a table and a report."""
    with exits():
        from cae2pipe.demo.measures import rows
        from cae2pipe.demo.run import run_demo
        from cae2pipe.runtime.terminal import print_table

        def say(text: str) -> None:
            console.block(text)

        result = run_demo(out, teacher, device, say=say)
        print_table(console, rows(result))
        say(f"\nreport: {out / 'report.html'}")
