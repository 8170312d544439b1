import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from cae2pipe.artifacts.artifact import RunArtifact
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.errors import DamageError, DivergedError, ManifestError, MismatchError, SettingsError
from cae2pipe.loading.order import ORDER
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.fit import check_fit
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.telemetry import MACHINE_METRICS
from tests.conftest import contents, edit_manifest, snapshot


@pytest.fixture(scope="module")
def run(target_root, pretrain_settings, tmp_path_factory) -> Path:
    """A finished run of two epochs, ten steps. Read-only."""
    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(target_root, out, pretrain_settings(), report=Silent())
    return out


def figures(root: Path) -> list[dict]:
    """The metrics without measured times."""
    return [
        {name: value for name, value in line.items() if name not in MACHINE_METRICS}
        for line in read_lines(root / "metrics.jsonl")
    ]


def test_a_run_leaves_metrics_checkpoint_and_encoder(run):
    lines = figures(run)
    assert [line["step"] for line in lines] == list(range(10))
    assert sum(line["images"] for line in lines) == 300
    assert lines[0]["lr"] == 0
    assert json.loads((run / "manifest.json").read_text())["complete"]
    assert (run / "encoder.safetensors").is_file()


def test_a_second_run_does_nothing_and_says_so(run, target_root, pretrain_settings):
    before = snapshot(run)
    report = Silent()
    pretrain(target_root, run, pretrain_settings(), report=report)
    assert snapshot(run) == before
    assert any("nothing to do" in line for line in report.lines)


def test_a_run_killed_at_its_last_write_is_tidied(run, target_root, pretrain_settings, tmp_path):
    """The manifest has the encoder, and so has the journal still."""
    out = shutil.copytree(run, tmp_path / "run")
    artifact = RunArtifact.open(out)
    artifact.add("encoder", artifact.units["encoder"])
    pretrain(target_root, out, pretrain_settings(), report=Silent())
    assert contents(out) == contents(run)


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_resumed_run_agrees_to_the_bit(run, target_root, pretrain_settings, tmp_path, stop):
    out = tmp_path / "run"
    pretrain(target_root, out, pretrain_settings(stop_after=stop), report=Silent())
    assert len(figures(out)) == stop
    assert not (out / "encoder.safetensors").exists()
    pretrain(target_root, out, pretrain_settings(speed={"workers": 2}), report=Silent())
    assert figures(out) == figures(run)
    assert (out / "encoder.safetensors").read_bytes() == (run / "encoder.safetensors").read_bytes()


def test_a_deleted_encoder_is_exported_again(run, target_root, pretrain_settings, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "encoder.safetensors").unlink()
    pretrain(target_root, out, pretrain_settings(), report=Silent())
    assert (out / "encoder.safetensors").read_bytes() == (run / "encoder.safetensors").read_bytes()
    assert figures(out) == figures(run)


def test_a_signal_ends_the_step_and_the_run_goes_on(run, target_root, pretrain_settings, tmp_path):
    out = tmp_path / "run"

    class Interrupting(Silent):
        steps = 0

        def advance(self, n: int = 1, /, **fields: float) -> None:
            self.steps += 1
            if self.steps == 4:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(target_root, out, pretrain_settings(), report=Interrupting())
    assert len(figures(out)) in (4, 5)
    pretrain(target_root, out, pretrain_settings(), report=Silent())
    assert figures(out) == figures(run)


def test_a_damaged_checkpoint_is_passed_over(run, target_root, pretrain_settings, tmp_path):
    out = tmp_path / "run"
    pretrain(target_root, out, pretrain_settings(stop_after=3), report=Silent())
    pretrain(target_root, out, pretrain_settings(stop_after=6), report=Silent())
    newest = out / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    report = Silent()
    pretrain(target_root, out, pretrain_settings(), report=report)
    assert any("step-00000006.pt cannot be read" in line for line in report.lines)
    assert figures(out) == figures(run)


def test_other_settings_are_refused_by_name(run, target_root, pretrain_settings):
    with pytest.raises(MismatchError, match=r"settings\.optimizer\.lr"):
        pretrain(target_root, run, pretrain_settings(optimizer={"lr": 0.1}), report=Silent())
    epochs = pretrain_settings().epochs + 1
    with pytest.raises(MismatchError, match=rf"settings\.epochs = {epochs - 1}, and {epochs} is requested") as refused:
        pretrain(target_root, run, pretrain_settings(epochs=epochs), report=Silent())
    assert refused.value.fix.startswith("to train longer, start a new run")


@pytest.mark.parametrize(
    ("model", "field"),
    [({"patch_size": 4}, "grid"), ({"image_size": 64, "patch_size": 16}, "pixels")],
)
def test_a_student_that_does_not_fit_is_refused(target_root, pretrain_settings, tmp_path, model, field):
    with pytest.raises(SettingsError, match=field) as caught:
        pretrain(target_root, tmp_path / "run", pretrain_settings(model=model), report=Silent())
    assert caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_left_as_it_is(target_root, pretrain_settings, tmp_path):
    files = {"notes.txt": b"x", "drafts/.tmp-figure": b"y"}
    (tmp_path / "drafts").mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError):
        pretrain(target_root, tmp_path, pretrain_settings(), report=Silent())
    assert contents(tmp_path) == files


