"""Stage 3: evaluate, results."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cae2pipe.commands.shared import Device, LocalOut, Set, Workers, console, exits, local_path, show_error
from cae2pipe.errors import FAILURE, Cae2pipeError

Encoder = Annotated[
    str,
    typer.Argument(
        metavar="ENCODER",
        help="A run folder; an encoder.safetensors; a .pth that CAE's authors released; random:RUN, random:PRESET or "
        "random:NAME, a student or timm model with random weights; timm:NAME, or timm:NAME@FILE with local weights; "
        "open_clip:NAME/TAG or open_clip:NAME@FILE; teacher:PRESET, teacher:FILE.yaml or a target set, for its teacher "
        "(@FILE as above).",
    ),
]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A folder with train and val (or test): class/*.jpg each, or shard sets.",
        parser=local_path,
    ),
]


def evaluate_knn(
    encoder: Encoder,
    data: Data,
    out: LocalOut,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "knn",
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Accuracy of weighted nearest neighbours on frozen features."""
    _run_evaluation("knn", encoder, data, out=out, config=config, set_=set_, workers=workers, device=device)


def evaluate_linear(
    encoder: Encoder,
    data: Data,
    out: LocalOut,
    config: Annotated[str, typer.Option(help="Preset (linear, linear-tiny) or YAML file.")] = "linear",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="On features of the central crop, computed once, with six learning rates at once; the best on "
            "held-out training images is chosen.",
        ),
    ] = False,
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Accuracy of a linear classifier on frozen features (paper, Table 9)."""
    from cae2pipe.config.evaluate import FAST_RATES

    over = ["cached_crops=1", f"sweep={list(FAST_RATES)}", *(set_ or [])] if fast else set_
    _run_evaluation("linear", encoder, data, out=out, config=config, set_=over, workers=workers, device=device)


def evaluate_attentive(
    encoder: Encoder,
    data: Data,
    out: LocalOut,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "attentive",
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Accuracy of one cross-attention block and a linear classifier on frozen tokens."""
    _run_evaluation("attentive", encoder, data, out=out, config=config, set_=set_, workers=workers, device=device)


