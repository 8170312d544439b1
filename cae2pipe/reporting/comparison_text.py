"""A comparison as text: its table, whether the paper's order holds, and the report in Markdown."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

from cae2pipe.comparison.rows import Comparison, Row
from cae2pipe.reporting.markdown import escaped, markdown_table
from cae2pipe.runtime.foreign_names import told_apart
from cae2pipe.runtime.wording import counted

BLANK = "–"
READ = {"mean": "the mean patch", "class": "the class token"}
"""Names of features in tables."""


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean in percent, with the standard deviation over seeds if there are several."""
    if not values:
        return BLANK
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


SURE = 2.0
"""Minimum significant difference in standard errors. With 1, two equal variants would differ in one case of three."""


def order_of(rows: Sequence[Row], column: str) -> str:
    """Names from best to worst; ``≈`` between neighbours without a significant difference, ``>`` otherwise, and if a
    single seed gives no estimate."""
    ranked = sorted(rows, key=lambda row: -(row.mean(column) or 0.0))
    return chained(ranked, lambda before, after: " > " if better(before, after, column) else " ≈ ")


def chained(rows: Sequence[Row], sign: Callable[[Row, Row], str]) -> str:
    """Names of rows with a sign between each and the next."""
    return rows[0].name + "".join(sign(before, after) + after.name for before, after in itertools.pairwise(rows))


def better(first: Row, second: Row, column: str) -> bool:
    """Whether the first mean is above the second by more than ``SURE`` standard errors of the difference."""
    a, b = first.mean(column), second.mean(column)
    assert a is not None
    assert b is not None
    return a - b > SURE * math.hypot(first.error(column), second.error(column))


def findings(comparison: Comparison) -> list[str]:
    """For each column that the paper also has: whether its order of the variants holds here."""
    lines = []
    for column in comparison.columns:
        rows = [row for row in comparison.rows if column in row.paper and row.mean(column) is not None]
        if len(rows) > 1:
            lines.append(finding(rows, column))
    return lines


def finding(rows: Sequence[Row], column: str) -> str:
    """Whether the paper's order of some variants holds. All of them have a figure in the paper and here."""
    ranked = sorted(rows, key=lambda row: -row.paper[column])
    paper = chained(ranked, lambda before, after: " > " if before.paper[column] > after.paper[column] else " = ")
    here = order_of(rows, column)
    if min(len(row.scores[column]) for row in rows) == 1:
        return f"{column}: the paper's order is {paper}; here, with one seed and so without an error estimate, {here}."
    pairs = [(a, b) for a in rows for b in rows if a.paper[column] > b.paper[column]]
    against = [f"{b.name} is above {a.name}" for a, b in pairs if better(b, a, column)]
    unsure = [f"{a.name}, {b.name}" for a, b in pairs if not better(a, b, column)]
    if against:
        verdict = "does not hold: " + "; ".join(against)
    elif pairs and len(unsure) == len(pairs):
        verdict = "can be neither confirmed nor rejected here: all differences are too small"
    elif unsure:
        verdict = "holds, except for differences that are too small: " + "; ".join(unsure)
    else:
        verdict = "holds"
    return f"{column}: the paper's order, {paper}, {verdict}. Here {here}."


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table."""
    papers = [column for column in comparison.columns if any(column in row.paper for row in comparison.rows)]
    long = any(hours >= 1 for row in comparison.rows for hours in row.hours)
    time = "device h per run" if long else "device min per run"
    several = teachers_differ(comparison)
    headers = ["variant", *(["teachers"] if several else []), *comparison.columns]
    headers += [*(f"{column}, paper" for column in papers), "loss", "kB per view", time]
    rows = []
    for row in comparison.rows:
        scores = [score_cell(comparison, row, column) for column in comparison.columns]
        paper = [f"{row.paper[column]:.1f}" if column in row.paper else BLANK for column in papers]
        losses = row.curves.get("loss")
        loss = f"{losses[-1]:.3f}" if losses else BLANK
        size = BLANK if row.latents is None else f"{row.latents / 1000:.1f}"
        took = f"{statistics.fmean(row.hours) * (1 if long else 60):.3g}" if row.hours else BLANK
        rows.append([row.name, *([teachers_cell(row)] if several else []), *scores, *paper, loss, size, took])
    return told_apart(headers, range(1, len(headers) + 1)), rows


def teachers_differ(comparison: Comparison) -> bool:
    """Whether runs have several teachers, or other ones than other runs."""
    known = [[teacher.label for teacher in row.teachers] for row in comparison.rows if row.teachers]
    return any(len(labels) > 1 or labels != known[0] for labels in known)


def teachers_cell(row: Row) -> str:
    """The labels of a row's teachers, with weights other than 1."""
    named = [one.label + ("" if one.weight == 1 else f" x {one.weight:g}") for one in row.teachers]
    return ", ".join(named) or BLANK


def teacher_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of all teachers, each with its stored latents and its licence. No rows if all runs
    have the same single teacher."""
    rows: list[list[str]] = []
    for one in (one for row in comparison.rows for one in row.teachers):
        cells = [one.label, BLANK if one.latents is None else f"{one.latents / 1000:.1f}", one.licence]
        if cells not in rows:
            rows.append(cells)
    return ["teacher", "kB per view", "licence"], rows if teachers_differ(comparison) else []


def score_cell(comparison: Comparison, row: Row, column: str) -> str:
    """A score with its standard deviation, and with the features used if the column's rows differ in them."""
    text = mean_and_deviation(row.scores.get(column, []))
    several = len({other.features[column] for other in comparison.rows if column in other.features}) > 1
    return f"{text} ({row.features[column]})" if several and column in row.features else text


def notes(comparison: Comparison) -> list[str]:
    """Notes below the table."""
    lines = [f"Not finished: {text}" for text in comparison.failed]
    for run, damaged in (item for row in comparison.rows for item in row.damaged.items()):
        lines.append(f"{run.name}: ignored {counted(damaged, 'damaged line')} of metrics.jsonl.")
    lines.append(
        f"{comparison.done} of {counted(comparison.wanted, 'score')}, {counted(comparison.seeds, 'seed')}; "
        "percent, mean ± standard "
        f"deviation over seeds. One variant is above another (>) if their means differ by more than {SURE:g} "
        "standard errors of the difference. loss: each variant's own, mean of the last epoch of the first seed; "
        "kB per view: stored latents; time: training only, over all devices."
    )
    for column, protocol in comparison.protocols.items():
        features = sorted({row.features[column] for row in comparison.rows if column in row.features} - {""})
        on = f"; on {', '.join(READ.get(name, name) for name in features)}" if features else ""
        lines.append(f"{column}: {protocol}{on}.")
    return lines


def folders(row: Row) -> str:
    """The folders of a row's runs, with the progress of unfinished ones."""
    names = [run.name for run in row.runs] + [f"{run.name} ({how})" for run, how in row.unfinished]
    return ", ".join(names) or BLANK


def comparison_markdown(comparison: Comparison) -> str:
    """The report in Markdown."""
    headers, rows = cells(comparison)
    about = " ".join(comparison.about.split())
    lines = [f"# {escaped(comparison.title)}", "", *([escaped(about), ""] if about else [])]
    lines += [*markdown_table(headers, rows), ""]
    lines += [*(f"- {escaped(line)}" for line in (*findings(comparison), *notes(comparison))), ""]
    headers, rows = teacher_cells(comparison)
    lines += [*markdown_table(headers, rows), ""] if rows else []
    lines += markdown_table(["variant", "runs"], [[row.name, folders(row)] for row in comparison.rows])
    return "\n".join(lines).rstrip() + "\n"
