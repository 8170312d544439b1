"""Settings of evaluation: presets, both forms of k, refusals."""

from __future__ import annotations

import pytest

from cae2pipe.config.base import fingerprinted, load, preset_names, show
from cae2pipe.config.dense import DENSE
from cae2pipe.config.evaluate import EVALUATIONS, FinetuneSettings, KnnSettings
from cae2pipe.config.stages import settings_class
from cae2pipe.errors import SettingsError

SIZES = ("tiny", "small", "base", "large")


@pytest.mark.parametrize("name", [*EVALUATIONS, *(f"finetune-{size}" for size in SIZES)])
def test_presets_are_valid_and_shown_settings_load_again(name, tmp_path):
    kind = EVALUATIONS[name.partition("-")[0]]
    settings = load(kind, "evaluate", name)
    (tmp_path / "shown.yaml").write_text(show(settings))
    assert load(kind, "evaluate", str(tmp_path / "shown.yaml")) == settings
    assert settings_class("evaluate", name) is kind


def test_every_evaluation_has_its_preset_and_every_preset_its_evaluation():
    assert {name.partition("-")[0] for name in preset_names("evaluate")} == {*EVALUATIONS, *DENSE}


def finetune(size: str, *overrides: str) -> FinetuneSettings:
    return load(FinetuneSettings, "evaluate", f"finetune-{size}", overrides=overrides)


def test_official_fine_tuning_is_what_the_scripts_say():
    tiny, small, base = (finetune(size, "recipe=official") for size in SIZES[:3])
    assert (tiny.lr, tiny.layer_decay, tiny.draw.rand_augment, tiny.epochs) == (4e-3, 0.85, 9, 100)
    assert (small.lr, small.layer_decay, small.warmup_epochs, small.epochs) == (4e-4, 0.75, 20, 200)
    assert base == finetune("base").model_copy(update={"recipe": "official"})
    assert {settings.erase for settings in (tiny, small, base)} == {0.25}
    assert (tiny.ema, tiny.clip) == (0.0, None)


def test_knn_is_dinos_protocol():
    knn = load(KnnSettings, "evaluate", "knn")
    assert (knn.k[0], sorted(knn.k), knn.temperature) == (20, [10, 20, 100, 200], 0.07)


def test_one_k_is_enough():
    assert load(KnnSettings, "evaluate", "knn", overrides=["k=5"]).k == (5,)
    assert load(KnnSettings, "evaluate", "knn", overrides=["k=[5, 1]"]).k == (5, 1)


def test_speed_changes_no_identity():
    fast = load(KnnSettings, "evaluate", "knn", overrides=["speed.workers=3", "speed.batch=7", "speed.device=cpu"])
    assert fingerprinted(fast) == fingerprinted(load(KnnSettings, "evaluate", "knn"))
    assert fingerprinted(load(KnnSettings, "evaluate", "knn", overrides=["features.crop=1"])) != fingerprinted(fast)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("knn", "k=0", "at least 1"),
        ("knn", "k=[]", "1 to 100 numbers"),
        ("knn", "k=[20, -1]", "at least 1"),
        ("knn", "temperature=0", "temperature"),
        ("knn", "temprature=0.1", "did you mean 'temperature'?"),
        ("knn", "features.feature=cls", "features.feature"),
        ("knn", "features.crop=1.5", "features.crop"),
        ("linear", "batch=1", "batch"),
        ("linear", "epochs=10", "warmup_epochs (10) must be less than epochs (10)"),
        ("linear", "lr=.inf", "lr"),
        ("linear", "sweep=[0.1]", "needs cached crops"),
        ("finetune", "chunk=100", "batch 1024 is not divisible by chunk 100: set chunk=64"),
        ("finetune", "chunk=1", "chunk"),
        ("finetune", "batch=1025", "is not divisible by"),
        ("finetune", "draw.scale=[0.5, 0.1]", "not a range"),
        ("attentive", "warmup_epochs=90", "must be less than epochs"),
    ],
)
def test_what_does_not_fit_is_refused(name, override, message):
    with pytest.raises(SettingsError) as caught:
        load(EVALUATIONS[name], "evaluate", name, overrides=[override])
    assert message in str(caught.value)
