"""The terminal: lines, tables and facts, in which untrusted names are plain text."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cae2pipe.errors import Cae2pipeError
from cae2pipe.runtime.foreign_names import visible


class Terminal(Console):
    """A console that shows every string literally: no markup, no emoji by name, no escape sequences."""

    def render_str(self, text: str, *, style: str | Style = "", **options: Any) -> Text:
        justify, overflow = options.get("justify"), options.get("overflow")
        return Text(visible(text, keep="\n"), style, justify=justify, overflow=overflow)

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError, whose handler calls this. rich would end the process without a word."""
        raise sys.exception() or BrokenPipeError

    def say(self, text: str, style: str | None = None) -> None:
        """One line, however long: it is never wrapped."""
        self.print(visible(text), style=style, soft_wrap=True)

    def block(self, text: str) -> None:
        """Text of several lines."""
        self.print(text, soft_wrap=True)

    def problem(self, error: Cae2pipeError, title: str | None = None) -> None:
        """Print what was wrong, where, and how to fix it. Untrusted text cannot imitate these lines."""
        if title:
            self.print(title, style="bold red", end=" ")
        self.print(error.what.replace("\n", "\n    "), soft_wrap=True)
        for name, text in (("where:", error.where), ("fix:  ", error.fix)):
            if text:
                self.say(f"  {name} {text}")


def line_width(terminal: Terminal) -> int | None:
    """Columns of a line; None in pipes and files, where lines have no end unless the variable COLUMNS gives one."""
    if not terminal.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        return None
    return terminal.width


def print_table(terminal: Terminal, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys as a table; the keys are the headers.

    Cells are folded to ``line_width``; where there is none, each row is one line.
    """
    table = Table(box=None, pad_edge=False)
    for name in rows[0] if rows else []:
        # Some characters have zero width: a column of width zero would show nothing.
        table.add_column(visible(name), overflow="fold", min_width=1)
    for row in rows:
        table.add_row(*(visible(str(value)) for value in row.values()))
    if line_width(terminal) is None:
        unlimited = terminal.options.update(width=sys.maxsize)
        table.width = Measurement.get(terminal, unlimited, table).maximum
    terminal.print(table, crop=False)


def print_facts(terminal: Terminal, facts: Mapping[str, Any]) -> None:
    """Print nested facts as YAML."""
    import yaml

    text = yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    terminal.block(text.rstrip())
