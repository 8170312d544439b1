"""Plots: the right values, equal bytes for equal figures, and a valid page."""

from __future__ import annotations

import base64
import os
import re
from xml.etree import ElementTree

import pytest
from matplotlib.container import BarContainer

from cae2pipe.reporting import plots
from cae2pipe.reporting.html import Html
from cae2pipe.reporting.plots import Points, bars, curves, dots
from tests.reporting.test_html import read


@pytest.fixture
def drawn(monkeypatch):
    """The axes that a plot has drawn on, before they become a picture."""
    figures = []
    real = plots.svg
    monkeypatch.setattr(plots, "svg", lambda figure, alt: figures.append((figure, alt)) or real(figure, alt))
    return lambda: (figures[-1][0].axes[0], figures[-1][1])


def picture(text: Html) -> ElementTree.Element:
    (tag, attributes), *_ = read(text).tags
    assert tag == "img"
    kind, _, data = attributes["src"].partition("base64,")
    assert kind == "data:image/svg+xml;"
    content = base64.b64decode(data)
    # The only addresses in it are names of namespaces, so it loads nothing.
    assert not re.search(rb"href=.http|url[(]http|<script", content)
    return ElementTree.fromstring(content)


LINES = {"both <losses>": Points([1, 2, 3], [60.0, 70.0, 75.0], [1.0, 2.0, 0.5]), "one": Points([1, 2, 3], [5, 6, 7])}


def test_curves_have_their_values_names_and_levels(drawn):
    root = picture(curves(LINES, x_label="epochs", y_label="knn, %", levels={"teacher": 90.0}))
    assert root.tag.endswith("svg")
    axes, alt = drawn()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epochs", "knn, %")
    assert axes.get_legend_handles_labels()[1] == ["teacher", "both <losses>", "one"]
    (line, _, (bars,)), _ = axes.containers
    assert line.get_ydata().tolist() == [60, 70, 75]
    assert [sorted(segment[:, 1]) for segment in bars.get_segments()] == [[59, 61], [68, 72], [74.5, 75.5]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]
    assert "both <losses>" in alt


def test_wide_ranges_of_few_points_are_logarithmic(drawn):
    curves({"a": Points([1, 2, 4, 8], [1, 2, 3, 4])}, x_label="x", y_label="y")
    assert drawn()[0].get_xscale() == "log"
    curves({"a": Points([0, 8], [1, 2])}, x_label="x", y_label="y")
    assert drawn()[0].get_xscale() == "linear"
    curves({"a": Points(range(1, 100), range(1, 100))}, x_label="x", y_label="y")
    assert drawn()[0].get_xscale() == "linear"


def test_dots_are_the_values_and_bars_their_means(drawn):
    dots({"a": [1.0, 3.0], "b": [], "c": [5.0]}, x_label="knn, %")
    axes, _ = drawn()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c"]
    values, mean, *_ = axes.lines
    assert values.get_xdata().tolist() == [1, 3]
    assert set(mean.get_xdata()) == {2}
    # The first name is at the top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_long_names_leave_room(drawn):
    name = "loss.kind=mse, " * 20
    for plot in (
        dots({name: [1.0, 2.0], "b": [3.0]}, x_label="x"),
        curves({name: LINES["one"]}, x_label="x", y_label="y"),
    ):
        picture(plot)
    assert plots.wrapped(name).count("\n") == 3


def test_bars_are_as_long_as_their_values(drawn):
    bars([("fp16", 100.0, "100 kB"), ("klt", 30.0, "30 kB")], strong=1, x_label="kB a view")
    axes, alt = drawn()
    (container,) = (c for c in axes.containers if isinstance(c, BarContainer))
    assert [bar.get_width() for bar in container] == [100, 30]
    assert "klt 30 kB" in alt


def test_equal_figures_give_equal_bytes():
    one, two = (curves(LINES, x_label="x", y_label="y") for _ in range(2))
    assert one == two


@pytest.mark.parametrize("ys", [[1.0], [2.0, 2.0], [float("nan"), 1.0]])
def test_odd_curves_are_drawn(ys):
    picture(curves({"a": Points(range(len(ys)), ys)}, x_label="x", y_label="y"))


def test_a_date_that_is_not_written_cannot_be_wrong(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "x")
    picture(curves(LINES, x_label="epochs", y_label="loss"))
    assert os.environ["SOURCE_DATE_EPOCH"] == "x"