@pytest.mark.parametrize(
    ("batch", "streams", "repeat", "fits"),
    [
        (152, 4, 1, {"batch": 148, "streams": 4}),
        (1024, 64, 2, {"batch": 256, "streams": 64}),
        (2048, 256, 1, {"batch": 150, "streams": 1}),
    ],
)
def test_a_batch_larger_than_the_set_is_refused(target_root, pretrain_settings, tmp_path, batch, streams, repeat, fits):
    settings = pretrain_settings(data={"batch": batch, "streams": streams}, mask={"repeat": repeat})
    with pytest.raises(SettingsError, match="the target set has 150 images, fewer than one batch") as caught:
        pretrain(target_root, tmp_path / "run", settings, report=Silent())
    advised = {name: int(value) for name, value in re.findall(r"--set data\.(\w+)=(\d+)", caught.value.fix)}
    assert {"streams": streams, **advised} == fits
    check_fit(TargetSet(target_root), pretrain_settings(data=fits, mask={"repeat": repeat}), ranks=1)


def test_no_target_set(tmp_path, pretrain_settings):
    with pytest.raises(ManifestError, match="no such folder"):
        pretrain(tmp_path / "nowhere", tmp_path / "run", pretrain_settings(), report=Silent())


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_set_with_a_damaged_file_is_refused_at_start(target_root, tmp_path, pretrain_settings, damage):
    root = tmp_path / "set"
    shutil.copytree(target_root, root)
    tar = root / "images" / "000001.tar"
    if damage == "deleted":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DamageError) as caught:
        pretrain(root, tmp_path / "run", pretrain_settings(), report=Silent())
    assert "000001.tar" in caught.value.where
    assert "--repair" in caught.value.fix


def test_a_changed_byte_of_latents_is_met_and_named(target_root, tmp_path, pretrain_settings):
    root = tmp_path / "set"
    shutil.copytree(target_root, root)
    for path in (root / "latents" / "v00").glob("*.zarr/patches/symbols/c/0/0/0/0"):
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamageError) as caught:
        pretrain(root, tmp_path / "run", pretrain_settings(), report=Silent())
    assert "block" in caught.value.where
    assert "cae2pipe verify" in caught.value.fix


def test_divergence_stops_with_the_last_good_checkpoint(target_root, tmp_path, pretrain_settings):
    with pytest.raises(DivergedError, match="not finite"):
        pretrain(target_root, tmp_path / "run", pretrain_settings(optimizer={"lr": 1e30}, epochs=3), report=Silent())


def test_a_growing_set_does_not_change_a_run_that_began_before(photos, extract_settings, pretrain_settings, tmp_path):
    from cae2pipe.stages.extract_targets import extract_targets

    root = tmp_path / "set"
    extract_targets(photos, root, extract_settings(views=1), report=Silent())
    pretrain(root, tmp_path / "whole", pretrain_settings(), report=Silent())
    pretrain(root, tmp_path / "run", pretrain_settings(stop_after=4), report=Silent())
    extract_targets(photos, root, extract_settings(views=2), report=Silent())
    pretrain(root, tmp_path / "run", pretrain_settings(), report=Silent())
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_every_kind_of_loss_falls(target_root, tmp_path, pretrain_settings, kind):
    pretrain(
        target_root, tmp_path / "run", pretrain_settings(loss={"kind": kind}, optimizer={"lr": 0.1}), report=Silent()
    )
    lines = figures(tmp_path / "run")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_no_regressor_leaves_the_visible_loss_alone(target_root, tmp_path, pretrain_settings):
    pretrain(target_root, tmp_path / "run", pretrain_settings(model={"predictor_depth": 0}), report=Silent())
    last = figures(tmp_path / "run")[-1]
    assert last["loss_masked"] == 0
    assert last["loss"] == pytest.approx(last["loss_visible"])


def test_the_official_recipe_drops_the_last_batch(target_root, tmp_path, pretrain_settings):
    settings = pretrain_settings(
        recipe="official", data={"last_batch": "drop"}, loss={"reduction": "one_mean"}, model={"head": "ln-fc"}
    )
    pretrain(target_root, tmp_path / "run", settings, report=Silent())
    assert [line["images"] for line in figures(tmp_path / "run")] == [32] * 8


def test_the_exported_encoder_gives_the_runs_own_outputs(run, target_root):
    import timm

    from cae2pipe.targets.target_set import TargetSet
    from cae2pipe.training.student import load_student

    model, _ = load_student(run, TargetSet(target_root), Silent())
    exported = timm.create_model(f"local-dir:{run}", pretrained=True, num_classes=0).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.eval().encoder(pixels, None, None)
        torch.testing.assert_close(exported.forward_features(pixels), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_of_an_earlier_order_is_refused_in_words(make_run, target_root, pretrain_settings, complete):
    run = make_run()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["identity"].pop("order") == ORDER
    identity = manifest["identity"]
    edit_manifest(run, identity=identity, fingerprint=fingerprint(identity), complete=complete)
    with pytest.raises(MismatchError, match="takes samples in another order") as caught:
        pretrain(target_root, run, pretrain_settings(), report=Silent())
    assert ("export it as it is" in caught.value.fix) == complete
    assert ("finish it with that version" in caught.value.fix) != complete
