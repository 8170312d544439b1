"""The report of a comparison as one page that refers to nothing outside itself."""

from __future__ import annotations

from cae2pipe.comparison.rows import CURVES, Comparison, Row
from cae2pipe.config.compare import BYTES
from cae2pipe.reporting.comparison_text import cells, findings, folders, notes
from cae2pipe.reporting.gallery import Gallery, gallery_html
from cae2pipe.reporting.html import Child, Html, element, figure, join, page, table
from cae2pipe.reporting.plots import Points, curves, dots

AXES = {BYTES: "stored latents, kB a view", "mask.ratio": "mask ratio", "data.views": "stored views of an image"}
"""What settings are called below an axis, where their own names do not do."""


def comparison_html(comparison: Comparison, gallery: Gallery) -> str:
    """The page: the table and what it says, scores and losses as plots, pictures, and where the runs lie."""
    headers, rows = cells(comparison)
    children: list[list[Child]] = [list(row) for row in rows]
    body = [
        element("h1", comparison.title),
        *([element("p", comparison.about, class_="lead")] if comparison.about else []),
        element("div", table(headers, children, class_="scores"), class_="card"),
        *(element("p", line) for line in findings(comparison)),
        *(element("p", line, class_="small") for line in notes(comparison)),
        *score_plots(comparison),
        *curve_plots(comparison),
        *gallery_html(gallery),
        element("h2", "Runs"),
        table(["variant", "folders"], [[row.name, folders(row)] for row in comparison.rows]),
    ]
    return page(comparison.title, join([Html(part) for part in body], "\n"))


def card(plot: Html, caption: str) -> Html:
    return element("div", figure(plot, caption), class_="card plot")


def pairs(cards: list[Html]) -> Html:
    """Cards side by side where there is room; one alone has the whole width."""
    return element("div", *cards, class_="pair")


def score_plots(comparison: Comparison) -> list[Html]:
    """Scores of every evaluation: along the comparison's axis where it has one, else a line a variant."""
    parts: list[Html] = []
    for kind in comparison.columns:
        scored = [row for row in comparison.rows if row.scores.get(kind)]
        if len(scored) < 2:
            continue
        if comparison.along and any(row.along is not None for row in scored):
            plot = along_axis(scored, kind, comparison.along)
            caption = f"{kind}: means over seeds; bars are standard deviations."
        else:
            plot = dots({row.name: [100 * value for value in row.scores[kind]] for row in scored}, x_label=f"{kind}, %")
            caption = f"{kind}: a dot a seed, means as bars."
        parts.append(card(plot, caption))
    return [element("h2", "Scores"), pairs(parts)] if parts else []


def along_axis(rows: list[Row], kind: str, along: str) -> Html:
    """Scores over where variants stand; those that stand nowhere are levels."""
    unit = 1000 if along == BYTES else 1
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.along is not None:
            lines.setdefault(row.line or kind, []).append(row)
    drawn = {}
    for name, members in lines.items():
        members.sort(key=lambda row: row.along or 0.0)
        means = [100 * (row.mean(kind) or 0.0) for row in members]
        several = any(len(row.scores[kind]) > 1 for row in members)
        spreads = [100 * row.error(kind) * len(row.scores[kind]) ** 0.5 for row in members] if several else []
        drawn[name] = Points([(row.along or 0.0) / unit for row in members], means, spreads)
    levels = {row.name: 100 * (row.mean(kind) or 0.0) for row in rows if row.along is None}
    return curves(drawn, x_label=AXES.get(along, along), y_label=f"{kind}, %", levels=levels)


def curve_plots(comparison: Comparison) -> list[Html]:
    """What training told by epoch, the first seed of every variant."""
    parts = []
    captions = {
        "loss": "Loss by epoch, first seed. Variants with other losses have other scales.",
        "centred_cosine_masked": "How near predictions of masked patches come to their targets, about the mean token: "
        "0 for a student that has learnt the mean alone. Methods that mask nothing see these patches.",
    }
    for name, label in CURVES.items():
        # Those without such a curve keep their place, so that colours mean the same in both plots.
        values = {row.name: row.curves.get(name, []) for row in comparison.rows}
        drawn = {who: Points(range(1, len(v) + 1), v) if any(v) else Points([], []) for who, v in values.items()}
        if any(points.xs for points in drawn.values()):
            parts.append(card(curves(drawn, x_label="epoch", y_label=label), captions[name]))
    return [element("h2", "Training"), pairs(parts)] if parts else []
