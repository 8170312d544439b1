"""Commands for any folder that a stage made: inspect, verify, copy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cae2pipe.commands.shared import Pixels, console, errors, exits, folder_or_url, local_path, path_or_url
from cae2pipe.errors import FAILURE


def inspect(
    path: Annotated[Path, typer.Argument(help="Any folder made by cae2pipe, or its URL.", parser=path_or_url)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a folder is, what it was made from, and what it contains."""
    with exits():
        from cae2pipe.api import folders
        from cae2pipe.runtime.foreign_names import visible_json
        from cae2pipe.runtime.progress import progress
        from cae2pipe.runtime.terminal import print_facts

        with progress("inspect", brief=True) as report:
            report.phase(f"reading {path}")
            facts = folders.inspect(path)
        if as_json:
            # Characters that the terminal's encoding lacks are escaped as in JSON.
            plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
            sys.stdout.write(visible_json(facts, plain) + "\n")
        else:
            print_facts(console, facts)


def verify(
    path: Annotated[Path, typer.Argument(help="Any folder made by cae2pipe, or its URL.", parser=path_or_url)],
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild exactly what is damaged, then check again.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            help="With --repair: the images, the shard set or the target set that the folder was made from.",
            parser=path_or_url,
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="With --repair: the ground truth that was given to shard.", parser=path_or_url)
    ] = None,
    live: Annotated[
        int, typer.Option(min=0, help="Target sets: also run the teacher again on this many stored views.")
    ] = 0,
    teacher_weights: Annotated[
        Path | None,
        typer.Option(
            help="With --live or --repair: the teacher's weights, if they came from a local file.", parser=local_path
        ),
    ] = None,
    pixels: Pixels = None,
    device: Annotated[str, typer.Option(help="With --live or --repair: auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Check every file of a folder against its manifest: presence, size, SHA-256, counts and keys."""
    with exits():
        from cae2pipe.api import folders

        result = folders.verify(path, pixels=pixels)
        for problem in result.problems:
            errors.problem(problem)
        if repair:
            result = folders.repair(
                result, source=source, labels=labels, teacher_weights=teacher_weights, device=device
            )
            for problem in result.problems:
                errors.problem(problem)
        console.say(result.summary())
        if result.problems:
            raise typer.Exit(FAILURE)
        if live:
            _verify_live(path, live, teacher_weights, pixels=pixels, device=device)


def _verify_live(path: Path, live: int, weights: Path | None, *, pixels: Path | None, device: str) -> None:
    from cae2pipe.runtime.progress import progress
    from cae2pipe.stages.verify import verify_live

    with progress("verify") as report:
        audit = verify_live(path, live, weights, device=device, report=report, pixels=pixels)
    console.say(
        f"the teacher on {audit.views} stored views: mean cosine {audit.raw:.5f} ({audit.expected:.5f} by the "
        f"manifest), centred {audit.centred:.5f}, worst view {audit.worst:.5f} ({audit.worst_view})"
    )
    for group, own in audit.more.items():
        console.say(
            f"{group}: mean cosine {own.raw:.5f} ({own.expected:.5f} by the manifest), worst view {own.worst:.5f} "
            f"({own.worst_view})"
        )
    if not audit.sound:
        errors.say("these are not the teacher's latents of these views", style="bold red")
        raise typer.Exit(FAILURE)


def copy(
    source: Annotated[
        Path, typer.Argument(metavar="SET", help="A shard set or a target set (folder or URL).", parser=path_or_url)
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DESTINATION",
            help="Folder or URL (created, or resumed if it holds this set).",
            parser=folder_or_url,
        ),
    ],
    views: Annotated[int | None, typer.Option(min=1, help="Target sets: only this many views of every image.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also read what is there already, and copy damaged files again.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 8,
) -> None:
    """Copy a set between disks and object stores, checking every file against its manifest.

    Teachers that were added to a target set are copied with it.

    After an interruption, or if SET has grown, run the same command again.
    """
    with exits():
        from cae2pipe.api import folders

        result = folders.copy(source, destination, views=views, check=check, workers=workers)
        console.say(result.summary())
