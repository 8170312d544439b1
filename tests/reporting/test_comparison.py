"""Text of a comparison: means, deviations, orders and cost, from numbers and from outputs of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cae2pipe.comparison.gathering import fill_columns
from cae2pipe.comparison.rows import Comparison, Finished, Row
from cae2pipe.reporting.comparison_page import along_axis, comparison_html
from cae2pipe.reporting.comparison_text import better, cells, comparison_markdown, findings, order_of
from cae2pipe.reporting.gallery import Gallery


def row(name: str, *scores: float, paper: float | None = None, **more) -> Row:
    return Row(name, {"linear": list(scores)}, {} if paper is None else {"linear": paper}, **more)


def comparison(*rows: Row, along: str = "") -> Comparison:
    return Comparison("T", "", ["linear"], list(rows), {"linear": "p"}, 6, along)


def test_the_report_says_where_the_papers_order_does_not_hold():
    compared = comparison(row("a", 0.50, 0.52, paper=70.0), row("b", 0.40, 0.41, paper=75.0), row("c"))
    assert findings(compared) == [
        "linear: the paper's order, b > a, does not hold: a is above b. Here a > b.",
    ]


def test_what_is_too_near_to_tell_is_said():
    rows = row("a", 0.50, 0.60, paper=75.0), row("b", 0.52, 0.57, paper=70.0), row("c", 0.2, 0.21, paper=60.0)
    (line,) = findings(comparison(*rows))
    assert "holds, except for differences that are too small: a, b. Here a ≈ b > c." in line
    assert better(rows[0], rows[2], "linear")
    assert not better(rows[0], rows[1], "linear")
    (line,) = findings(comparison(*rows[:2]))
    assert "a > b, can be neither confirmed nor rejected here" in line


def test_a_difference_counts_from_two_standard_errors_on():
    """Means 0.1 apart; standard errors of 0.03 and 0.04 give the difference one of 0.05."""
    first, second = row("a", 0.6 - 0.03, 0.6 + 0.03), row("b", 0.5 - 0.04, 0.5 + 0.04)
    assert (first.error("linear"), second.error("linear")) == pytest.approx((0.03, 0.04))
    assert better(row("a", 0.601 - 0.03, 0.601 + 0.03), second, "linear")
    assert not better(row("a", 0.599 - 0.03, 0.599 + 0.03), second, "linear")


def test_of_one_seed_there_is_no_verdict():
    (line,) = findings(comparison(row("a", 0.5, paper=2.0), row("b", 0.4, paper=1.0)))
    assert line == ("linear: the paper's order is a > b; here, with one seed and so without an error estimate, a > b.")


def test_equal_figures_of_the_paper_have_no_order():
    rows = row("a", 0.5, 0.51, paper=2.0), row("b", 0.4, 0.41, paper=2.0)
    (line,) = findings(comparison(*rows, row("c", 0.1, 0.11, paper=1.0)))
    assert "the paper's order, a = b > c, holds." in line


def test_no_order_without_two_rows_that_have_both():
    assert findings(comparison(row("a", 0.5, paper=70.0), row("b", 0.4), row("c", paper=60.0))) == []
    assert order_of([row("a", 0.1), row("b", 0.2)], "linear") == "b > a"


def test_no_column_is_lost_because_its_name_repeats():
    compared = Comparison("T", "", ["loss"], [Row("a", {"loss": [0.5]}, curves={"loss": [2.0]})], {}, 1)
    headers, (cell,) = cells(compared)
    assert headers == ["variant", "loss (2)", "loss (3)", "kB per view", "device min per run"]
    assert cell[1:3] == ["50.0", "2.000"]


def test_the_table():
    first = row("a|b", 0.5, 0.6, paper=70.0, curves={"loss": [1.0, 0.5]}, hours=[0.5, 1.5], latents=5400.0)
    compared = comparison(first, row("c"))
    headers, rows = cells(compared)
    assert headers == ["variant", "linear", "linear, paper", "loss", "kB per view", "device h per run"]
    assert rows == [["a|b", "55.0 ± 7.1", "70.0", "0.500", "5.4", "1"], ["c", "–", "–", "–", "–", "–"]]
    text = comparison_markdown(compared)
    assert "| a\\|b | 55.0 ± 7.1 |" in text
    assert "2 of 6 scores" in text


def test_short_runs_are_told_in_minutes():
    headers, rows = cells(comparison(row("a", 0.5, hours=[0.25, 0.75])))
    assert (headers[-1], rows[0][-1]) == ("device min per run", "30")


def test_scores_are_drawn_along_the_axis_and_the_rest_as_levels(monkeypatch):
    from cae2pipe.reporting import comparison_page

    seen = {}
    monkeypatch.setattr(comparison_page, "curves", lambda lines, **options: seen.update(lines=lines, **options))
    rows = [row("2", 0.5, 0.7, along=2.0), row("1", 0.4, along=1.0), row("fresh", 0.9)]
    along_axis(rows, "linear", "data.views")
    assert (seen["x_label"], seen["y_label"]) == ("stored views per image", "linear, %")
    points = seen["lines"]["linear"]
    assert list(points.xs) == [1, 2]
    assert list(points.ys) == pytest.approx([40, 60])
    assert list(points.errors) == pytest.approx([0, 14.142], abs=1e-2)
    assert seen["levels"] == {"fresh": pytest.approx(90)}


def test_cells_say_what_was_read_where_rows_differ():
    finished = [Finished("linear", 0.5, "p", "d", "mean"), Finished("linear", 0.6, "p", "d", "class")]
    rows = [Row(name, results=[[one]]) for name, one in zip("ab", finished, strict=True)]
    columns, protocols = fill_columns(rows, [])
    compared = Comparison("T", "", columns, rows, protocols, 2)
    assert [line[1] for line in cells(compared)[1]] == ["50.0 (mean)", "60.0 (class)"]
    assert "on the class token, the mean patch." in comparison_markdown(compared)


def test_what_failed_and_what_is_unfinished_is_told():
    rows = [Row("a", unfinished=[(Path("runs/x"), "unfinished, epoch 3 of 20")])]
    compared = Comparison("T", "", ["knn"], rows, {}, 1, failed=["a, seed 0 (loss nan)"])
    text = comparison_markdown(compared)
    assert "- Not finished: a, seed 0 (loss nan)" in text
    assert "| a | x (unfinished, epoch 3 of 20) |" in text


def test_the_page_names_runs_and_escapes_what_is_given(tmp_path):
    runs = [Path("x/caev2-s0-1"), Path("x/caev2-s1-2")]
    first = row("<a>", 0.5, runs=runs, curves={"loss": [2.0, 1.0], "centred_cosine_masked": [0.0, 0.0]})
    page = comparison_html(comparison(first, row("b", 0.6)), Gallery())
    assert "&lt;a&gt;" in page
    assert "<a>" not in page
    assert "caev2-s0-1, caev2-s1-2" in page
    # Scores and losses; it has no predictions for masked patches.
    assert page.count("<img") == 2
