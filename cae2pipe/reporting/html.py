"""One self-contained page: elements with escaped text, and a style with light and dark mode."""

from __future__ import annotations

import html as _html
from collections.abc import Sequence

from cae2pipe.runtime.foreign_names import visible

_VOID = frozenset({"br", "col", "hr", "img", "meta"})


class Html(str):
    """Finished markup. Any other string is text, which elements escape."""

    __slots__ = ()


Child = str | int | float | None


def element(tag: str, *children: Child, **attributes: str | int | float | None) -> Html:
    """``<tag ...>children</tag>``. Attributes that are None are omitted; ``class_`` becomes ``class``, other
    underscores become hyphens."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_html_text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID and not children:
        return Html(f"<{tag}{given} />")
    return Html(f"<{tag}{given}>{join_html(children)}</{tag}>")


def join_html(children: tuple[Child, ...] | list[Html], separator: str = "") -> Html:
    """Children in order, escaped unless they are markup; None is omitted."""
    parts = (child if isinstance(child, Html) else _html_text(child) for child in children if child is not None)
    return Html(separator.join(parts))


def _html_text(value: str | float) -> str:
    return _html.escape(visible(str(value), keep="\n"), quote=True)


def figure(picture: Html, caption: Child = None, class_: str | None = None) -> Html:
    return element("figure", picture, element("figcaption", caption) if caption is not None else None, class_=class_)


def image(uri: str, alt: str, pixelated: bool = False) -> Html:
    """An inline picture; ``pixelated`` keeps the edges of enlarged patches sharp."""
    return element("img", src=uri, alt=alt, class_="grid" if pixelated else None)


def table(headers: list[str], rows: list[list[Child]], class_: str | None = None) -> Html:
    head = element("tr", *(element("th", header, scope="col") for header in headers))
    body = join_html([element("tr", *(element("td", cell) for cell in row)) for row in rows], "\n")
    return element(
        "div", element("table", element("thead", head), element("tbody", body), class_=class_), class_="wide"
    )


def figures(cards: Sequence[tuple[Child, Child]]) -> Html:
    """Figures in large type, each with a caption below."""
    drawn = [element("div", element("b", value), element("span", text), class_="card") for value, text in cards]
    return element("div", *drawn, class_="figures")


def mark(met: bool) -> Html:
    return element("span", "✓ reached" if met else "✗ missed", class_="good" if met else "bad")


def bar_list(rows: Sequence[tuple[str, float, str]]) -> Html:
    """Horizontal bars, one line each: (name, value, text next to the bar). The longest bar fills the width."""
    most = max((value for _, value, _ in rows), default=0) or 1
    lines = [
        element(
            "li",
            element("span", name),
            element("i", element("b", style=f"width: {100 * value / most:.4g}%")),
            element("span", text),
        )
        for name, value, text in rows
    ]
    return element("ul", *lines, class_="bars")


def facts(rows: Sequence[tuple[str, Child]]) -> Html:
    """Names and values, in two columns if there is room."""
    return element(
        "dl", *(join_html((element("dt", name), element("dd", value))) for name, value in rows), class_="facts"
    )


def page(title: str, body: Html) -> str:
    """The whole document, which is self-contained."""
    head = join_html(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", Html(STYLE)),
        ],
        "\n",
    )
    open_, close = '<!doctype html>\n<html lang="en">\n<head>\n', "\n</main>\n</body>\n</html>\n"
    return f"{open_}{head}\n</head>\n<body>\n<main>\n{body}{close}"


STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --text: #22252a; --soft: #6b7077; --line: #e3e0da;
  --good: #1a7f4b; --bad: #b3261e; --code: #f2f0ec; --bar: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1d2024; --text: #e6e6e3; --soft: #9aa0a8; --line: #32363c;
    --good: #5fc48f; --bad: #f28b82; --code: #24282d; --bar: #4aa3df;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  overflow-wrap: break-word;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3.25rem 0 0.5rem; letter-spacing: -0.01em; }
p { max-width: 44rem; margin: 0.6rem 0 1rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 0.85rem; line-height: 1.4; margin-top: 0.4rem; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
img.grid { image-rendering: pixelated; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.2rem; margin: 1.2rem 0;
}
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: 0.9rem; margin: 1.6rem 0;
}
.figures .card { margin: 0; }
.figures b {
  display: block; font-size: 1.7rem; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums;
}
.figures span { color: var(--soft); font-size: 0.88rem; }
.examples {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); gap: 1.2rem; margin: 1.4rem 0;
}
.examples .card { margin: 0; }
h3 { margin: 1.8rem 0 0.7rem; font-size: 0.98rem; font-weight: 600; }
.card h3 { margin-top: 0; }
h3 small { color: var(--soft); font-weight: 400; }
.strip { display: grid; gap: 0.6rem; align-items: start; }
.strip.five { grid-template-columns: repeat(5, 1fr); }
.strip.four { grid-template-columns: repeat(4, 1fr); }
.strip figcaption { font-size: 0.76rem; }
.strip div > figure + figure { margin-top: 0.5rem; }
.strip > *, .examples > *, .figures > * { min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem; }
.pair { margin: 1.2rem 0; }
.pair .card { margin: 0; }
@media (max-width: 34rem) {
  .strip.five, .strip.four { grid-template-columns: repeat(2, 1fr); }
  .strip.five > :first-child { grid-column: 1 / -1; }
}
.wide { overflow-x: auto; }
.bars { list-style: none; margin: 0; padding: 0; font-size: 0.94rem; }
.bars li {
  display: grid; grid-template-columns: 13rem 1fr 9rem; gap: 0 0.9rem; align-items: center; padding: 0.2rem 0;
}
.bars span { overflow-wrap: anywhere; }
.bars span:last-child { color: var(--soft); font-variant-numeric: tabular-nums; }
.bars b { display: block; min-width: 2px; height: 0.8rem; background: var(--bar); border-radius: 2px; }
@media (max-width: 40rem) {
  .bars li { grid-template-columns: 1fr auto; padding: 0.4rem 0; }
  .bars i { grid-column: 1 / -1; grid-row: 2; }
}
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.45rem 1.4rem; margin: 0; font-size: 0.94rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 0.6rem; } }
.small { color: var(--soft); font-size: 0.88rem; }
.plot img { max-width: 36rem; }
/* Plots are drawn for light cards: inverted, dark letters become light, and hues are kept. */
@media (prefers-color-scheme: dark) { .plot img { filter: invert(0.88) hue-rotate(180deg); } }
td { font-variant-numeric: tabular-nums; }
table.scores td + td, table.texts td:nth-child(2), table.texts td:nth-child(3) { white-space: nowrap; }
table.texts td:nth-child(2) { font-weight: 600; }
table.texts td:last-child { min-width: 15rem; }
table.pictures { width: auto; font-size: 0.8rem; }
table.pictures th, table.pictures td {
  padding: 0.2rem 0.3rem; border: 0; font-weight: 400; max-width: 10rem;
  min-width: 6.2rem; overflow-wrap: break-word;
}
table.pictures .name { min-width: 8.5rem; }
table.pictures img { width: 6.2rem; min-width: 6.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; }
th, td { text-align: left; padding: 0.5rem 1rem 0.5rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: 0.85rem; }
tr:last-child td { border-bottom: 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.88em; }
td code { white-space: nowrap; }
pre {
  background: var(--code); border-radius: 8px; padding: 0.9rem 1.1rem; overflow-x: auto; line-height: 1.6;
  margin: 1rem 0;
}
pre i { color: var(--soft); font-style: normal; }
.good { color: var(--good); } .bad { color: var(--bad); }
footer {
  margin-top: 4rem; color: var(--soft); font-size: 0.85rem; border-top: 1px solid var(--line); padding-top: 1rem;
}
"""
