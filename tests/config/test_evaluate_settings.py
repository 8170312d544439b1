"""Settings of evaluation: presets, both forms of k, refusals."""

from __future__ import annotations

import pytest

from cae2pipe.config.base import identity, load, show
from cae2pipe.config.evaluate import KnnSettings, LinearSettings
from cae2pipe.config.stages import settings_class
from cae2pipe.errors import SettingsError

KINDS = {"knn": KnnSettings, "linear": LinearSettings}


@pytest.mark.parametrize("name", KINDS)
def test_presets_are_valid_and_shown_settings_load_again(name, tmp_path):
    settings = load(KINDS[name], "evaluate", name)
    (tmp_path / "shown.yaml").write_text(show(settings))
    assert load(KINDS[name], "evaluate", str(tmp_path / "shown.yaml")) == settings
    assert settings_class("evaluate", name) is KINDS[name]


def test_presets_are_the_published_protocols():
    knn, linear = load(KnnSettings, "evaluate", "knn"), load(LinearSettings, "evaluate", "linear")
    assert (knn.k[0], sorted(knn.k), knn.temperature) == (20, [10, 20, 100, 200], 0.07)
    assert (linear.lr, linear.batch, linear.epochs, linear.warmup_epochs, linear.momentum) == (0.1, 16384, 90, 10, 0.9)


def test_one_k_is_enough():
    assert load(KnnSettings, "evaluate", "knn", ["k=5"]).k == (5,)
    assert load(KnnSettings, "evaluate", "knn", ["k=[5, 1]"]).k == (5, 1)


def test_speed_changes_no_identity():
    fast = load(KnnSettings, "evaluate", "knn", ["speed.workers=3", "speed.batch=7", "speed.device=cpu"])
    assert identity(fast) == identity(load(KnnSettings, "evaluate", "knn"))
    assert identity(load(KnnSettings, "evaluate", "knn", ["features.crop=1"])) != identity(fast)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("knn", "k=0", "at least 1"),
        ("knn", "k=[]", "at least one"),
        ("knn", "k=[20, -1]", "at least 1"),
        ("knn", "temperature=0", "temperature"),
        ("knn", "temprature=0.1", "did you mean 'temperature'?"),
        ("knn", "features.feature=cls", "features.feature"),
        ("knn", "features.crop=1.5", "features.crop"),
        ("linear", "batch=1", "batch"),
        ("linear", "epochs=10", "warmup_epochs 10 leaves nothing of 10 epochs"),
        ("linear", "lr=.inf", "lr"),
    ],
)
def test_what_does_not_fit_is_refused(name, override, message):
    with pytest.raises(SettingsError) as caught:
        load(KINDS[name], "evaluate", name, [override])
    assert message in str(caught.value)
