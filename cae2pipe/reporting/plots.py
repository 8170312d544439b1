"""Plots of comparisons with matplotlib: pure functions of numbers, each to one picture as inline SVG."""

from __future__ import annotations

import base64
import io
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cae2pipe.reporting.html import Html, image
from cae2pipe.runtime.foreign_names import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
"""Okabe and Ito's, and one more: told apart by all eyes. Further lines take them again, dashed."""
STYLES = ("-", "--", ":", "-.")
INK = "#3c3f44"


WIDTH = 4.8
"""Inches of a plot: its letters stay legible where a phone shows it at two thirds of its size."""
FEW = 12
"""Points up to which each of a curve's has a marker."""


@dataclass(frozen=True)
class Points:
    """One curve: x and y values, and how far up and down each y may be off (empty: nothing is drawn). ``pale``: it only
    stands behind another."""

    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()
    pale: bool = False


def curves(
    lines: Mapping[str, Points], *, x_label: str, y_label: str, levels: Mapping[str, float] | None = None
) -> Html:
    """Curves over one axis, with markers where they have few points, and dashed horizontal ``levels``. A curve without
    points keeps its colour for itself; an axis whose values are far apart is logarithmic."""
    from matplotlib.ticker import MaxNLocator

    legend = [wrapped(name) for name in (*lines, *(levels or {}))] if len(lines) + len(levels or {}) > 1 else []
    figure, axes = _figure(WIDTH, 3.0 + _legend_height(legend))
    for index, (name, points) in enumerate(lines.items()):
        if not points.xs:
            continue
        few = len(points.xs) <= FEW
        axes.errorbar(
            points.xs,
            points.ys,
            yerr=list(points.errors) or None,
            label=wrapped(name),
            color=COLOURS[index % len(COLOURS)],
            linestyle=STYLES[index // len(COLOURS) % len(STYLES)],
            linewidth=0.8 if points.pale else 1.6,
            alpha=0.4 if points.pale else 1,
            marker="o" if few else "",
            markersize=4.5,
            capsize=3,
        )
    for index, (name, value) in enumerate((levels or {}).items(), len(lines)):
        axes.axhline(value, label=wrapped(name), color=COLOURS[index % len(COLOURS)], linestyle="--", linewidth=1.3)
    positions = sorted({x for points in lines.values() for x in points.xs})
    if positions and positions[0] > 0 and positions[-1] / positions[0] >= 8 and len(positions) <= FEW:
        axes.set_xscale("log")
    if positions and len(positions) <= 8:
        axes.set_xticks(positions, [f"{x:.3g}" for x in positions])
        axes.minorticks_off()
    elif all(float(x).is_integer() for x in positions):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    heights = [y for points in lines.values() for y in points.ys if y == y]
    if heights and min(heights) > 0 and max(heights) / min(heights) >= 20:
        axes.set_yscale("log")
    axes.set_xlabel(literal(x_label))
    axes.set_ylabel(literal(y_label))
    if legend:
        _legend(figure, axes)
    return svg(figure, f"{y_label} over {x_label}: {', '.join(lines)}")


def dots(rows: Mapping[str, Sequence[float]], *, x_label: str) -> Html:
    """A line for each name, from top to bottom: every value a dot, their mean a bar across."""
    names = list(rows)
    lines = sum(wrapped(name).count("\n") + 1 for name in names)
    figure, axes = _figure(WIDTH, 0.9 + 0.16 * len(names) + 0.18 * lines)
    for index, name in enumerate(names):
        values = list(rows[name])
        if not values:
            continue
        axes.plot(values, [index] * len(values), "o", color=COLOURS[0], markersize=5, alpha=0.55, markeredgewidth=0)
        mean = sum(values) / len(values)
        axes.plot([mean, mean], [index - 0.28, index + 0.28], color=COLOURS[1], linewidth=2.2)
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(literal(x_label))
    axes.grid(axis="y", visible=False)
    return svg(figure, f"{x_label} of {', '.join(names)}")


def bars(rows: Sequence[tuple[str, float, str]], *, strong: int, x_label: str) -> Html:
    """Horizontal bars: (name, value, text beside the bar). The ``strong`` one is coloured, the others pale."""
    figure, axes = _figure(WIDTH, 0.9 + 0.36 * len(rows))
    colours = [COLOURS[0] if index == strong else "#c9c6bf" for index in range(len(rows))]
    drawn = axes.barh(range(len(rows)), [value for _, value, _ in rows], color=colours, height=0.62)
    axes.bar_label(drawn, [literal(text) for _, _, text in rows], padding=5, fontsize=9, color=INK)
    axes.set_yticks(range(len(rows)), [literal(name) for name, _, _ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel(literal(x_label))
    axes.grid(axis="y", visible=False)
    return svg(figure, f"{x_label}: {', '.join(f'{name} {text}' for name, _, text in rows)}")


def wrapped(name: str, width: int = 26, most: int = 4) -> str:
    """A name in lines that leave room for the axes."""
    lines = "\n".join(map(literal, textwrap.wrap(visible(name), width, max_lines=most, placeholder=" …")))
    return " " + lines if lines.startswith("_") else lines  # which matplotlib would leave out of legends


def literal(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return visible(text).replace("$", "\\$")


def svg(figure: Figure, alt: str) -> Html:
    """A figure as a picture inside the page. Equal figures give equal bytes: it holds no date and no random name."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # matplotlib reads it, and fails where it is no number, for the date that is not to be written.
    epoch = os.environ.pop("SOURCE_DATE_EPOCH", None)
    try:
        with rc_context({"svg.hashsalt": "cae2pipe"}), warnings.catch_warnings():
            # Its font has no Chinese, say: boxes stand for such letters, and the table beside has the name.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
            # Transparent: what lies behind is the page's, by day and by night.
            figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    finally:
        if epoch is not None:
            os.environ["SOURCE_DATE_EPOCH"] = epoch
    return image("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), alt)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Not pyplot, which keeps every figure and picks a backend for the screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b9b6b0")
    axes.grid(visible=True, color="#e8e6e1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(9.5)
    return figure, axes


def _legend_height(names: Sequence[str]) -> float:
    """Inches that a legend in two columns takes."""
    return 0.1 + sum(0.17 * max(name.count("\n") + 1 for name in names[i : i + 2]) for i in range(0, len(names), 2))


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes: it hides nothing, whatever the curves do, and leaves them the whole width."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.5
    )
