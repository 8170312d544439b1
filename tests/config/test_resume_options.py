"""What a message proposes to a folder that was made with other settings."""

from __future__ import annotations

import shlex

import pytest

from cae2pipe.artifacts.difference import differences
from cae2pipe.config.base import fingerprinted, load, merge, parse_override
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.config.resume_options import as_yaml, completed_as, resuming


def settings(*overrides: str) -> PretrainSettings:
    return load(PretrainSettings, "pretrain", "tiny", overrides=overrides)


def proposed(begun: PretrainSettings, now: PretrainSettings, targets: str = "a") -> str:
    old, new = {"settings": fingerprinted(begun), "targets": "a"}, {"settings": fingerprinted(now), "targets": targets}
    found = list(differences(*map(completed_as(PretrainSettings), (old, new))))
    return resuming(PretrainSettings, found, "elsewhere", without=("optimizer",))


@pytest.mark.parametrize(
    "begun",
    [
        ["seed=7"],
        ["mask.ratio=0.25", "loss.kind=mse"],
        ["model.predictor_norm=true"],
        ["model.predictor_depth=3", "loss.class_token=masked", "data.streams=16"],
        ["loss.masked=0.0", "loss.visible=0.5"],
    ],
)
def test_the_proposed_options_restore_the_settings(begun):
    options, _, rest = proposed(settings(*begun), settings()).partition(" resumes it; or ")
    assert rest == "elsewhere"
    words = shlex.split(options)
    assert words[::2] == ["--set"] * len(begun)
    assert settings(*words[1::2]) == settings(*begun)


def test_other_inputs_sections_and_many_settings_are_not_restored_by_options():
    assert proposed(settings("seed=7"), settings(), targets="b") == "elsewhere"
    assert proposed(settings("optimizer.lr=0.5"), settings()) == "elsewhere"
    many = ["seed=7", "epochs=30", "mask.ratio=0.3", "loss.visible=0.5", "data.streams=16"]
    assert proposed(settings(*many), settings()) == "elsewhere"


def test_entries_of_a_mapping_are_not_restored_by_options():
    """Labels of teachers have dots, and an option cannot remove an entry."""
    for begun in ("loss.teachers={a.b: 2.0, c: 1.0}", "loss.teachers={c: 1.0}"):
        assert proposed(settings(begun), settings("loss.teachers={a.b: 1.0, c: 1.0}")) == "elsewhere"


def test_values_are_written_as_they_are_read():
    assert as_yaml("random") == "random"
    for value in ("1", "null", "a: b", " a", "", None, True, 0.25, [1, 2], "[", "x#y", "x #y"):
        assert parse_override(f"a.b={as_yaml(value)}") == {"a": {"b": value}}


def test_a_setting_that_was_not_recorded_has_its_earlier_value():
    completed = completed_as(PretrainSettings)
    old = {"settings": fingerprinted(settings())}
    assert "predictor_norm" not in old["settings"]["model"]
    new = {"settings": merge(old["settings"], {"model": {"predictor_norm": True}})}
    (only,) = differences(completed(old), completed(new))
    assert only == ("settings.model.predictor_norm", False, True)
    same = {"settings": merge(old["settings"], {"model": {"predictor_norm": False}})}
    assert not list(differences(completed(old), completed(same)))
