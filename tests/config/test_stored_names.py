"""Settings that were renamed: manifests and fingerprints keep the names that they had, and readers find them."""

from __future__ import annotations

import json

import pytest

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.comparison.gathering import gather_runs
from cae2pipe.config.base import STORED_NAMES, build, fingerprinted, load, recorded
from cae2pipe.config.pretrain import ModelSettings, PretrainSettings
from cae2pipe.errors import MismatchError, SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.student import run_settings


@pytest.mark.parametrize(
    ("preset", "digest"),
    [("base", "182762ae889c15ac"), ("tiny", "045d1ef0fce67c71"), ("mae", "9a821c054c9a216b")],
)
def test_fingerprints_are_those_from_before(preset, digest):
    settings = load(PretrainSettings, "pretrain", preset)
    stored = fingerprinted(settings)
    assert fingerprint(stored)[:16] == digest
    assert STORED_NAMES.keys() <= ModelSettings.model_fields.keys()
    assert set(STORED_NAMES.values()) <= stored["model"].keys()
    assert not STORED_NAMES.keys() & stored["model"].keys()
    assert build(PretrainSettings, recorded(PretrainSettings, stored), "here") == settings


@pytest.mark.parametrize("stored", STORED_NAMES.values())
def test_the_name_from_before_is_refused_and_the_present_one_named(stored, tmp_path):
    present = stored.replace("regressor", "predictor")
    file = tmp_path / "own.yaml"
    file.write_text(f"extends: tiny\nmodel: {{{stored}: 2}}\n")
    for preset, overrides in (("tiny", [f"model.{stored}=2"]), (str(file), [])):
        with pytest.raises(SettingsError, match=f"unknown setting 'model.{stored}'") as caught:
            load(PretrainSettings, "pretrain", preset, overrides=overrides)
        assert caught.value.fix == f"did you mean 'model.{present}'?"


def test_runs_of_cae_from_before_its_final_norm_resume_without_it_alone(make_run, target_root, pretrain_settings):
    preset = load(PretrainSettings, "pretrain", "cae")
    before = load(PretrainSettings, "pretrain", "cae", overrides=["model.predictor_norm=false"])
    assert fingerprint(fingerprinted(before))[:16] == "e4d184bb30ffcbb3"
    assert fingerprinted(before) == {
        **fingerprinted(preset),
        "model": {name: v for name, v in fingerprinted(preset)["model"].items() if name != "predictor_norm"},
    }
    run = make_run(method="cae")
    assert "predictor_norm" not in json.loads((run / "manifest.json").read_text())["identity"]["settings"]["model"]
    state = (run / "encoder.safetensors").read_bytes()
    pretrain(target_root, run, pretrain_settings(method="cae"), report=Silent())
    assert (run / "encoder.safetensors").read_bytes() == state
    assert not run_settings(run).model.predictor_norm
    with pytest.raises(MismatchError, match=r"settings\.model\.predictor_norm = false, and true is req") as caught:
        pretrain(target_root, run, pretrain_settings(method="cae", model={"predictor_norm": True}), report=Silent())
    assert str(caught.value.fix).startswith("--set model.predictor_norm=false resumes it; or use another output folder")


def test_a_run_keeps_the_names_and_is_told_by_the_present_ones(make_run, target_root, pretrain_settings):
    shallow, deep = make_run(), make_run(model={"predictor_depth": 2})
    model = json.loads((deep / "manifest.json").read_text())["identity"]["settings"]["model"]
    assert model["regressor_depth"] == 2
    assert run_settings(deep).model.predictor_depth == 2
    with pytest.raises(MismatchError, match=r"settings\.model\.predictor_depth = 2, and 1 is requested") as caught:
        pretrain(target_root, deep, pretrain_settings(), report=Silent())
    assert str(caught.value.fix).startswith("--set model.predictor_depth=2 resumes it")
    assert [row.name for row in gather_runs([shallow, deep], {}, []).rows] == [
        shallow.name,
        f"{deep.name} (model.predictor_depth=2)",
    ]
