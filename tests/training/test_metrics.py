"""A damaged metrics file: readable lines are kept, and the others are reported."""

from __future__ import annotations

import json
import shutil

import pytest

from cae2pipe.comparison.gathering import gather_runs
from cae2pipe.reporting.comparison_text import notes
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.metrics import read_metrics, shown_ranges


def with_line(data: bytes, number: int, change) -> bytes:
    lines = data.splitlines(keepends=True)
    lines[number] = change(lines[number])
    return b"".join(lines)


DAMAGED = {
    "a bit": lambda data: with_line(data, 1, lambda line: b"\x7f" + line[1:]),
    "not UTF-8": lambda data: with_line(data, 1, lambda line: line.replace(b"epoch", b"ep\xffch")),
    "another name": lambda data: with_line(data, 1, lambda line: line.replace(b"step", b"stop")),
    "a list": lambda data: with_line(data, 1, lambda line: b"[]\n"),
    "NaN": lambda data: with_line(data, 1, lambda line: line.replace(b'"loss": ', b'"loss": NaN, "was": ')),
    "deep": lambda data: with_line(data, 1, lambda line: b"[" * 100000 + b"\n"),
    "a huge number": lambda data: with_line(data, 1, lambda line: line.replace(b'"step": ', b'"step": ' + b"9" * 5000)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_other_lines_are_read(damage, make_run):
    run = make_run(stop_after=4)
    path = run / "metrics.jsonl"
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    assert [line["step"] for line in read_metrics(path)[0]] == [0, 2, 3]
    assert inspect_folder(run)["damaged_lines"] == 1


def test_resuming_keeps_them_and_the_file_as_it_was(make_run, target_root, pretrain_settings, trained_run):
    run = make_run(stop_after=4)
    path = run / "metrics.jsonl"
    damaged = DAMAGED["not UTF-8"](path.read_bytes())
    path.write_bytes(damaged)
    report = Silent()
    pretrain(target_root, run, pretrain_settings(), report=report)
    lines, bad = read_metrics(path)
    assert bad == 0
    assert [line["step"] for line in lines] == [0, *range(2, 10)]
    whole = read_metrics(trained_run() / "metrics.jsonl")[0]
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole if line["step"] != 1]
    assert (run / "metrics.jsonl.damaged").read_bytes() == damaged
    [said] = [line for line in report.lines if "metrics.jsonl" in line]
    assert "1 damaged line," in said
    assert "no line for 1 step (1)" in said


@pytest.mark.parametrize("content", [None, b"", b"\0" * 4000])
def test_a_file_that_is_lost_is_told_once(content, make_run, target_root, pretrain_settings):
    run = make_run(stop_after=4)
    path = run / "metrics.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    for stop, lost in ((5, "(0 to 3)"), (6, "(0 to 3)")):
        report = Silent()
        pretrain(target_root, run, pretrain_settings(stop_after=stop), report=report)
        assert any(lost in line for line in report.lines)
    assert [line["step"] for line in read_metrics(path)[0]] == [4, 5]
    saved = sorted(found.name for found in run.glob("metrics.jsonl.*"))
    assert saved == ["metrics.jsonl.damaged"]


def test_a_second_damage_leaves_the_first_copy_alone(make_run, target_root, pretrain_settings):
    run = make_run(stop_after=4)
    for stop in (5, 6):
        path = run / "metrics.jsonl"
        path.write_bytes(with_line(path.read_bytes(), 0, lambda line: b"x\n"))
        pretrain(target_root, run, pretrain_settings(stop_after=stop), report=Silent())
    assert sorted(found.name for found in run.glob("metrics.jsonl.*")) == [
        "metrics.jsonl.damaged",
        "metrics.jsonl.damaged1",
    ]


def test_a_half_written_last_line_is_no_damage(trained_run, tmp_path):
    data = (trained_run() / "metrics.jsonl").read_bytes()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data[:-20])
    lines, damaged = read_metrics(path)
    assert (len(lines), damaged) == (9, 0)


def test_a_report_is_drawn_from_the_good_lines(trained_run, tmp_path):
    run = shutil.copytree(trained_run(), tmp_path / "run")
    path = run / "metrics.jsonl"
    gone = json.dumps(read_metrics(path)[0][1]["centred_cosine_masked"]).encode()
    assert gone in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(gone, b'"x"'))
    found = gather_runs([run], {}, [])
    assert [len(curve) for curve in found.rows[0].curves.values()] == [2, 2]
    assert f"{run.name}: ignored 1 damaged line of metrics.jsonl." in notes(found)


def test_ranges_of_numbers():
    assert shown_ranges([0, 1, 2, 7, 9, 10]) == "0 to 2, 7, 9 to 10"
    assert shown_ranges(list(range(0, 20, 2))) == "0, 2, 4, 6, 8, ..."
