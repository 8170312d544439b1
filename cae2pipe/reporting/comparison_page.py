"""The report of a comparison as one self-contained page."""

from __future__ import annotations

from cae2pipe.comparison.rows import CURVES, PROBES, Comparison, Row
from cae2pipe.config.compare import BYTES
from cae2pipe.reporting.comparison_text import cells, findings, folders, notes, teacher_cells
from cae2pipe.reporting.gallery import Gallery, gallery_html
from cae2pipe.reporting.html import Child, Html, element, figure, join_html, page, table
from cae2pipe.reporting.plots import Points, curves, dots

AXES = {BYTES: "stored latents, kB per view", "mask.ratio": "mask ratio", "data.views": "stored views per image"}
"""Axis labels of settings whose own names would not explain them."""


def comparison_html(comparison: Comparison, gallery: Gallery) -> str:
    """The page: table and findings, plots of scores and losses, pictures, and the folders of the runs."""
    headers, rows = cells(comparison)
    children: list[list[Child]] = [list(row) for row in rows]
    body = [
        element("h1", comparison.title),
        *([element("p", comparison.about, class_="lead")] if comparison.about else []),
        element("div", table(headers, children, class_="scores"), class_="card"),
        *(element("p", line) for line in findings(comparison)),
        *(element("p", line, class_="small") for line in notes(comparison)),
        *teachers_table(comparison),
        *score_plots(comparison),
        *curve_plots(comparison),
        *gallery_html(gallery),
        element("h2", "Runs"),
        table(["variant", "folders"], [[row.name, folders(row)] for row in comparison.rows]),
    ]
    return page(comparison.title, join_html([Html(part) for part in body], "\n"))


def teachers_table(comparison: Comparison) -> list[Html]:
    """The teachers of the runs, if there are several."""
    headers, rows = teacher_cells(comparison)
    return [element("h2", "Teachers"), table(headers, [list(row) for row in rows])] if rows else []


def card(plot: Html, caption: str) -> Html:
    return element("div", figure(plot, caption), class_="card plot")


def pairs(cards: list[Html]) -> Html:
    """Cards side by side if there is room; a single card takes the whole width."""
    return element("div", *cards, class_="pair")


def score_plots(comparison: Comparison) -> list[Html]:
    """Scores of every evaluation: over the comparison's axis if it has one, otherwise one line per variant."""
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
            caption = f"{kind}: one dot per seed; bars are means."
        parts.append(card(plot, caption))
    return [element("h2", "Scores"), pairs(parts)] if parts else []


def along_axis(rows: list[Row], kind: str, along: str) -> Html:
    """Scores over the variants' positions on the axis; variants without a position are horizontal levels."""
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
    """Training metrics by epoch, for the first seed of every variant."""
    parts = []
    captions = {
        "loss": "Loss by epoch, first seed. Variants with different losses have different scales.",
        "centred_cosine_masked": "Cosine of predictions and targets of masked patches, after subtracting the mean "
        "token: 0 for a student that has only learnt the mean. Methods without masking see these patches.",
    }
    for name, label in CURVES.items():
        # Variants without such a curve keep their position, so that colours mean the same in both plots.
        values = {row.name: row.curves.get(name, []) for row in comparison.rows}
        drawn = {who: Points(range(1, len(v) + 1), v) if any(v) else Points([], []) for who, v in values.items()}
        if any(points.xs for points in drawn.values()):
            parts.append(card(curves(drawn, x_label="epoch", y_label=label), captions[name]))
    parts += probe_plots(comparison)
    return [element("h2", "Training"), pairs(parts)] if parts else []


def probe_plots(comparison: Comparison) -> list[Html]:
    """Measurements during training by epoch, for the first seed of every variant."""
    captions = {
        "knn_top1": "Accuracy of nearest neighbours during training (--probe), first seed.",
        "held_out_loss": "Loss on held-out views during training (--probe-targets), first seed.",
    }
    parts = []
    for name, label in PROBES.items():
        unit = 100 if name == "knn_top1" else 1
        drawn = {}
        for row in comparison.rows:
            points = row.probes.get(name, [])
            drawn[row.name] = Points([epoch for epoch, _ in points], [unit * value for _, value in points])
        if any(points.xs for points in drawn.values()):
            parts.append(card(curves(drawn, x_label="epoch", y_label=label), captions[name]))
    return parts