def evaluate_finetune(
    encoder: Encoder,
    data: Data,
    out: LocalOut,
    config: Annotated[
        str,
        typer.Option(help="Preset (finetune-tiny, -small, -base, -large: the paper's Table 10) or YAML file."),
    ] = "finetune",
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Accuracy of the whole encoder trained as a classifier (paper, Table 10)."""
    _run_evaluation("finetune", encoder, data, out=out, config=config, set_=set_, workers=workers, device=device)


def evaluate_zeroshot(
    encoder: Encoder,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="A folder with val (or test): class/*.jpg, or a shard set.", parser=local_path
        ),
    ],
    out: LocalOut,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class embeddings (safetensors).", parser=local_path)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TOWER", help="Text tower that embeds the classes: open_clip:NAME/TAG or open_clip:NAME@FILE."
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For --text: lines `CLASS NAME, NAME, ...` (default: the names of the class folders).",
            parser=local_path,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="Of a run of several teachers: whose head is used (default: the first trained with texts).",
        ),
    ] = None,
    config: Annotated[str, typer.Option(help="Preset or YAML file.")] = "zeroshot",
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Accuracy without training: the nearest class embedding in the teacher's space.

    The encoder is a run whose teacher has a class token, or a teacher.
    """
    _run_evaluation(
        "zeroshot",
        encoder,
        data,
        out=out,
        config=config,
        set_=set_,
        workers=workers,
        device=device,
        classes=classes,
        text=text,
        names=names,
        teacher=teacher,
    )


def evaluate_segment(
    encoder: Encoder,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder with images/train, images/val, annotations/train, annotations/val, and classes.txt (one "
            "name per line) or ADE20K's objectInfo150.txt.",
            parser=local_path,
        ),
    ],
    out: LocalOut,
    config: Annotated[
        str, typer.Option(help="Preset (segment-tiny, -small, -base, -large: the paper's Table 11) or YAML file.")
    ] = "segment",
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Mean intersection over union of UperNet on the encoder (paper, Table 11). Needs the extra `dense`."""
    _run_evaluation("segment", encoder, data, out=out, config=config, set_=set_, workers=workers, device=device)


def evaluate_detect(
    encoder: Encoder,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder in COCO's format: train2017, val2017, annotations/instances_train2017.json and "
            "..._val2017.json (or train and val).",
            parser=local_path,
        ),
    ],
    out: LocalOut,
    config: Annotated[
        str, typer.Option(help="Preset (detect-small, -base, -large: the paper's Table 12) or YAML file.")
    ] = "detect",
    cascade: Annotated[bool, typer.Option("--cascade", help="Cascade Mask R-CNN: three stages.")] = False,
    workers: Workers = None,
    device: Device = None,
    set_: Set = None,
) -> None:
    """Average precision of Mask R-CNN on the encoder (paper, Table 12). Needs the extra `dense`."""
    over = ["cascade=true", *(set_ or [])] if cascade else set_
    _run_evaluation("detect", encoder, data, out=out, config=config, set_=over, workers=workers, device=device)


def _run_evaluation(
    kind: str,
    encoder: str,
    data: Path,
    *,
    out: Path,
    config: str,
    set_: list[str] | None,
    workers: int | None,
    device: str | None,
    **own: Any,
) -> None:
    with exits():
        from cae2pipe.api.scores import evaluate

        score = evaluate(
            kind, encoder, data, out=out, config=config, overrides=set_, workers=workers, device=device, **own
        )
        # Under torchrun, only one process has it.
        if score:
            _print_score(score.result)


def _print_score(result: dict[str, Any]) -> None:
    from cae2pipe.comparison.scores import headlines
    from cae2pipe.runtime.terminal import print_table

    columns = ("evaluation", "encoder", "feature", *headlines(result["evaluation"], result.get("classes")))
    row = {name: f"{result[name]:.4f}" if isinstance(result[name], float) else result[name] for name in columns}
    print_table(console, [row | {"train": result["images"]["train"], "val": result["images"]["val"]}])
    if "best" in result:
        console.say(f"best: {result['best']['top1']:.4f} after epoch {result['best']['epoch']}")
    if "top1_error" in result:
        errors = (f"{name} {result[f'{name}_error']:.4f}" for name in headlines("zeroshot", result["classes"]))
        console.say(f"standard error: {', '.join(errors)}")
    console.say(f"protocol: {result['protocol']}")


class ResultsFormat(StrEnum):
    table = "table"
    markdown = "markdown"
    json = "json"


def results(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders with scores, at any depth.", parser=local_path)
    ],
    format_: Annotated[ResultsFormat, typer.Option("--format", help="Output format.")] = ResultsFormat.table,
) -> None:
    """List the scores of many evaluations, each with its protocol.

    Unreadable manifests are reported; the exit code is then 1.
    """
    with exits():
        from cae2pipe.comparison.scores import collect
        from cae2pipe.reporting.results import as_markdown, protocols, shown
        from cae2pipe.runtime.progress import progress
        from cae2pipe.runtime.terminal import print_table

        damaged: list[Cae2pipeError] = []
        with progress("results", brief=True) as report:
            report.phase("looking for scores in all folders below")
            rows = collect(folders, damaged)
        if format_ is ResultsFormat.table:
            print_table(console, shown(rows))
            for number, protocol in enumerate(protocols(rows), 1):
                console.say(f"protocol {number}: {protocol}")
        else:
            console.block(as_markdown(rows) if format_ is ResultsFormat.markdown else json.dumps(rows, indent=1))
        for error in damaged:
            show_error(error)
    if damaged:
        raise typer.Exit(FAILURE)
