"""Pretraining that starts from given weights: ``model.init``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cae2pipe.comparison.gathering import gather_runs
from cae2pipe.errors import ManifestError, MismatchError, SettingsError, SourceError
from cae2pipe.evaluation.initialisation import initial_weights
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import export_encoder
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.export import export
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.pretrain import pretrain
from tests.conftest import contents

ONE_STEP = {"epochs": 2, "stop_after": 1}


def write_encoder(folder: Path, seed: int) -> Path:
    """An exported encoder with positions of its own for images of 48 pixels; returns its weights file."""
    torch.manual_seed(seed)
    encoder = Encoder(width=32, depth=2, heads=2, image_size=48, patch_size=8)
    encoder.pos_embed.add_(0.1 * torch.randn_like(encoder.pos_embed))
    folder.mkdir()
    export_encoder(encoder, folder)
    return folder / "encoder.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An exported encoder. Read-only."""
    return write_encoder(tmp_path_factory.mktemp("weights") / "donor", seed=7)


def with_init(pretrain_settings, init: Path | str, **over):
    model = {**over.pop("model", {}), "init": init}
    return pretrain_settings(model=model, **over)


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("method", ["caev2", "cae", "mvp", "mae", "milan", "fd"])
def test_every_method_starts_from_the_weights(method, target_root, pretrain_settings, weights, tmp_path):
    # The first step has a learning rate of 0.
    pretrain(
        target_root, tmp_path / "run", with_init(pretrain_settings, weights, method=method, **ONE_STEP), report=Silent()
    )
    pretrain(target_root, tmp_path / "drawn", pretrain_settings(method=method, **ONE_STEP), report=Silent())
    state, drawn = checkpoint(tmp_path / "run", 1), checkpoint(tmp_path / "drawn", 1)
    donor = load_file(weights)
    assert torch.equal(state["encoder.blocks.1.attn.qkv.weight"], donor["blocks.1.attn.qkv.weight"])
    assert torch.equal(state["encoder.pos_embed"][:, 0], donor["pos_embed"][:, 0])
    assert not torch.allclose(state["encoder.pos_embed"], drawn["encoder.pos_embed"], atol=0.05)
    # What comes after the encoder is drawn as without it.
    others = [name for name in state if not name.startswith("encoder.")]
    assert others
    assert all(torch.equal(state[name], drawn[name]) for name in others)


def test_a_run_resumes_from_moved_weights_to_the_same_bits_and_not_from_others(
    target_root, pretrain_settings, weights, tmp_path
):
    report = Silent()
    pretrain(target_root, tmp_path / "whole", with_init(pretrain_settings, weights), report=report)
    assert any(line.startswith("starting from donor, weights ") for line in report.lines)
    out = tmp_path / "run"
    pretrain(target_root, out, with_init(pretrain_settings, weights, stop_after=3), report=Silent())
    moved = Path(shutil.copytree(weights.parent, tmp_path / "moved"))
    for other, said in (
        (with_init(pretrain_settings, write_encoder(tmp_path / "other", seed=8)), "model.init"),
        (pretrain_settings(), "and null is requested now"),
    ):
        with pytest.raises(MismatchError, match=said) as caught:
            pretrain(target_root, out, other, report=Silent())
        assert "the weights that this run started from" in caught.value.fix
    report = Silent()
    pretrain(target_root, out, with_init(pretrain_settings, moved), report=report)
    assert any("resuming from step 3" in line for line in report.lines)
    assert not any("starting from" in line for line in report.lines)
    own, whole = contents(out), contents(tmp_path / "whole")
    assert all(own[name] == whole[name] for name in ("encoder.safetensors", "config.json", "manifest.json"))
    # Positions stay those of the weights, resampled.
    positions = load_file(out / "encoder.safetensors")["pos_embed"]
    assert torch.equal(positions[:, 0], load_file(weights)["pos_embed"][:, 0])

    assert inspect_folder(out)["init"] == "donor"
    export(str(out), tmp_path / "exported", "timm", scores=[])
    digest = json.loads((out / "manifest.json").read_text())["identity"]["init"]
    assert f"| started from | donor, weights {digest[:16]} |" in (tmp_path / "exported" / "README.md").read_text()


def test_other_mean_and_std_of_the_same_weights_are_others(pretrain_settings, weights, tmp_path):
    other = Path(shutil.copytree(weights.parent, tmp_path / "donor")) / "config.json"
    config = json.loads(other.read_text())
    config["pretrained_cfg"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    other.write_text(json.dumps(config))
    first, second = (
        initial_weights(with_init(pretrain_settings, folder).model) for folder in (weights.parent, other.parent)
    )
    assert not torch.equal(first.state["patch_embed.weight"], second.state["patch_embed.weight"])
    assert first.digest != second.digest


def test_a_teacher_whose_latents_are_resampled_has_the_weights_of_its_model(pretrain_settings, weights, tmp_path):
    lines = ["teacher:", "  kind: timm", f"  name: local-dir:{weights.parent}", f"  weights: {weights}"]
    files = [tmp_path / name for name in ("own.yaml", "coarse.yaml")]
    files[0].write_text("\n".join([*lines, ""]))
    files[1].write_text("\n".join([*lines, "  grid: [3, 3]", ""]))
    own, coarse = (initial_weights(with_init(pretrain_settings, f"teacher:{file}").model) for file in files)
    assert own.digest == coarse.digest
    assert all(torch.equal(coarse.state[name], tensor) for name, tensor in own.state.items())
    assert torch.equal(own.state["norm.weight"], load_file(weights)["norm.weight"])


def test_a_run_starts_from_another_run(target_root, pretrain_settings, trained_run, tmp_path):
    first = trained_run()
    out = tmp_path / "second"
    pretrain(target_root, out, with_init(pretrain_settings, first, **ONE_STEP), report=Silent())
    donor = load_file(first / "encoder.safetensors")
    state = checkpoint(out, 1)
    assert torch.equal(state["encoder.blocks.0.mlp.fc2.weight"], donor["blocks.0.mlp.fc2.weight"])
    assert torch.equal(state["encoder.pos_embed"], donor["pos_embed"])
    # Not two seeds of the same settings, nor the same run twice.
    assert len(gather_runs([first, out], {}, []).rows) == 2


def test_weights_that_do_not_fit_leave_no_folder(target_root, pretrain_settings, weights, tmp_path):
    out = tmp_path / "run"
    unfinished = tmp_path / "unfinished"
    pretrain(target_root, unfinished, pretrain_settings(stop_after=1), report=Silent())
    for init, error, said in (
        (weights, SettingsError, "depth 2, the student 3"),
        (tmp_path / "missing", SourceError, "no such encoder"),
        (unfinished, ManifestError, "this run is not finished"),
        ("random:tiny", SettingsError, "names no weights"),
        ("open_clip:ViT-B-32", Exception, "no weights of ViT-B-32 are named"),
    ):
        with pytest.raises(error, match=said):
            pretrain(target_root, out, with_init(pretrain_settings, init, model={"depth": 3}), report=Silent())
        assert not out.exists()
