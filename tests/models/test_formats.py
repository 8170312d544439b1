"""Exports to other libraries: each loads them with its own code and computes the same as the run's encoder."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cae2pipe.artifacts.manifest import seal
from cae2pipe.cli import app
from cae2pipe.errors import SettingsError, SourceError
from cae2pipe.evaluation.encoders import load_encoder
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import CONFIG, WEIGHTS, export_encoder
from cae2pipe.models.formats import FORMATS, folded
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.export import export
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.student import load_student
from tests.conftest import contents

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def encoder() -> Encoder:
    """Random values also in biases, norms and LayerScale, which are constant in a new encoder."""
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


def fold(folder: Path) -> None:
    """Convert an encoder's folder to the form of older versions: LayerScale multiplied into the weights."""
    save_file(folded(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    del config["model_args"]["init_values"]
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.fixture
def older(source) -> Path:
    fold(source)
    return source


@torch.no_grad()
def tokens(kind: str, out: Path) -> Tensor:
    """Another library's output for PIXELS: all tokens; with open_clip only the class token."""
    if kind == "timm":
        return timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval().forward_features(PIXELS)
    if kind == "open_clip":
        import open_clip

        model, _, prepare = open_clip.create_model_and_transforms(
            f"local-dir:{out}", load_weights=False, pretrained_image_path=str(out / "visual.safetensors")
        )
        assert tuple(prepare.transforms[-1].mean) == (0.485, 0.456, 0.406)
        return model.eval().visual(PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        model, report = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()(PIXELS).last_hidden_state


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("written", ["source", "older"])
@torch.no_grad()
def test_another_library_computes_the_same(written, kind, encoder, request, tmp_path):
    export(str(request.getfixturevalue(written)), tmp_path / "out", kind, scores=[])
    found, wanted = tokens(kind, tmp_path / "out"), encoder(PIXELS)
    torch.testing.assert_close(found, wanted[:, 0] if found.ndim == 2 else wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
@torch.no_grad()
def test_a_run_of_pretrain_is_exported_as_it_is(kind, trained_run, target_root, tmp_path):
    """The card describes the encoder; the weights compute the same as the student of the last checkpoint."""
    run, out = trained_run(), tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(run), str(out), "--format", kind])
    assert done.exit_code == 0, done.output
    assert sorted(Path(line).name for line in done.stdout.split()) == sorted(path.name for path in out.iterdir())
    found, student = tokens(kind, out), load_student(run, TargetSet(target_root), Silent())[0]
    wanted = student.encoder(PIXELS)
    torch.testing.assert_close(found, wanted[:, 0] if found.ndim == 2 else wanted, rtol=0, atol=1e-5)
    card = (out / "README.md").read_text()
    _, matter, text = card.split("---\n", 2)
    assert yaml.safe_load(matter)["library_name"] in ("timm", "open_clip", "transformers")
    teacher = json.loads((target_root / "manifest.json").read_text())["identity"]["teacher"]
    assert f"| teacher | tiny (open_clip), weights {teacher['weights'][:16]} |" in text
    assert "| epochs | 2 |" in text
    assert str(tmp_path) not in card
    # Only the file of weights, inside the run.
    assert export(str(run / WEIGHTS), out, kind, scores=[])
    assert (out / "README.md").read_text() == card


@pytest.mark.parametrize("kind", FORMATS)
@torch.no_grad()
def test_a_run_of_an_older_version_is_exported(kind, trained_run, tmp_path):
    """The manifest lacks the teacher's library and weights; LayerScale is in the encoder's weights."""
    run = tmp_path / "run"
    run.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copy(trained_run() / name, run)
    wanted = tokens("timm", export(str(run), tmp_path / "wanted", "timm", scores=[])[0].parent)
    fold(run)
    manifest = json.loads((trained_run() / "manifest.json").read_text())
    del manifest["teacher"]["library"], manifest["teacher"]["weights"], manifest["units"]["encoder"]
    (run / "manifest.json").write_bytes(seal(manifest))
    export(str(run), tmp_path / "out", kind, scores=[])
    found = tokens(kind, tmp_path / "out")
    torch.testing.assert_close(found, wanted[:, 0] if found.ndim == 2 else wanted, rtol=0, atol=1e-5)
    assert "| teacher | tiny |" in (tmp_path / "out" / "README.md").read_text()


def test_what_was_exported_can_be_scored_and_exported_again(source, tmp_path):
    again = load_encoder(str(source), 0, torch.device("cpu"))
    export(str(source), tmp_path / "out", "timm", scores=[])
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == again.model.state_dict().keys()
    # open_clip's file has enough metadata to be a teacher, with CLIP's normalisation of pixels.
    export(str(source), tmp_path / "clip", "open_clip", scores=[])
    teacher = load_encoder(f"open_clip:any@{tmp_path / 'clip' / 'visual.safetensors'}", 0, torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert teacher(pixels).class_token.shape == again(pixels).class_token.shape


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
    # An exported folder is an encoder too, under its own prefix.
    for given in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        with pytest.raises(SourceError) as caught:
            load_encoder(str(given), 0, torch.device("cpu"))
        assert caught.value.fix == f"give local-dir:{tmp_path / 'out'}"
        with pytest.raises(SourceError, match="this is an exported encoder") as caught:
            export(str(given), tmp_path / "again", "hf", scores=[])
        assert f"local-dir:{tmp_path / 'out'} as it is" in caught.value.fix
    load_encoder(f"local-dir:{tmp_path / 'out'}", 0, torch.device("cpu"))


def test_an_exported_folder_is_named_as_a_shell_takes_it(source, tmp_path):
    out = tmp_path / "it's my export"
    export(str(source), out, "timm", scores=[])
    quoted = shlex.quote(f"local-dir:{out}")
    with pytest.raises(SourceError) as caught:
        load_encoder(str(out), 0, torch.device("cpu"))
    assert caught.value.fix == f"give {quoted}"
    with pytest.raises(SourceError) as caught:
        export(str(out), tmp_path / "again", "hf", scores=[])
    assert caught.value.fix.startswith(f"use {quoted} as it is")


def test_another_encoder_or_format_takes_no_place_of_an_export(source, make_run, tmp_path):
    export(str(source), tmp_path / "out", "timm", scores=[])
    before = contents(tmp_path / "out")
    for spec, kind in ((make_run(), "timm"), (source, "hf")):
        with pytest.raises(SourceError, match="an export of another encoder, or in another format"):
            export(str(spec), tmp_path / "out", kind, scores=[])
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("visible", [0.0, 1.0])
def test_a_card_says_whether_the_class_token_was_trained(make_run, tmp_path, visible):
    export(str(make_run(loss={"visible": visible})), tmp_path / "out", "timm", scores=[])
    assert ("The class token had no loss" in (tmp_path / "out" / "README.md").read_text()) is not bool(visible)


def test_a_run_is_a_folder_of_timm(make_run):
    run, pixels = make_run(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    own, timms = (load_encoder(spec, 0, torch.device("cpu")) for spec in (str(run), f"local-dir:{run}"))
    torch.testing.assert_close(timms.tokens(pixels).patches, own.tokens(pixels).patches, rtol=1e-5, atol=1e-5)


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="another library"):
        export("random:vit_tiny_patch16_224", tmp_path / "out", "timm", scores=[])
    with pytest.raises(SourceError, match="no such encoder"):
        export(str(tmp_path / "nowhere"), tmp_path / "out", "timm", scores=[])
    assert not (tmp_path / "out").exists()


def test_a_target_set_is_no_encoder(target_root, tmp_path):
    with pytest.raises(SourceError, match="folder of kind 'targets'"):
        export(str(target_root), tmp_path / "out", "timm", scores=[])
