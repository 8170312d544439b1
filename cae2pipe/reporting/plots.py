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
"""Okabe and Ito's colours and one more, distinct for colour-blind people too. Further lines repeat them, dashed."""
STYLES = ("-", "--", ":", "-.")
INK = "#3c3f44"


WIDTH = 4.8
"""Width of a plot in inches: its text stays legible when a phone shows it at two thirds of its size."""
FEW = 12
"""Curves with at most this many points have markers."""


@dataclass(frozen=True)
class Points:
    """One curve: x and y values, and error bars of y (empty: none). ``pale``: it is background of another curve."""

    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[float] = ()
    pale: bool = False


def curves(
    lines: Mapping[str, Points], *, x_label: str, y_label: str, levels: Mapping[str, float] | None = None
) -> Html:
    """Curves over one axis, with markers where they have few points, and dashed horizontal ``levels``. A curve without
    points still takes its colour; an axis with a large range is logarithmic."""
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
    """One line per name, from top to bottom: a dot for every value, a vertical bar for the mean."""
    names = list(rows)
    lines = sum(wrapped(name).count("\n") + 1 for name in names)
    figure, axes = _figure(WIDTH, 0.9 + 0.16 * len(names) + 0.18 * lines)
    for height, name in enumerate(names):
        values = list(rows[name])
        if not values:
            continue
        axes.plot(values, [height] * len(values), "o", color=COLOURS[0], markersize=5, alpha=0.55, markeredgewidth=0)
        mean = sum(values) / len(values)
        axes.plot([mean, mean], [height - 0.28, height + 0.28], color=COLOURS[1], linewidth=2.2)
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(literal(x_label))
    axes.grid(axis="y", visible=False)
    return svg(figure, f"{x_label} of {', '.join(names)}")


def bars(rows: Sequence[tuple[str, float, str]], *, strong: int, x_label: str) -> Html:
    """Horizontal bars: (name, value, text next to the bar). The ``strong`` one is coloured, the others are pale."""
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
    """A name wrapped so that there is room for the axes."""
    lines = "\n".join(map(literal, textwrap.wrap(visible(name), width, max_lines=most, placeholder=" …")))
    return " " + lines if lines.startswith("_") else lines  # matplotlib omits names with "_" from legends


def literal(text: str) -> str:
    """Text escaped so that matplotlib does not parse it as a formula."""
    return visible(text).replace("$", "\\$")


def svg(figure: Figure, alt: str) -> Html:
    """A figure as an inline picture. Equal figures give equal bytes: there is no date and no random id in it."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # matplotlib parses this variable, and fails if it is not a number, even for the date that is not written.
    epoch = os.environ.pop("SOURCE_DATE_EPOCH", None)
    try:
        with rc_context({"svg.hashsalt": "cae2pipe"}), warnings.catch_warnings():
            # Its font lacks Chinese, for example: such letters become boxes, and the table has the full name.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
            # Transparent, so that the page's background shows in light and dark mode.
            figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    finally:
        if epoch is not None:
            os.environ["SOURCE_DATE_EPOCH"] = epoch
    return image("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), alt)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Not pyplot, which keeps every figure and selects a backend for the screen.
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
    """Height in inches of a legend in two columns."""
    return 0.1 + sum(0.17 * max(name.count("\n") + 1 for name in names[i : i + 2]) for i in range(0, len(names), 2))


def _legend(figure: Figure, axes: Axes) -> None:
    """A legend below the axes, where it cannot hide curves and leaves them the whole width."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.5
    )
