"""Other spellings of a set's teacher resume the set; what differs does not."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.errors import MismatchError, TeacherError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.teachers.resuming import canonical
from cae2pipe.teachers.spelling import teacher_settings
from tests.conftest import contents

TAG = "r160_in1k"


@pytest.fixture
def model(hub_cache):
    """timm's test_vit, in the hub's cache."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(5)
    return hub_cache(f"timm/test_vit.{TAG}", "model.safetensors", model.state_dict())


@pytest.fixture
def extract(photos, extract_settings, tmp_path, model):
    """Makes or resumes a set with exactly these settings of its teacher."""
    few = tmp_path / "photos"
    shutil.copytree(next(path for path in sorted(photos.iterdir()) if path.is_dir()), few / "a")

    def run(**teacher) -> TargetsArtifact:
        base = extract_settings(views=1, codec={"name": "fp16"}, speed={"workers": 0}).model_dump(exclude_unset=True)
        values = {"kind": "timm", **teacher}
        settings = ExtractSettings.model_validate({**base, "teacher": values})
        return extract_targets(few, tmp_path / "set", settings, report=Silent())

    return run


SPELLINGS = [
    {"name": f"test_vit.{TAG}", "image_size": 160},
    {"name": "test_vit", "pretrained": TAG},
    {"name": "test_vit"},
    {"name": f"test_vit.{TAG}", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
]


@pytest.mark.parametrize("first", SPELLINGS[:3])
def test_every_spelling_of_the_same_weights_resumes_a_set(extract, first, tmp_path):
    made = extract(**first)
    assert made.identity["settings"]["teacher"]["name"] == f"test_vit.{TAG}"
    before = contents(tmp_path / "set")
    for other in SPELLINGS:
        extract(**other)
    assert contents(tmp_path / "set") == before
    for different in ({"image_size": 96}, {"mean": [0.4, 0.5, 0.5]}, {"name": f"test_vit2.{TAG}"}):
        with pytest.raises((MismatchError, TeacherError)):
            extract(**{**SPELLINGS[0], **different})


def test_a_folder_resumes_its_set_also_from_a_file(extract, model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(model, folder / "model.safetensors")
    config = {"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.4, 0.5, 0.6]}}
    (folder / "config.json").write_text(json.dumps(config))
    made = extract(name=f"local-dir:{folder}", image_size=64)
    assert made.identity["teacher"]["image_size"] == 64
    before = contents(tmp_path / "set")
    extract(name=f"local-dir:{folder}")
    extract(name="test_vit", weights=folder / "model.safetensors", mean=[0.4, 0.5, 0.6], std=[0.229, 0.224, 0.225])
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("timm:test_vit", f"test_vit.{TAG}"),
        ("timm:test_vit@w.pth", "test_vit"),
        ("lite0", "tf_efficientnet_lite0"),
        ("hf-hub:a/b", "hf-hub:a/b"),
        ("clip-b16", "ViT-B-16-quickgelu"),
    ],
)
def test_a_new_set_records_one_name(text, name):
    assert canonical(teacher_settings(text)).name == name
    joined = TeacherSettings(kind="timm", name="test_vit", pretrained=TAG)
    assert canonical(joined) == TeacherSettings(kind="timm", name=f"test_vit.{TAG}", pretrained=None)
