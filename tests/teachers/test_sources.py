"""Models with arguments of their own, from hub repositories and folders, and what is known of their input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cae2pipe.config.base import fingerprinted, load
from cae2pipe.config.extract import ExtractSettings, TeacherSettings
from cae2pipe.errors import TeacherError
from cae2pipe.teachers.load import load_teacher, named_without_paths
from cae2pipe.teachers.telling import teacher_lines
from cae2pipe.teachers.timm import projection_width

CPU = torch.device("cpu")
ARGS = {"init_values": 0.5, "depth": 2}
CONFIG: dict[str, Any] = {
    "architecture": "test_vit",
    "num_classes": 0,
    "model_args": {"img_size": 96, "num_classes": 0, **ARGS},
    "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 160, 160]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with LayerScale, which timm's model of that name lacks, with its configuration."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=96, num_classes=0, **ARGS)
    path = tmp_path / "model"
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_arguments_build_a_model_that_timm_does_not_name(folder):
    file = folder / "model.safetensors"
    with pytest.raises(TeacherError, match=r"missing \(first: blocks"):
        load_teacher(TeacherSettings(kind="timm", name="test_vit", weights=file, image_size=96), CPU)
    given = TeacherSettings(kind="timm", name="test_vit", weights=file, image_size=96, model_args=ARGS)
    info = load_teacher(given, CPU).info
    assert info.architecture["model_args"] == ARGS
    assert "model_args" in fingerprinted(given)


def test_a_folder_is_replaced_by_what_it_holds(folder):
    settings = TeacherSettings(kind="timm", name=f"local-dir:{folder}")
    teacher = load_teacher(settings, CPU)
    assert (teacher.info.name, teacher.info.image_size, teacher.info.rows) == ("test_vit", 96, 6)
    assert teacher.info.mean == (0.1, 0.2, 0.3)
    named = named_without_paths(settings)
    assert str(folder) not in json.dumps([fingerprinted(named), teacher.info.identity()])
    same = load_teacher(named, CPU)
    assert same.info.identity() == teacher.info.identity()
    assert torch.equal(same(pixels()).tokens, teacher(pixels()).tokens)


def test_a_hub_repository_says_which_model_it_is(folder, hub_cache):
    from safetensors.torch import load_file

    file = hub_cache("some/model", "model.safetensors", load_file(folder / "model.safetensors"))
    (file.parent / "config.json").write_text(json.dumps(CONFIG))
    teacher = load_teacher(TeacherSettings(kind="timm", name="hf-hub:some/model"), CPU)
    local = load_teacher(TeacherSettings(kind="timm", name=f"local-dir:{folder}"), CPU)
    assert teacher.info.name == "hf-hub:some/model"
    assert teacher.info.weights == local.info.weights
    assert torch.equal(teacher(pixels()).tokens, local(pixels()).tokens)
    with pytest.raises(TeacherError, match="not cached"):
        load_teacher(TeacherSettings(kind="timm", name="hf-hub:some/other"), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": None}, "has no architecture"),
        ({"architecture": "resnet61"}, "timm has no model"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path is not the model's"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": "x.pth"}}}, "pretrained_cfg_overlay is not the model's"),
        ({"model_args": {"mlp_layer": "os.system"}}, "mlp_layer is 'os.system'"),
        ({"model_args": {"embed_dim": {"a": 1}}}, "embed_dim is not a plain value"),
        ({"model_args": {"no_such_argument": 1}}, "no_such_argument"),
        ({"model_args": [1]}, "model_args is not a mapping"),
        ({"model_args": {"in_chans": 4}}, "square RGB"),
        ({"pretrained_cfg": {"mean": "white"}}, "three numbers"),
        ({"pretrained_cfg": {"std": [0.5, 0, 0.5]}}, "std must be above 0"),
        ({"pretrained_cfg": {"std": [0.5, -1, 0.5]}}, "std must be above 0"),
    ],
)
def test_a_configuration_is_not_trusted(folder, change, message):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(TeacherError, match=message) as refused:
        load_teacher(TeacherSettings(kind="timm", name=f"local-dir:{folder}"), CPU)
    assert refused.value.fix


@pytest.mark.parametrize("content", [None, "[", "[]", '{"architectures": ["ViTModel"]}'])
def test_a_folder_without_a_configuration_is_refused(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(TeacherError):
        load_teacher(TeacherSettings(kind="timm", name=f"local-dir:{folder}"), CPU)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="no weights"):
        load_teacher(TeacherSettings(kind="timm", name=f"local-dir:{folder}"), CPU)


def test_mean_and_std_come_from_the_configuration_beside_the_file(folder):
    settings = TeacherSettings(kind="timm", name="test_vit", weights=folder / "model.safetensors", model_args=ARGS)
    settings = settings.model_copy(update={"image_size": 96})
    teacher = load_teacher(settings, CPU)
    assert (teacher.info.mean, teacher.assumed) == ((0.1, 0.2, 0.3), "")
    # Sets of before did not read it.
    assert load_teacher(settings.model_copy(update={"output": "raw"}), CPU).info.mean == (0.5, 0.5, 0.5)
    (folder / "config.json").unlink()
    teacher = load_teacher(settings, CPU)
    assert (teacher.info.mean, teacher.assumed) == ((0.5, 0.5, 0.5), "mean and std")
    assert teacher_lines(teacher) == [
        "teacher: test_vit, 96 px (its own 160), 6 x 6 x 64 + class token, mean 0.5 0.5 0.5, std 0.5 0.5 0.5, "
        "fp32, attention",
        "teacher: the mean and std of these weights are assumed: no configuration next to the file, no tag "
        "(teacher.pretrained) and no setting says otherwise",
    ]
    given = settings.model_copy(update={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    assert len(teacher_lines(load_teacher(given, CPU))) == 1


def test_a_tower_of_open_clip_is_described_beside_its_file(extract_settings, teacher_file, tmp_path):
    from safetensors.torch import load_file

    save_file(load_file(teacher_file), tmp_path / "open_clip_model.safetensors")
    settings = extract_settings().teacher.model_copy(
        update={"weights": tmp_path / "open_clip_model.safetensors", "quick_gelu": None}
    )
    assert load_teacher(settings, CPU).assumed == "mean and std and activation"
    adjacent = {
        "model_cfg": {"quick_gelu": True},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(adjacent))
    teacher = load_teacher(settings, CPU)
    assert teacher.info.architecture["quick_gelu"] is True
    assert (teacher.info.mean, teacher.assumed) == ((0.1, 0.2, 0.3), "")
    assert load_teacher(settings.model_copy(update={"output": "raw"}), CPU).info.architecture["quick_gelu"] is False


def test_the_default_size_is_the_models_own(folder):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "model.safetensors")
    (folder / "config.json").unlink()
    teacher = load_teacher(TeacherSettings(kind="timm", name="test_vit", weights=folder / "model.safetensors"), CPU)
    assert (teacher.info.image_size, teacher.info.rows) == (160, 10)


def test_settings_of_before_are_recorded_as_they_were():
    """Manifests of earlier sets name exactly these, and presets name their size."""
    before = {"kind", "name", "pretrained", "vision_cfg", "embed_dim", "quick_gelu"}
    before |= {"image_size", "stage", "mean", "std", "precision"}
    old = TeacherSettings(kind="timm", name="test_vit", image_size=224, output="raw")
    assert set(fingerprinted(old)) == before
    assert set(fingerprinted(TeacherSettings(kind="timm", name="test_vit"))) == before | {"output"}
    for preset in ("clip-b16", "clip-l14", "clip-l14-196", "lite0", "vit-tiny-in21k"):
        assert load(ExtractSettings, "extract", preset).teacher.image_size is not None


@pytest.mark.parametrize(("classes", "width"), [(512, 512), (128, None)])
def test_a_described_head_is_a_projection_only_at_the_width_of_timms(tmp_path, classes, width):
    """A classifier of 128 classes on CLIP's architecture must not become the latents."""
    own = {"num_classes": classes, "input_size": [3, 224, 224]}
    config = {"architecture": "vit_medium_patch32_clip_224", "num_classes": classes, "pretrained_cfg": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    named = named_without_paths(TeacherSettings(kind="timm", name=f"local-dir:{tmp_path}"))
    assert projection_width(named) == width
