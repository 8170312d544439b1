"""What a comparison says: means, spreads, orders and cost, from numbers and from what runs left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from cae2pipe.reporting.comparison import (
    Comparison,
    Row,
    better,
    by_epoch,
    cells,
    comparison_markdown,
    device_hours,
    findings,
    flat,
    order_of,
    row_names,
)
from cae2pipe.reporting.comparison_page import along_axis, comparison_html
from cae2pipe.reporting.gallery import Gallery


def row(name: str, *scores: float, paper: float | None = None, **more) -> Row:
    return Row(name, {"linear": list(scores)}, {} if paper is None else {"linear": paper}, **more)


def comparison(*rows: Row, along: str = "") -> Comparison:
    return Comparison("T", "", ["linear"], list(rows), {"linear": "p"}, 6, along)


def test_the_report_says_where_the_papers_order_does_not_hold():
    found = comparison(row("a", 0.50, 0.52, paper=70.0), row("b", 0.40, 0.41, paper=75.0), row("c"))
    assert findings(found) == [
        "linear: the paper's order, b > a, does not hold: a is above b. Here a > b.",
    ]


def test_what_is_too_near_to_tell_is_said():
    rows = row("a", 0.50, 0.60, paper=75.0), row("b", 0.52, 0.57, paper=70.0), row("c", 0.2, 0.21, paper=60.0)
    (line,) = findings(comparison(*rows))
    assert "holds, but for what is too near to tell: a, b. Here a ≈ b > c." in line
    assert better(rows[0], rows[2], "linear")
    assert not better(rows[0], rows[1], "linear")


def test_one_seed_says_nothing_of_its_spread():
    (line,) = findings(comparison(row("a", 0.5, paper=2.0), row("b", 0.4, paper=1.0)))
    assert line.startswith("linear: the paper's order, a > b, holds (one seed:")


def test_equal_figures_of_the_paper_have_no_order():
    (line,) = findings(comparison(row("a", 0.5, 0.51, paper=2.0), row("b", 0.4, 0.41, paper=2.0)))
    assert "the paper's order, a = b, holds." in line


def test_no_order_without_two_rows_that_have_both():
    assert findings(comparison(row("a", 0.5, paper=70.0), row("b", 0.4), row("c", paper=60.0))) == []
    assert order_of([row("a", 0.1), row("b", 0.2)], "linear") == "b > a"


def test_the_table():
    first = row("a|b", 0.5, 0.6, paper=70.0, curves={"loss": [1.0, 0.5]}, hours=[0.5, 1.5], latents=5400.0)
    found = comparison(first, row("c"))
    headers, rows = cells(found)
    assert headers == ["variant", "linear", "linear, paper", "loss", "kB a view", "device h a run"]
    assert rows == [["a|b", "55.0 ± 7.1", "70.0", "0.500", "5.4", "1"], ["c", "–", "–", "–", "–", "–"]]
    text = comparison_markdown(found)
    assert "| a\\|b | 55.0 ± 7.1 |" in text
    assert "2 of 6 scores" in text


def test_short_runs_are_told_in_minutes():
    headers, rows = cells(comparison(row("a", 0.5, hours=[0.25, 0.75])))
    assert (headers[-1], rows[0][-1]) == ("device min a run", "30")


def test_device_hours_count_every_device():
    lines = [
        {"images": 3600, "images_per_s": 2.0, "devices": 8},
        {"images": 3600, "images_per_s": 1.0},
        {"images": 5, "images_per_s": 0.0},
    ]
    assert device_hours(lines) == pytest.approx(0.5 * 8 + 1)


def test_means_by_epoch():
    lines = [{"epoch": e, "loss": v} for e, v in ((0, 1.0), (0, 3.0), (1, 5.0))]
    assert by_epoch(lines, "loss") == [2.0, 5.0]


def test_rows_are_named_by_what_sets_them_apart():
    rows = [flat({"a": {"b": v, "c": 1}, "d": w}) for v, w in ((1, "x"), (1, "y"), (2, "x"))]
    assert row_names(rows) == ["", "d=y", "a.b=2"]
    assert row_names(rows[:1]) == [""]


def test_scores_are_drawn_along_the_axis_and_the_rest_as_levels(monkeypatch):
    from cae2pipe.reporting import comparison_page

    seen = {}
    monkeypatch.setattr(comparison_page, "curves", lambda lines, **options: seen.update(lines=lines, **options))
    rows = [row("2", 0.5, 0.7, along=2.0), row("1", 0.4, along=1.0), row("fresh", 0.9)]
    along_axis(rows, "linear", "views")
    assert (seen["x_label"], seen["y_label"]) == ("views", "linear, %")
    points = seen["lines"]["linear"]
    assert list(points.xs) == [1, 2]
    assert list(points.ys) == pytest.approx([40, 60])
    assert list(points.errors) == pytest.approx([0, 14.142], abs=1e-2)
    assert seen["levels"] == {"fresh": pytest.approx(90)}


def test_the_page_names_runs_and_escapes_what_is_given(tmp_path):
    runs = [Path("x/caev2-s0-1"), Path("x/caev2-s1-2")]
    first = row("<a>", 0.5, runs=runs, curves={"loss": [2.0, 1.0], "centred_cosine_masked": [0.0, 0.0]})
    page = comparison_html(comparison(first, row("b", 0.6)), Gallery())
    assert "&lt;a&gt;" in page
    assert "<a>" not in page
    assert "caev2-s0-1, caev2-s1-2" in page
    # Scores and losses; of masked patches it predicts nothing.
    assert page.count("<img") == 2
