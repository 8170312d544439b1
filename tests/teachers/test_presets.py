from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.config.base import load, package_folder, preset_names
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import SettingsError, TeacherError
from cae2pipe.runtime.terminal import Terminal
from cae2pipe.teachers import lite0
from cae2pipe.teachers.presets import fetch, find, list_presets
from cae2pipe.teachers.spelling import teacher_settings


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    return {row["preset"]: row for row in list_presets()}


def test_every_preset_builds_and_is_listed_with_its_latents(rows):
    assert rows.keys() == set(preset_names("extract"))
    others = {name: row["latents"] for name, row in rows.items() if not row["latents"].startswith("14x14x")}
    assert others == {"clip-l14": "16x16x768"}
    widths = {"clip-b16": "512", "lite0": "112", "dinov3-l16": "1024", "siglip2-so400m14": "1152"}
    assert {name: rows[name]["latents"].rpartition("x")[2] for name in widths} == widths
    assert (rows["clip-l14-196"]["input"], rows["siglip2-so400m14"]["size"]) == ("196", "428M")
    assert rows["dinov3-b16"]["model"] == "timm:vit_base_patch16_dinov3.lvd1689m"
    assert rows["clip-b16"]["model"] == "open_clip:ViT-B-16-quickgelu/openai"
    assert (rows["lite0"]["here"] == "yes") == (lite0.lite0_file() is not None)


@pytest.mark.parametrize("name", preset_names("extract"))
def test_a_presets_model_is_what_its_spelling_gives(name, rows):
    preset = load(ExtractSettings, "extract", name).teacher
    assert (
        teacher_settings(rows[name]["model"]).model_copy(
            update={"image_size": preset.image_size, "stage": preset.stage}
        )
        == preset
    )


def test_precision_on_cuda_is_the_one_published_and_the_presets_comment_says_so(rows):
    in_bf16 = {name for name, row in rows.items() if row["CUDA"] == "bf16"}
    assert {name.partition("-")[0] for name in in_bf16} == {"c", "dinov3", "eupe", "siglip2"}
    for name, row in rows.items():
        if name not in ("lite0", "vit-tiny-in21k"):
            assert row["CUDA"] in (package_folder("configs") / "extract" / f"{name}.yaml").read_text()


def test_licences_are_those_that_the_hub_declares(rows):
    assert rows["dinov3-b16"]["licence"] == "dinov3-license"
    assert rows["eupe-b16"]["licence"] == "fair-noncommercial-research-license"
    assert rows["clip-b16"]["licence"] == "apache-2.0"


def test_a_terminal_of_80_columns_shows_all_but_the_models(rows, monkeypatch):
    monkeypatch.setattr("cae2pipe.teachers.presets.list_presets", lambda: list(rows.values()))
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = CliRunner().invoke(app, ["teachers", "list"]).stdout.splitlines()
    assert len(wide) == 1 + len(preset_names("extract"))
    assert "timm:vit_base_patch16_dinov3.lvd1689m" in "".join(wide)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("cae2pipe.commands.presets.console", Terminal(width=80))
    narrow = CliRunner().invoke(app, ["teachers", "list"]).stdout.splitlines()
    assert narrow[0].split() == ["preset", "size", "latents", "licence", "here"]
    assert len(narrow) == len(wide)  # nothing is folded
    assert max(map(len, narrow)) <= 80


def test_weights_in_the_cache_are_at_hand(hub_cache):
    file = hub_cache("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors", {})
    found = {name for name in preset_names("extract") if find(load(ExtractSettings, "extract", name).teacher)}
    assert found - {"lite0"} == {"clip-b16"}
    assert fetch("clip-b16") == fetch("open_clip:ViT-B-16-quickgelu/openai") == [file]


def test_without_a_network_fetching_says_so(hub_cache):
    with pytest.raises(TeacherError, match="cannot be downloaded") as refused:
        fetch("vit-tiny-in21k")
    assert "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k" in str(refused.value)
    with pytest.raises(SettingsError, match=r"unknown teacher .clip-b17. .nearest: .clip-b16"):
        fetch("clip-b17")


def test_a_file_that_is_missing_is_not_fetched_from_the_hub(hub_cache, tmp_path):
    with pytest.raises(TeacherError, match="no such weights file"):
        fetch(f"clip-b16@{tmp_path / 'w.pt'}")
    with pytest.raises(TeacherError, match="this is a folder"):
        fetch(f"timm:test_vit@{tmp_path}")
