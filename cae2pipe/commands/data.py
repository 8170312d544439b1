"""Stage 1: shard, extract-targets, recode."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cae2pipe.commands.shared import Device, Out, Pixels, Set, Workers, console, exits, folder_or_url, path_or_url

if TYPE_CHECKING:
    from cae2pipe.config.extract import CodecSettings


class CodecName(StrEnum):
    klt = "klt"
    int8 = "int8"
    fp16 = "fp16"


def shard(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images (class/*.jpg, or *.jpg, or splits of those), ImageNet's archives or their folder, "
            "a tar of images, a folder of WebDataset tars, or a .txt list of paths; or the URL of one.",
            parser=path_or_url,
        ),
    ],
    out: Out,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "default",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Ground truth of images without classes: ImageNet's development kit, a text file with one class per "
            "line, or Kaggle's LOC_val_solution.csv.",
            parser=path_or_url,
        ),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(help="Stop unless the source is exactly this data set: imagenet1k, imagenet1k/val, or FILE.json."),
    ] = None,
    workers: Workers = None,
    set_: Set = None,
) -> None:
    """Pack images into shuffled WebDataset tars, checking that each can be decoded.

    If SOURCE has new images, run the same command again to add tars for them.
    """
    with exits():
        from cae2pipe.api.targets import shard

        shard(source, out, config=config, overrides=set_, labels=labels, expect=expect, workers=workers)


def extract_targets(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A shard set or a target set (folder or URL), or a folder of images.",
            parser=path_or_url,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="Output folder or URL (created, or resumed if it exists); none with --add.",
            parser=folder_or_url,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="timm:NAME.TAG, open_clip:NAME/TAG, hf-hub:ORG/NAME, local-dir:PATH, or a preset of `teachers list`; "
            "@FILE for local weights. Replaces the teacher of --config.",
        ),
    ] = None,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "clip-b16",
    views: Annotated[
        int | None, typer.Option(help="Views per image (default: 16). Run again with a larger number to add views.")
    ] = None,
    codec: Annotated[CodecName | None, typer.Option(help="How latents are compressed.")] = None,
    fidelity: Annotated[
        float | None, typer.Option(help="klt: mean cosine to reach on held-out images (default: 0.97).")
    ] = None,
    by_reference: Annotated[
        bool,
        typer.Option(
            "--by-reference",
            help="List the pixels of SOURCE, a target set, by digest, but do not hold them: OUT has latents alone.",
        ),
    ] = False,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="Add the teacher to SOURCE, a target set: a set by reference in SOURCE/teachers/LABEL. Takes no OUT.",
        ),
    ] = False,
    pixels: Pixels = None,
    workers: Workers = None,
    device: Device = None,
    part: Annotated[str, typer.Option(help="K/N: only the K-th of N shares, e.g. 3/8 on the third of 8 machines.")] = (
        "1/1"
    ),
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate size and time from a few hundred images; OUT is not touched.")
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(help="With --estimate: recommend a number of views for this many epochs of pretraining."),
    ] = None,
    calibrate_only: Annotated[bool, typer.Option("--calibrate-only", help="Calibrate the codec and stop.")] = False,
    set_: Set = None,
) -> None:
    """Stage 1: write augmented views and the teacher's per-patch latents of them into a target set.

    Under torchrun (torchrun --nproc-per-node N -m cae2pipe extract-targets ...) the ranks share the work.
    """
    if out is None and not (add or estimate):
        raise typer.BadParameter("the argument OUT is missing; only --add and --estimate take none")
    if out is not None and add:
        raise typer.BadParameter("--add takes no OUT: the teacher's set is in SOURCE/teachers/LABEL")
    with exits():
        from cae2pipe.api import targets
        from cae2pipe.errors import SettingsError

        if epochs is not None and not estimate:
            raise SettingsError(
                "a target set does not depend on how many epochs are trained on it",
                where="--epochs",
                fix="add --estimate to get a recommended number of views, or omit --epochs",
            )
        settings = targets.extract_settings(
            config,
            set_,
            teacher=teacher,
            views=views,
            codec=codec.value if codec else None,
            fidelity=fidelity,
            workers=workers,
            device=device,
        )
        if estimate:
            cost = targets.estimate_targets(
                source, config=settings, epochs=epochs, by_reference=by_reference, add=add, pixels=pixels
            )
            _print_estimate(cost, settings.codec)
        else:
            targets.extract_targets(
                source,
                out,
                config=settings,
                by_reference=by_reference,
                add=add,
                pixels=pixels,
                part=part,
                calibrate_only=calibrate_only,
            )


def recode(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SET", help="A target set, preferably of --codec fp16 (folder or URL).", parser=path_or_url
        ),
    ],
    out: Out,
    codec: Annotated[CodecName | None, typer.Option(help="How latents are compressed in OUT (default: klt).")] = None,
    fidelity: Annotated[
        float | None, typer.Option(help="klt: mean cosine to reach on held-out images (default: 0.97).")
    ] = None,
    repack: Annotated[
        bool, typer.Option("--repack", help="Convert a set of an earlier format, without changing its latents.")
    ] = False,
    lossy_source: Annotated[
        bool, typer.Option("--lossy-source", help="Allow a set that is not fp16; its error adds to the new codec's.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Threads; -1: one per core.")] = -1,
) -> None:
    """Make a target set with another codec or fidelity from an existing one, without the teacher.

    If both are on the same disk, pixels are hard-linked, not copied. A set by reference gives another one.
    """
    with exits():
        from cae2pipe.api.targets import recode

        name = codec.value if codec else None
        recode(source, out, codec=name, fidelity=fidelity, lossy_source=lossy_source, repack=repack, workers=workers)


def _print_estimate(cost: dict[str, Any], codec: CodecSettings) -> None:
    from cae2pipe.runtime.progress import duration, gigabytes
    from cae2pipe.runtime.terminal import print_table
    from cae2pipe.runtime.wording import counted

    rows = [
        {
            "codec": row["codec"],
            "pixels per view": gigabytes(cost["pixels"]),
            "latents per view": gigabytes(row["latents"]),
            "total": gigabytes(row["bytes"]),
            "mean cosine": f"{row['mean']:.5f}",
            "1st percentile": f"{row['p1']:.5f}",
            "time": duration(row["seconds"]),
            "break-even epoch": row["paid_from_epoch"],
        }
        for row in cost["codecs"]
    ]
    print_table(console, rows)
    console.say(
        f"{counted(cost['images'], 'image')}, {counted(cost['views'], 'view')} each; this machine makes "
        f"{cost['views_per_s']:.1f} views per second, the teacher alone {cost['teacher_per_s']:.1f}: {cost['verdict']}"
    )
    if "reduced" in cost:
        size, pixels = cost["reduced"]["size"], cost["reduced"]["pixels"]
        console.say(
            f"pixels take {cost['pixels'] / pixels:.2f} times the {gigabytes(pixels)} of views of {size} pixels, which "
            "a student with this grid reads of them; the size of the latents depends on the grid alone"
        )
    if "recommended" in cost:
        advice = cost["recommended"]
        name = f"klt at {codec.fidelity:g}" if codec.name == "klt" else codec.name
        asked = (
            "as requested"
            if advice["views"] == cost["views"]
            else f"with --views {cost['views']} it would be shown {advice['showings_asked']:.3g} times"
        )
        console.say(
            f"for {counted(advice['epochs'], 'epoch')}, --views {advice['views']} is recommended: "
            f"{gigabytes(advice['bytes'])} with {name}, {duration(advice['seconds'])} on this machine, each view shown "
            f"{advice['showings']:.3g} times; {asked}"
        )
