"""Tables and facts on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table


def print_table(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as a table; the keys are the headers."""
    table = Table(box=None, pad_edge=False)
    for name in rows[0] if rows else []:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def print_facts(console: Console, facts: Mapping[str, Any]) -> None:
    """Nested facts, as YAML reads them."""
    text = yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)
