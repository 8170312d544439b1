"""Exports to other libraries: each loads them with its own code and computes what we do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import export_encoder
from cae2pipe.models.formats import FORMATS
from cae2pipe.stages.export import export
from tests.conftest import edit_manifest

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def encoder() -> Encoder:
    """Random values also in biases, norms and LayerScale, where a fresh one has constants."""
    torch.manual_seed(0)
    encoder = Encoder(width=60, depth=3, heads=5, image_size=32, patch_size=8).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1 or parameter.shape[0] == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return encoder


@pytest.fixture
def source(encoder, tmp_path) -> Path:
    export_encoder(encoder, tmp_path / "source")
    return tmp_path / "source"


@torch.no_grad()
def test_timm(encoder, source, tmp_path):
    export(str(source), tmp_path / "out", "timm", [])
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(model.forward_features(PIXELS), encoder(PIXELS), rtol=0, atol=1e-5)
    # What was exported can be scored and exported again.
    again = load_encoder(str(source), 0, torch.device("cpu"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == again.model.state_dict().keys()


@torch.no_grad()
def test_open_clip(encoder, source, tmp_path):
    import open_clip

    out = tmp_path / "out"
    export(str(source), out, "open_clip", [])
    model, _, prepare = open_clip.create_model_and_transforms(
        f"local-dir:{out}", load_weights=False, pretrained_image_path=str(out / "visual.safetensors")
    )
    torch.testing.assert_close(model.eval().visual(PIXELS), encoder(PIXELS)[:, 0], rtol=0, atol=1e-5)
    assert tuple(prepare.transforms[-1].mean) == (0.485, 0.456, 0.406)
    # The file says enough of itself to be a teacher, with CLIP's normalisation of pixels.
    ours = load_encoder(f"open_clip:any@{out / 'visual.safetensors'}", 0, torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    straight = load_encoder(str(source), 0, torch.device("cpu"))
    assert ours(pixels).class_token.shape == straight(pixels).class_token.shape


@torch.no_grad()
def test_hf(encoder, source, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        export(str(source), tmp_path / "out", "hf", [])
        model, report = transformers.ViTModel.from_pretrained(
            tmp_path / "out", add_pooling_layer=False, output_loading_info=True
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found = model.eval()(PIXELS).last_hidden_state
    torch.testing.assert_close(found, encoder(PIXELS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_card_says_what_it_is_and_its_front_matter_is_yaml(kind, make_run, tmp_path):
    run = make_run()
    manifest = json.loads((run / "manifest.json").read_text())
    teacher = {"name": "ViT-B-16", "library": "open_clip", "weights": "0" * 64}
    edit_manifest(run, teacher={**manifest["teacher"], **teacher})
    files = export(str(run), tmp_path / "out", kind, [])
    card = (tmp_path / "out" / "README.md").read_text()
    _, matter, text = card.split("---\n", 2)
    assert yaml.safe_load(matter)["library_name"] in ("timm", "open_clip", "transformers")
    assert "ViT-B-16 (open_clip)" in text
    assert "| epochs | 2 |" in text
    assert str(tmp_path) not in card
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_the_command_twice_and_over_something_else(source, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["export", str(source), *map(str, arguments)])

    first = run(tmp_path / "out")
    assert first.exit_code == 0, first.output
    assert "model.safetensors" in first.stdout
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert run(tmp_path / "out", "--format", "timm").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    other = run(tmp_path / "out", "--format", "open_clip")
    assert other.exit_code == 2
    assert "not empty" in other.stderr
    assert run(source).exit_code == 2


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="another library"):
        export("random:vit_tiny_patch16_224", tmp_path / "out", "timm", [])
    with pytest.raises(SourceError, match="no such encoder"):
        export(str(tmp_path / "nowhere"), tmp_path / "out", "timm", [])
    assert not (tmp_path / "out").exists()
