"""The printed table of the scores of many evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from cae2pipe.comparison.scores import COLUMNS, ScoreRow
from cae2pipe.reporting.markdown import escaped, markdown_table

NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "pixel_accuracy": "pixels",
    "ap_box": "AP^b",
    "ap_mask": "AP^m",
}
"""Printed names of figures."""


def protocols(rows: Sequence[ScoreRow]) -> list[str]:
    """The protocols in a table, in order of first occurrence. Rows refer to them by number, from 1."""
    return list(dict.fromkeys(row["protocol"] for row in rows))


def shown(rows: Sequence[ScoreRow]) -> list[dict[str, str]]:
    """Printed rows: scores in percent, protocols by number."""
    numbers = {text: str(number) for number, text in enumerate(protocols(rows), 1)}

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    rows_shown = []
    for row in rows:
        cells = {
            "score": f"{NAMES[row['metric']]} {percent(row['score'])}",
            "also": ", ".join(f"{NAMES[name]} {percent(value)}" for name, value in row["also"].items()),
            "best": "" if row["best"] is None else percent(row["best"]),
            "protocol": numbers[row["protocol"]],
        }
        plain: dict[str, object] = {**row}
        rows_shown.append({column: cells.get(column, str(plain[column])) for column in COLUMNS})
    return rows_shown


def as_markdown(rows: Sequence[ScoreRow]) -> str:
    """The table in Markdown, and the protocols below it."""
    lines = markdown_table(COLUMNS, [list(row.values()) for row in shown(rows)])
    return "\n".join([*lines, "", *(f"{number}. {escaped(text)}" for number, text in enumerate(protocols(rows), 1))])
