from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.config.base import fingerprinted, preset_names
from cae2pipe.teachers.labels import LONGEST, label, safe, spelling
from cae2pipe.teachers.spelling import teacher_settings


def identity(spelling: str, **teacher: str) -> dict:
    settings = {"teacher": fingerprinted(teacher_settings(spelling)), "view": {}, "codec": {}}
    return {"settings": settings, "teacher": {"name": "x", "library": "timm", "weights": "0" * 64, **teacher}}


@pytest.mark.parametrize("preset", preset_names("extract"))
def test_a_preset_is_its_own_label(preset):
    assert label(identity(preset)) == preset


@pytest.mark.parametrize(
    "given", [*preset_names("extract"), "timm:vit_small_patch14_dinov2.lvd142m", "hf-hub:Some/Model"]
)
def test_a_teacher_is_spelled_as_the_command_line_takes_it(given):
    assert teacher_settings(spelling(identity(given))) == teacher_settings(given)


def test_other_models_are_called_by_the_last_part_of_their_name():
    assert label(identity("timm:vit_small_patch14_dinov2.lvd142m")) == "vit_small_patch14_dinov2-lvd142m"
    assert label(identity("hf-hub:Some.Org/My Model.v2")) == "my-model-v2"
    # A preset's model under timm's spelling.
    assert label(identity("timm:vit_base_patch16_dinov3.lvd1689m")) == "dinov3-b16"


def test_a_name_that_is_taken_is_made_unique_by_what_the_teacher_is():
    first, other = identity("lite0"), identity("lite0", weights="1" * 64)
    assert label(other, taken=["lite0"]) != label(first, taken=["lite0"])
    assert re.fullmatch("lite0-[0-9a-f]{8}", label(other, taken=["lite0"]))
    assert label(other, taken=["clip-b16"]) == "lite0"


@given(st.text(max_size=80))
def test_a_label_is_safe_in_names_of_files_and_settings(name):
    assert re.fullmatch(rf"([a-z0-9][a-z0-9_-]{{0,{LONGEST - 1}}})?", safe(name))


def test_a_set_names_its_teacher(target_root):
    from cae2pipe.targets.target_set import TargetSet

    targets = TargetSet(target_root)
    assert targets.label == label(TargetsArtifact.open(target_root).identity) == "tiny"
