"""A step with a loss that is not finite: its record and its replay."""

import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.errors import CompileError, DamageError, DivergedError, OutOfMemoryError, SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.replay import replay
from cae2pipe.training.failure import load_failure
from cae2pipe.training.metrics import read_lines

COSINES = {"centred_cosine_visible": 0.0, "centred_cosine_masked": 0.0}


@pytest.fixture
def failed(photos, extract_settings, pretrain_settings, tmp_path, monkeypatch):
    """A run with a NaN latent in step 6, after a checkpoint at step 4."""
    from cae2pipe.loading import loader

    root, out = tmp_path / "set", tmp_path / "run"
    extract_targets(photos, root, extract_settings(codec={"name": "fp16"}), report=Silent())
    pretrain(root, out, pretrain_settings(stop_after=4), report=Silent())
    real = loader.batches

    def injected(*arguments):
        for batch in real(*arguments):
            if batch.step == 6:
                batch.arrays["tokens"][3, 5, 2] = float("nan")
            yield batch

    monkeypatch.setattr(loader, "batches", injected)
    with pytest.raises(DivergedError) as caught:
        pretrain(root, out, pretrain_settings(), report=Silent())
    return root, out, caught.value


def test_the_step_is_kept_whole_and_nothing_after_it_happened(failed, pretrain_settings):
    root, out, error = failed
    path = out / "failures" / "step-00000006.pt"
    assert error.where == str(path)
    assert f"cae2pipe replay {path}" in error.fix
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == list(range(6))
    batch, latents, context = load_failure(path)
    assert batch.step == 6
    assert latents["decoded"].isnan().sum() == 1
    assert len(batch.keys) == len(batch.views) == 32
    assert json.loads(context["settings"])["seed"] == 0
    fit = out.parent / "whole"
    pretrain(root, fit, pretrain_settings(stop_after=6), report=Silent())
    before = torch.load(fit / "checkpoints" / "step-00000006.pt", weights_only=True)["model"]
    assert all(torch.equal(context["weights"][name], before[name]) for name in before)


def test_the_replay_names_the_sample(failed):
    _, out, _ = failed
    path = out / "failures" / "step-00000006.pt"
    batch, _, _ = load_failure(path)
    found = replay(path, device="cpu")
    assert found["inputs"] == [batch.keys[3]]
    assert [row["key"] for row in found["samples"]] == [batch.keys[3]]
    assert found["module"] is None
    assert found["gradients"]
    assert found["terms"]["loss"] != found["terms"]["loss"]
    result = CliRunner().invoke(app, ["replay", str(path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert batch.keys[3] in result.output


def test_a_record_without_labels_as_before_is_replayed(failed, tmp_path):
    _, out, _ = failed
    state = torch.load(out / "failures" / "step-00000006.pt", weights_only=True)
    del state["batch"]["labels"]
    torch.save(state, tmp_path / "old.pt")
    assert replay(tmp_path / "old.pt", device="cpu")["samples"]


def test_the_replay_names_the_module(failed, tmp_path):
    _, out, _ = failed
    state = torch.load(out / "failures" / "step-00000006.pt", weights_only=True)
    state["latents"]["decoded"] = torch.nan_to_num(state["latents"]["decoded"])
    state["weights"]["encoder.blocks.1.norm2.weight"][0] = float("inf")
    path = tmp_path / "step.pt"
    torch.save(state, path)
    found = replay(path, device="cpu")
    assert found["inputs"] == []
    assert found["module"] == "encoder.blocks.1.norm2"


def test_a_damaged_record_is_refused_and_the_field_is_named(failed, tmp_path):
    _, out, _ = failed
    whole = out / "failures" / "step-00000006.pt"
    path = tmp_path / "step.pt"

    def refused(what, **changes):
        state = {**torch.load(whole, weights_only=True), **changes}
        torch.save({name: value for name, value in state.items() if value is not None}, path)
        with pytest.raises((DamageError, SettingsError), match=what) as caught:
            replay(path, device="cpu")
        assert str(path) in str(caught.value)

    batch = torch.load(whole, weights_only=True)["batch"]
    for name in ("settings", "mean", "values", "class_token", "target_dim", "batch", "latents"):
        refused(f"not a record of a failed step \\({name}", **{name: None})
    refused("settings", settings=3)
    refused("not valid JSON", settings="{")
    refused("not valid JSON", settings="[" * 100000)
    refused("unknown setting", settings='{"epoch": 3}')
    refused("it has no weights", weights=None)
    refused("do not fit together", weights={"x": torch.zeros(3)})
    refused("do not fit together", mean=torch.zeros(3))
    refused("grad_norm is missing", values={"loss": 1.0, "loss_visible": 1.0, "loss_masked": 1.0} | COSINES)
    refused("decoded is missing", latents={})
    refused("do not fit together", latents={"decoded": torch.zeros(32, 3, 3)})
    refused("target_dim", target_dim=0)
    refused("pixels is no", batch={**batch, "pixels": 3})
    refused("do not fit together", batch={**batch, "visible": torch.full_like(batch["visible"], 99)})
    refused("more", batch={**batch, "more": 1})
    with pytest.raises(SettingsError, match="unknown precision"):
        replay(whole, device="cpu", precision="fp8")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"rubbish")
    with pytest.raises(DamageError, match="not a record"):
        replay(path)


def test_a_batch_that_finds_no_room_is_advised_upon(target_root, pretrain_settings, tmp_path, monkeypatch):
    from cae2pipe.training import pretraining

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.15 GiB.\nGPU 0 has ...")
        yield

    monkeypatch.setattr(pretraining, "on_device", full)
    with pytest.raises(OutOfMemoryError, match="the next batch does not fit") as caught:
        pretrain(target_root, tmp_path / "run", pretrain_settings(speed={"accumulation": 2}), report=Silent())
    assert "--set speed.accumulation=4" in caught.value.fix
    assert "GPU 0" not in caught.value.what


def test_a_compiler_that_fails_says_how_to_do_without(target_root, pretrain_settings, tmp_path, monkeypatch):
    """As without a C compiler, which inductor needs at run time."""
    from cae2pipe.stages import pretrain as stage

    def lacking(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(stage, "compile_objective", partial(stage.compile_objective, backend=lacking))
    with pytest.raises(CompileError, match=r"RuntimeError: Please specify via CC") as caught:
        pretrain(target_root, tmp_path / "run", pretrain_settings(speed={"compile": True}), report=Silent())
    assert "--set speed.compile=false" in caught.value.fix
    assert caught.value.exit_code == 1


def test_memory_that_ends_in_the_compiler_is_no_compilers_failure(
    target_root, pretrain_settings, tmp_path, monkeypatch
):
    from cae2pipe.stages import pretrain as stage

    def full(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage, "compile_objective", partial(stage.compile_objective, backend=full))
    with pytest.raises(OutOfMemoryError, match="16 images per pass would fit"):
        pretrain(target_root, tmp_path / "run", pretrain_settings(speed={"compile": True}), report=Silent())
