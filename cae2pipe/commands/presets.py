"""Presets of settings and of teachers."""

from __future__ import annotations

from typing import Annotated

import typer

from cae2pipe.commands.shared import Set, console, errors, exits

WIDE = 130
"""Columns from which a line holds a teacher's model as well."""
NARROW = 90
"""Columns below which a line holds neither its precision nor its input, so that no licence is folded."""


def config_list() -> None:
    """List the presets of every stage."""
    with exits():
        from cae2pipe.config.base import preset_names
        from cae2pipe.config.stages import STAGES

        for stage in STAGES:
            console.say(f"{stage}: {', '.join(preset_names(stage))}")


def config_show(
    stage: Annotated[str, typer.Argument(help="shard, extract, pretrain or evaluate.")],
    preset: Annotated[str, typer.Argument(help="Preset or YAML file.")],
    set_: Set = None,
) -> None:
    """Show the resolved settings of a preset, each with a line of documentation."""
    with exits():
        from cae2pipe.config.base import load, show
        from cae2pipe.config.stages import settings_class

        console.block(show(load(settings_class(stage, preset), stage, preset, overrides=set_ or [])))


def teachers_list() -> None:
    """List teacher presets: size, input, latents, licence, and whether their weights are here.

    Pipes and wide terminals also show each model as --teacher takes it.
    """
    with exits():
        from cae2pipe.runtime.terminal import line_width, print_table
        from cae2pipe.teachers.presets import list_presets

        rows = list_presets()
        width = line_width(console) or WIDE
        dropped = {"model"} if width < WIDE else set()
        dropped |= {"CUDA", "input"} if width < NARROW else set()
        rows = [{name: value for name, value in row.items() if name not in dropped} for row in rows]
        print_table(console, rows)


def teachers_fetch(name: Annotated[str, typer.Argument(help="A preset, or a model as --teacher takes it.")]) -> None:
    """Download a teacher's weights into the local cache, for use without a network."""
    with exits():
        from cae2pipe.teachers.presets import fetch

        # The hub's client shows the bytes itself; a panel would hide its bar.
        errors.say(f"looking for the weights of {name} in the local cache, then on the hub")
        for path in fetch(name):
            console.say(str(path))
