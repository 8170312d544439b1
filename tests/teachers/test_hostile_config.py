"""Whatever a config.json holds, the model loads its description or one clear error says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import Cae2pipeError, TeacherError
from cae2pipe.teachers.load import named_without_paths
from cae2pipe.teachers.presets import latents_shape
from cae2pipe.teachers.timm_source import described

SCALARS: Any = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.integers(0, 300) | st.floats(allow_nan=False)
    | st.sampled_from(["", "gelu", "avg", "map", "test_vit", "\x1b[31m", "hf-hub:a/b"])
)  # fmt: skip
JSON: Any = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=2)
)
NUMBERS = st.integers(-1, 3) | JSON
ARGS = st.dictionaries(
    st.sampled_from(
        ["img_size", "in_chans", "depth", "patch_size", "num_heads", "embed_dim", "global_pool", "class_token",
         "reg_tokens", "act_layer", "mlp_layer", "init_values", "no_embed_class", "qkv_bias", "dynamic_img_size"]
    ),
    NUMBERS,
    max_size=3,
)  # fmt: skip
INNER = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("mean", "std", "input_size", "num_classes", "tag", "license"), JSON)
)
CONFIGS = JSON | st.fixed_dictionaries(
    {"architecture": st.sampled_from(["test_vit", "test_vit.r160_in1k", "test_efficientnet"]) | JSON},
    optional={"model_args": ARGS | JSON, "pretrained_cfg": INNER | JSON},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@settings(max_examples=40, deadline=None)
@given(config=CONFIGS)
def test_any_configuration_is_used_or_refused_clearly(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    refused = None
    try:
        named = named_without_paths(TeacherSettings(kind="timm", name=f"local-dir:{folder}"))
        assert TeacherSettings.model_validate(named.model_dump()) == named
        latents_shape(named)
    except Cae2pipeError as error:
        refused = error
    assert refused is None or refused.fix


@pytest.mark.parametrize(
    ("size", "args", "native"),
    [
        ([3, 384, 384], {}, 378),
        (None, {"img_size": [224, 224]}, 224),
        (None, {"img_size": 100, "patch_size": 16}, 96),
        ([3, 224, 196], {}, None),
        ([1, 224, 224], {}, None),
        (224, {}, None),
        ([3, True, True], {}, None),
        (None, {"img_size": [224, 196]}, None),
        (None, {"img_size": 8}, None),
    ],
)
def test_sizes_are_those_of_whole_patches_and_square(tmp_path, size, args, native):
    config = {"architecture": "vit_base_patch14_dinov2", "model_args": args, "pretrained_cfg": {"input_size": size}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if native is None:
        with pytest.raises(TeacherError, match="square RGB"):
            described(tmp_path / "config.json")
    else:
        assert described(tmp_path / "config.json").size == native


def test_a_folders_licence_stays_with_its_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "model.safetensors")
    for licence, known in (("mit", "mit"), ("\x1b[31mmit", None), ("x" * 201, None)):
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": "test_vit", "pretrained_cfg": {"license": licence}})
        )
        assert named_without_paths(TeacherSettings(kind="timm", name="local-dir:~/")).licence == known
    given_ = TeacherSettings(kind="timm", name="local-dir:~/", licence="mine")
    assert named_without_paths(given_).licence == "mine"


def test_arguments_that_build_no_model_are_named():
    settings = TeacherSettings(kind="timm", name="test_vit", model_args={"num_heads": 0})
    with pytest.raises(TeacherError, match="with the arguments num_heads"):
        latents_shape(settings)
