"""Presets have the paper's values, except where a deviation is listed with its reason."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from functools import cache, reduce
from typing import Any

import pytest

from cae2pipe.config.base import Settings, load, preset_names
from cae2pipe.config.stages import settings_class
from tests.config.paper import ABSENT, DEVIATIONS, OTHERS, SOURCES, Between, OneOf, Sizes, Some


@cache
def settings(stage: str, preset: str) -> Settings:
    return load(settings_class(stage, preset), stage, preset)


def value_of(stage: str, preset: str, name: str) -> Any:
    value: Any = settings(stage, preset)
    for part in name.split("."):
        value = getattr(value, part, ABSENT)
    return value


def agrees(value: Any, paper: Any) -> bool:
    if value == ABSENT:
        return False
    if isinstance(paper, OneOf):
        return value in paper.values
    if isinstance(paper, Between):
        return (min(value), max(value)) == (paper.low, paper.high)
    if isinstance(paper, Some):
        return bool(value > 0)
    return bool(value == paper)


def rows() -> Iterator[tuple[str, str, str, Any, Any]]:
    """Source and words, preset with its stage, setting, value, the paper's value."""
    for source in SOURCES:
        for preset, size in source.presets.items():
            for words, (name, paper) in source.rows.items():
                wanted = getattr(paper, size) if isinstance(paper, Sizes) else paper
                value = value_of(source.stage, preset, name)
                yield f"{source.name}: {words}", f"{source.stage} {preset}", name, value, wanted


def listed() -> dict[tuple[str, str], Any]:
    return {(preset, entry.setting): entry.value for entry in DEVIATIONS for preset in entry.presets}


def test_presets_differ_from_the_paper_only_where_it_is_listed():
    unlisted = [
        f"{preset}: {name} is {value!r}, and the paper has {wanted!r} ({words})"
        for words, preset, name, value, wanted in rows()
        if not agrees(value, wanted) and (preset, name) not in listed()
    ]
    assert not unlisted, "correct these, or list them in DEVIATIONS with their reason:\n" + "\n".join(unlisted)


def test_every_listed_deviation_exists_with_this_value():
    found = {(preset, name): value for _, preset, name, value, wanted in rows() if not agrees(value, wanted)}
    gone = {key: value for key, value in listed().items() if found.get(key, "the paper's") != value}
    assert not gone, f"correct these lines of DEVIATIONS, or remove them: {gone}"
    assert all(entry.reason for entry in DEVIATIONS)
    assert len(listed()) == sum(len(entry.presets) for entry in DEVIATIONS)


def test_every_preset_is_held_against_the_paper_or_named_as_something_else():
    for stage in ("pretrain", "evaluate"):
        held = {preset for source in SOURCES if source.stage == stage for preset in source.presets}
        assert not held & OTHERS[stage].keys()
        assert held | OTHERS[stage].keys() == set(preset_names(stage))


def test_no_two_rows_name_one_setting_of_a_preset():
    names = [(preset, name) for _, preset, name, _, _ in rows()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("words", "place", "word"),
    [(f"{source.name}: {words}", place, word) for source in SOURCES for words, (place, word) in source.code.items()],
)
def test_what_is_no_setting_is_in_the_code(words, place, word):
    module, _, name = place.partition(":")
    code = reduce(getattr, name.split("."), importlib.import_module(module))
    assert word in inspect.getsource(code), words


def test_a_changed_value_is_seen(monkeypatch):
    changed = settings("pretrain", "base").model_copy(update={"epochs": 299, "views": "fresh"})
    monkeypatch.setattr(f"{__name__}.settings", lambda *_: changed)
    other = {(name, value) for _, preset, name, value, wanted in rows() if not agrees(value, wanted)}
    assert ("epochs", 299) in other
    assert "views" not in {name for name, _ in other}
