"""Licences: those declared or given, from extraction to the model card; what nobody declares is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cae2pipe
from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.licences import teacher_licence
from cae2pipe.teachers.spelling import teacher_settings


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("timm:vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        ("timm:vit_small_patch16_dinov3.lvd1689m@w.pth", "dinov3-license"),
        ("timm:vit_base_patch16_clip_224.metaclip_2pt5b", "cc-by-nc-4.0"),
        ("timm:vit_tiny_patch16_224", "apache-2.0"),  # timm's default weights
        ("timm:vit_tiny_patch16_224@w.pth", None),  # anybody's
        ("open_clip:ViT-B-16-quickgelu/openai", "apache-2.0"),
        ("open_clip:ViT-B-16/laion2b_s34b_b88k", None),  # open_clip does not say
        ("open_clip:ViT-B-16@w.pth", None),
        ("hf-hub:a/b", None),
    ],
)
def test_a_licence_is_the_one_that_the_weights_are_declared_to_have(text, licence, hub_cache):
    settings = teacher_settings(text)
    assert teacher_licence(settings) == licence
    assert teacher_licence(settings.model_copy(update={"licence": "mine"})) == "mine"


def test_a_folder_declares_its_own(tmp_path):
    settings = TeacherSettings(kind="timm", name=f"local-dir:{tmp_path}")
    assert teacher_licence(settings) is None
    for content, licence in (
        ({"pretrained_cfg": {"license": "mit"}}, "mit"),
        ({"pretrained_cfg": {"license": 3}}, None),
        ({"pretrained_cfg": []}, None),
        ([], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert teacher_licence(settings) == licence
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="not valid JSON"):
        teacher_licence(settings)


def test_licences_go_from_the_images_to_the_model_card(photos, extract_settings, pretrain_settings, tmp_path):
    shards, out, run = tmp_path / "shards", tmp_path / "set", tmp_path / "run"
    quiet = {"progress": False}
    cae2pipe.shard(photos, shards, overrides={"licence": "CC-BY-4.0", "samples": 70}, workers=0, **quiet)
    assert cae2pipe.inspect(shards)["licence"] == "CC-BY-4.0"
    targets = cae2pipe.extract_targets(shards, out, config=extract_settings(views=1), **quiet)
    assert targets is not None
    identity = targets.artifact.fingerprint
    assert cae2pipe.inspect(out)["licences"] == {"teacher": "unknown", "data": "CC-BY-4.0"}
    # Given later, with the set complete: known without making anything again.
    given = extract_settings(views=1, teacher={"licence": "mit"})
    targets = cae2pipe.extract_targets(shards, out, config=given, **quiet)
    assert targets is not None
    assert targets.artifact.fingerprint == identity
    assert targets.artifact.facts["licences"] == {"teacher": "mit", "data": "CC-BY-4.0"}
    cae2pipe.extract_targets(shards, out, config=extract_settings(views=1), **quiet)
    assert cae2pipe.inspect(out)["licences"] == {"teacher": "mit", "data": "CC-BY-4.0"}
    page = tmp_path / "report"
    cae2pipe.report_targets(out, out=page, **quiet)
    text = (page / "report.html").read_text()
    assert text.index("licence of the teacher") < text.index("mit", text.index("licence of the teacher"))
    assert "CC-BY-4.0" in text
    cae2pipe.pretrain(out, run, config=pretrain_settings(), **quiet)
    cae2pipe.export(run, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| licence of the teacher | mit |" in card
    assert "| licence of the images | CC-BY-4.0 |" in card
    assert cae2pipe.inspect(run)["licences"] == {"teacher": "mit", "data": "CC-BY-4.0"}


def test_what_is_unknown_is_not_written(target_root):
    assert json.loads(Path(target_root, "manifest.json").read_text())["licences"] == {}
    assert cae2pipe.inspect(target_root)["licences"] == {"teacher": "unknown", "data": "unknown"}
