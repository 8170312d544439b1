"""Figures in README.md and docs/ are those of the files in benchmarks/results/."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables

PAGES = tables.pages()


@pytest.mark.parametrize("path", PAGES, ids=[path.relative_to(tables.ROOT).as_posix() for path in PAGES])
def test_a_page_shows_what_was_measured(path):
    text = path.read_text()
    assert text.count("<!-- figures: ") == len(tables.MARKED.findall(text))
    assert tables.filled(text, tables.RESULTS) == text, "run `python -m benchmarks.tables --write`"


def test_every_table_stands_on_a_page():
    shown = {match[1] for path in PAGES for match in tables.MARKED.findall(path.read_text())}
    assert shown == tables.TABLES.keys()


def test_a_gpu_without_a_file_is_said_to_be_unmeasured(tmp_path):
    assert tables.gpu(tmp_path) == "Nothing has been measured on a GPU."


def test_a_gpu_with_a_file_has_a_table(tmp_path):
    """Rows as the suite's parts write them, of which some did not run."""
    size = {
        "size": "base",
        "variant": "compiled",
        "batch": 2048,
        "images/s": {"median": 4321.0, "spread": [4300, 4330]},
    }
    fed = {
        "fed": "by 8 workers, which decode",
        "views": "stored",
        "batch": 2048,
        "images/s": {"median": 4200.5, "spread": [4200.5, 4200.5]},
    }
    content = {
        "device": "Some Card",
        "started": "2027-01-31T12:00:00+00:00",
        "versions": {"torch": "2.14.1", "python": "3.12.1"},
        "stand_ins": {"photographs": "noise", "teachers": "random weights"},
        "parts": {
            "A": {"found": {}},
            "C-base": {"found": {"rows": [{**size, "mfu": 0.412, "memory_gb": 61.4}]}},
            "D-stored": {"found": {"rows": [{**fed, "/memory": 0.972, "data_wait": 0.01}]}},
        },
    }
    (tmp_path / "gpu-card.json").write_text(json.dumps(content))
    lines = tables.gpu(tmp_path).splitlines()
    assert lines[0].startswith("Some Card, 2027-01-31, PyTorch 2.14.1, Python 3.12.1 (")
    assert "noise, random weights" in lines[0]
    assert lines[4:] == [
        "| Base, compiled, batch 2048 | 4,320 | MFU 0.41, 61 GB |",
        "| Base fed by 8 workers, which decode, stored views, batch 2048 | 4,200 | 0.97 of that from memory |",
    ]


@pytest.mark.parametrize(
    ("value", "digits", "most", "wanted"),
    [(25326, 3, 3, "25,300"), (0.5582, 3, 3, "0.558"), (4.96, 2, 3, "5.0"), (0.83, 3, 2, "0.83"), (0.0, 3, 3, "0")],
)
def test_significant_digits(value, digits, most, wanted):
    assert tables.significant(value, digits, most) == wanted
