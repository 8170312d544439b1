"""Curves and bars as inline SVG: crisp at any size, coloured by the page's style, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cae2pipe.reporting.html import Html, element, join

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values within [low, high], about that many, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [m * power for m in (1, 2, 5, 10)]
    place = next(place for place, step in enumerate(steps) if step >= raw * 0.999)
    # A step wider than the range may pass over it: then the next smaller one has two or three inside.
    return _multiples(low, high, steps[place]) or _multiples(low, high, steps[place - 1])


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]


def line_chart(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    trend: Sequence[tuple[float, float]] = (),
    levels: Sequence[tuple[float, str]] = (),
) -> Html:
    """One series of points, pale where a ``trend`` (x, y) is drawn over it, with dashed horizontal ``levels``
    (value, text) to compare it with. Needs one point."""
    heights = [*ys, *(value for value, _ in levels)]
    low, high = min(heights), max(heights)
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    start, stop = min(xs), max(xs)
    span = (stop - start) or 1.0

    def x_of(value: float) -> float:
        return round(LEFT + (value - start) / span * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    base = HEIGHT - BOTTOM
    parts = []
    for tick in nice_ticks(low, high):
        parts.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=y_of(tick), y2=y_of(tick)))
        parts.append(element("text", f"{tick:g}", x=LEFT - 8, y=y_of(tick) + 4, text_anchor="end"))
    for tick in nice_ticks(start, stop, 8):
        parts.append(element("text", f"{tick:g}", x=x_of(tick), y=base + 18, text_anchor="middle"))
    for value, text in levels:
        height = y_of(value)
        parts.append(element("line", class_="level", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height))
        # Above the line, unless that is outside the picture.
        above = height - 6 if height > TOP + 16 else height + 16
        parts.append(element("text", text, class_="leveltext", x=WIDTH - RIGHT, y=above, text_anchor="end"))
    series = list(zip(xs, ys, strict=True))
    for style, points in (("series pale" if trend else "series", series), ("series", trend)):
        if points:
            # `fill` here as well as in the style: readers that apply no style would fill the curve.
            path = " ".join(f"{x_of(x)},{y_of(y)}" for x, y in points)
            parts.append(element("polyline", class_=style, fill="none", stroke="currentColor", points=path))
    parts.append(element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle"))
    return _svg(HEIGHT, f"{y_label} over {x_label}", parts)


def bar_chart(rows: Sequence[tuple[str, float, str]], *, strong: int, label: str) -> Html:
    """Horizontal bars: (name, value, text beside the bar). The ``strong`` one is coloured, the others pale."""
    step, left, beside = 34, 210, 150
    largest = max(value for _, value, _ in rows) or 1.0
    parts = []
    for number, (name, value, text) in enumerate(rows):
        top = number * step
        length = round(max(2.0, value / largest * (WIDTH - left - beside)), 1)
        style = "bar" if number == strong else "bar pale"
        weight = "strong" if number == strong else None
        parts.append(element("text", name, class_=weight, x=left - 12, y=top + 19, text_anchor="end"))
        parts.append(element("rect", class_=style, x=left, y=top + 4, width=length, height=step - 12, rx=3))
        parts.append(element("text", text, class_=weight, x=left + length + 8, y=top + 19))
    return _svg(step * len(rows), label, parts)


def _svg(height: int, label: str, parts: list[Html]) -> Html:
    return element("svg", join(parts, "\n"), viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)
