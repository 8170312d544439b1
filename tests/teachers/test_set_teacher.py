"""What an earlier set or a tower's file says is used, and what nobody knows is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from open_clip.model import _build_vision_tower
from safetensors.torch import save_file

from cae2pipe.config.extract import TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.teachers.load import load_teacher, set_teacher

CPU = torch.device("cpu")
NARROW = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def test_a_sets_projection_does_not_depend_on_the_configuration_beside_its_file(photos, extract_settings, tmp_path):
    name, folder = "vit_base_patch16_clip_224", tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=512, img_size=32, **NARROW)
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(20)
        model.head.weight.normal_()
    file = folder / "model.safetensors"
    save_file(model.state_dict(), file)
    config = {"architecture": name, "pretrained_cfg": {"num_classes": 512, "input_size": [3, 224, 224]}}
    (folder / "config.json").write_text(json.dumps(config))
    few = tmp_path / "photos"
    shutil.copytree(next(path for path in sorted(photos.iterdir()) if path.is_dir()), few / "a")
    base = extract_settings(views=1, codec={"name": "fp16"}, speed={"workers": 0})
    teacher = TeacherSettings(kind="timm", name=name, weights=file, image_size=32, model_args=NARROW)
    made = extract_targets(few, tmp_path / "set", base.model_copy(update={"teacher": teacher}), report=Silent())
    assert made.identity["teacher"]["architecture"]["projected"]
    (folder / "config.json").unlink()
    assert set_teacher(made, file, CPU, option="--weights").info.identity() == made.identity["teacher"]


def test_weights_that_a_trunk_lacks_are_refused(tmp_path):
    config = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    tower = _build_vision_tower(32, config, quick_gelu=False)
    state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    settings = TeacherSettings(
        kind="open_clip", name="mine", weights=tmp_path / "w.safetensors", vision_cfg=config, embed_dim=32
    )
    save_file(state | {"text.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert load_teacher(settings, CPU).info.dim == 32
    save_file(state | {"visual.adapter.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"1 unexpected \(first: visual.adapter.weight"):
        load_teacher(settings, CPU)
