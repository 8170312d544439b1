from __future__ import annotations

import pytest

from cae2pipe.errors import SettingsError, TeacherError
from cae2pipe.teachers import lite0
from cae2pipe.teachers.presets import fetch, list_presets


def test_every_preset_is_listed_with_its_latents(hub_cache):
    rows = {row["preset"]: row for row in list_presets()}
    latents = {name: row["latents"] for name, row in rows.items()}
    assert latents == {
        "clip-b16": "14 x 14 x 512",
        "clip-l14": "16 x 16 x 768",
        "clip-l14-196": "14 x 14 x 768",
        "lite0": "14 x 14 x 112",
        "vit-tiny-in21k": "14 x 14 x 192",
    }
    assert rows["clip-l14-196"]["input"] == "196 px"
    assert rows["clip-b16"]["weights"] == "not cached"
    assert (rows["lite0"]["weights"] == "cached") == (lite0.lite0_file() is not None)


def test_weights_in_the_cache_are_at_hand(hub_cache):
    file = hub_cache("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors", {})
    assert {row["preset"] for row in list_presets() if row["weights"] == "cached"} - {"lite0"} == {"clip-b16"}
    assert fetch("clip-b16") == [file]


def test_without_a_network_fetching_says_so(hub_cache):
    with pytest.raises(TeacherError, match="cannot be downloaded") as refused:
        fetch("vit-tiny-in21k")
    assert "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k" in str(refused.value)
    with pytest.raises(SettingsError, match="unknown extract preset"):
        fetch("clip-b17")
