"""Sets that were made before a teacher's latents were what its model means keep their meaning."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from cae2pipe.artifacts.artifact import MANIFEST, TargetsArtifact
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.teachers.load import load_teacher, set_teacher

CPU = torch.device("cpu")


@pytest.fixture
def beit(extract_settings, tmp_path):
    """Settings of a model whose class token is a by-product: it pools the mean of its patches."""
    torch.manual_seed(0)
    args = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    model = timm.create_model("beit_base_patch16_224", num_classes=0, **args)
    save_file(model.state_dict(), tmp_path / "beit.safetensors")
    teacher = {
        "kind": "timm",
        "name": "beit_base_patch16_224",
        "weights": str(tmp_path / "beit.safetensors"),
        "model_args": {name: value for name, value in args.items() if name != "img_size"},
        "vision_cfg": None,
        "embed_dim": None,
        "quick_gelu": None,
        "image_size": 32,
    }

    def settings(**over):
        return extract_settings(views=1, codec={"name": "fp16"}, teacher=teacher | over)

    return settings


def test_the_same_command_resumes_an_earlier_set(beit, photos, tmp_path):
    out = tmp_path / "set"
    extract_targets(photos, out, beit(output="raw"), report=Silent())
    made = TargetsArtifact.open(out)
    assert not {"output", "summary", "project", "layers"} & made.identity["settings"]["teacher"].keys()
    assert made.facts["teacher"]["class_token"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != MANIFEST}
    extract_targets(photos, out, beit(), report=Silent())  # its defaults would leave the class token out
    assert before == {path: path.read_bytes() for path in before}
    weights = tmp_path / "beit.safetensors"
    teacher = set_teacher(made, weights, CPU, option="--weights")
    assert (teacher.info.class_token, teacher.info.summary) == (True, None)
    assert teacher.info.identity() == made.identity["teacher"]
    fresh = load_teacher(beit().teacher, CPU).info
    assert (fresh.class_token, fresh.summary) == (False, 32)
