import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cae2pipe.reporting.curves import bar_chart, line_chart, nice_ticks
from cae2pipe.reporting.html import Html, element, image, join, page, table

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects text and tags; fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\0", exclude_categories=["Cs", "Cc"])))
def test_any_text_comes_back_as_it_was(text):
    reader = read(element("p", text, title=text))
    assert reader.text == text
    assert reader.tags == [("p", {"title": text})]


def test_markup_is_kept_and_text_escaped():
    assert element("b", Html("<i>x</i>"), "<i>") == "<b><i>x</i>&lt;i&gt;</b>"
    assert element("a", "x", class_="big", data_of=3, href=None) == '<a class="big" data-of="3">x</a>'
    assert join(["<", Html("<br />"), None]) == "&lt;<br />"
    assert isinstance(join(["a"]), Html)


def test_a_script_in_a_name_stays_text():
    reader = read(page("<script>alert(1)</script>", table(["a"], [["<script>"], ["b"]])))
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert "alert(1)" in reader.text


def test_a_page_is_whole_and_stands_alone():
    text = page("title", element("p", image("data:image/png;base64,AAAA", 'a "view"')))
    reader = read(text)
    assert text.startswith("<!doctype html>")
    assert ("img", {"src": "data:image/png;base64,AAAA", "alt": 'a "view"'}) in reader.tags
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://|url\(|@import|<link|<script", text)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
@example(1.0, 400401.0, 2)
def test_ticks_are_even_and_inside(low, span, about):
    ticks = nice_ticks(low, low + span, about)
    assert 0 < len(ticks) <= about + 1
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


def test_ticks_of_one_value():
    assert nice_ticks(3.0, 3.0) == [3.0]
    assert nice_ticks(0, 20, 8) == [0, 5, 10, 15, 20]


def points(reader: Reader) -> list[list[tuple[float, float]]]:
    lines = [attrs["points"] for tag, attrs in reader.tags if tag == "polyline"]
    return [[tuple(float(v) for v in pair.split(",")) for pair in line.split()] for line in lines]


def test_a_curve_falls_where_the_loss_falls_and_stays_inside():
    reader = read(
        line_chart([0, 1, 2], [3.0, 2.0, 1.0], trend=[(0, 3.0), (2, 1.0)], x_label="epoch", y_label="loss",
                   levels=[(2.5, "mean <token>")])
    )  # fmt: skip
    curve, trend = points(reader)
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)
    assert curve[0][1] < curve[1][1] < curve[2][1]  # SVG's y grows downwards
    assert trend == [curve[0], curve[2]]
    level = next(attrs for tag, attrs in reader.tags if attrs.get("class") == "level")
    assert curve[0][1] < float(level["y1"]) < curve[1][1]
    assert "mean <token>" in reader.text
    _, _, width, height = (float(v) for v in dict(reader.tags)["svg"]["viewbox"].split())
    assert all(0 <= x <= width and 0 <= y <= height for x, y in curve)


@pytest.mark.parametrize("ys", [[1.0], [2.0, 2.0]])
def test_flat_curves(ys):
    assert len(points(read(line_chart(range(len(ys)), ys, x_label="x", y_label="y")))[0]) == len(ys)


def test_bars_are_as_long_as_their_values():
    reader = read(bar_chart([("fp16", 100.0, "100 KB"), ("klt", 30.0, "30 KB")], strong=1, label="bytes"))
    widths = [float(attrs["width"]) for tag, attrs in reader.tags if tag == "rect"]
    assert widths[1] / widths[0] == pytest.approx(0.3, abs=0.01)
    assert "30 KB" in reader.text
