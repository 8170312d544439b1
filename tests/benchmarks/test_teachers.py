"""The sweep over teachers: on timm's smallest models, and on files of rows that were cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import score_tables, teacher_tour, teacher_values, teachers
from cae2pipe.errors import TeacherError


def test_a_model_with_tokens_is_equal_to_its_own_forward_pass():
    row = teachers.timm_shape("test_vit")
    assert row["works"]
    assert row["stage"] is None
    assert row["latents"] == "10 x 10 x 64, class token"
    found = teacher_values.compare_timm(row)
    assert found["equal"], found
    sizes = [size for size in found if size.isdigit()]
    assert len(sizes) == 2
    assert all(found[size].keys() == {"input", "patches", "output"} for size in sizes)


def test_a_pyramid_gives_its_last_feature_map():
    row = teachers.timm_shape("test_resnet")
    assert row["works"]
    assert row["stage"] == 4
    assert teacher_values.compare_timm(row)["equal"]


def test_a_teacher_with_other_latents_is_found(monkeypatch):
    """What was silently wrong once: positions that are not the model's at another size."""
    row = teachers.timm_shape("test_vit")
    load = teacher_values.load_teacher

    def wrong(settings, device):
        teacher = load(settings, device)
        if settings.image_size != row["size"]:
            with torch.no_grad():
                teacher.model.pos_embed.copy_(teacher.model.pos_embed.flip(1))
        return teacher

    monkeypatch.setattr(teacher_values, "load_teacher", wrong)
    found = teacher_values.compare_timm(row)
    own, other = (found[size] for size in found if size.isdigit())
    assert own["patches"] < teacher_values.TOLERANCE < other["patches"]
    assert not found["equal"]


def test_a_reason_has_no_names_so_that_it_can_be_counted():
    error = TeacherError("vit_a does not run at 3 pixels: vit_a is small\nand more", where="teacher.name", fix="other")
    assert teachers.said(error, "vit_a") == "does not run at 3 pixels: is small"


def test_a_sweep_resumes_after_a_line_that_was_cut_off(tmp_path):
    whole = {"key": "shape timm a", "part": "shape", "works": True}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:20])
    assert teachers.read_rows(file) == {"shape timm a": whole}
    assert teachers.read_rows(tmp_path / "none") == {}


def test_the_smallest_model_of_a_kind_represents_it():
    def row(name: str, parameters: int, *, kind: str = "a", works: bool = True) -> teachers.Row:
        return {"library": "timm", "name": name, "kind": kind, "works": works, "parameters": parameters, "size": 224}

    rows = [row("large", 9), row("small", 2), row("refused", 1, works=False), row("huge", 10**9, kind="b")]
    assert [found["name"] for found in teachers.representatives(rows)] == ["small", "huge"]


def test_families_count_what_works_and_why_not():
    rows = [
        {"works": True, "stage": None},
        {"works": True, "stage": 3},
        {"works": False, "reason": "takes 224 pixels"},
        {"works": False, "reason": "takes 256 pixels"},
    ]
    found = teachers.family_row("timm", "swin", rows)
    assert (found["models"], found["work"], found["tokens"]) == (4, 2, 1)
    assert found["refused"] == [[2, "takes N pixels"]]


@pytest.mark.parametrize("fails", [None, "verify"])
def test_a_tour_ends_with_the_first_command_that_fails(tmp_path, monkeypatch, fails):
    called = []

    def command(arguments):
        called.append(arguments[0])
        return int(arguments[0] == fails)

    monkeypatch.setattr(teacher_tour, "stored_latents", lambda _: "7 x 7 x 8")
    tour = teacher_tour.Tour("ViT", "timm", "test_vit")
    row = teacher_tour.travel(tour, tmp_path / "images", tmp_path / "test_vit", command)
    assert row["ended"] is (fails is None)
    assert called == ["extract-targets", "verify", "pretrain", "export"][: 2 if fails else 4]


def test_tables_of_teachers_say_what_is_refused(tmp_path: Path):
    assert score_tables.teachers(tmp_path) == score_tables.teacher_tour(tmp_path) == "Nothing has been measured."
    family = {"library": "timm", "family": "swin", "models": 3, "work": 1, "tokens": 0, "refused": [[2, "no map"]]}
    check = {"name": "work", "value": 0.5, "goal": ">= 0.9", "ok": False}
    fixed = {"library": "timm", "name": "cait_a", "64": {"patches": 0.0}, "96": "refused: takes 64 pixels! Mismatching"}
    result = {"rows": [family], "checks": [check], "settings": {"values": [fixed]}}
    (tmp_path / "teachers-cpu.json").write_text(json.dumps(result))
    text = score_tables.teachers(tmp_path)
    assert "| `cait_a` | timm | 96 | takes 64 pixels |" in text
    assert "| timm | swin | 1 of 3 | 0 | 2: no map |" in text
    assert "missed" in text
