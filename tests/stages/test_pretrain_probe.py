"""Measurements during training: what they are, that training does not notice them, and that none is lost."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cae2pipe
from cae2pipe.config.evaluate import KnnSettings
from cae2pipe.errors import OutOfMemoryError, SettingsError, SourceError, Terminated, WorkerError
from cae2pipe.evaluation.encoders import Student
from cae2pipe.evaluation.labelled_crops import LabelledCrops
from cae2pipe.evaluation.training_probe import TrainingProbe
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.report import report_runs
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.training.held_out import held_out_plan
from cae2pipe.training.metrics import read_lines, read_probes
from cae2pipe.training.student import load_student, preview_latents
from cae2pipe.training.telemetry import MACHINE_METRICS
from tests.conftest import contents, write_photos
from tests.ranks import launch
from tests.training.rank import train

STEPS = 5
"""Steps per epoch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Labelled images that are not those of the target set: classes have a slight colour cast, so that some neighbours
    are of the right class. One image cannot be decoded."""
    root = tmp_path_factory.mktemp("probe")
    casts = ("#ff0000", "#00ff00", "#0000ff")
    for split, seed in (("train", 1), ("val", 2)):
        for number, cast in enumerate(casts):
            folder = write_photos(root / "plain" / f"{split}{number}", classes=1, each=24, seed=10 * seed + number)
            (root / split / f"class{number}").mkdir(parents=True)
            for path in sorted(folder.rglob("*.jpg")):
                photo = Image.open(path)
                blended = Image.blend(photo, Image.new("RGB", photo.size, cast), 0.06)
                blended.save(root / split / f"class{number}" / path.name, quality=90)
    (root / "train" / "class1" / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def held_out(data, extract_settings, tmp_path_factory) -> Path:
    """Targets of val, by the teacher of ``target_root``."""
    out = tmp_path_factory.mktemp("probe") / "held"
    extract_targets(data / "val", out, extract_settings(views=1), report=Silent())
    return out


@pytest.fixture
def settings(pretrain_settings, data, held_out):
    """Settings of three epochs that are probed after the second and the third."""

    def made(**over):
        probe = {"images": str(data), "targets": str(held_out), "every": 2, "k": 5, **over.pop("probe", {})}
        return pretrain_settings(epochs=3, probe=probe, **over)

    return made


@pytest.fixture(scope="module")
def probed(target_root, pretrain_settings, data, held_out, tmp_path_factory):
    """A finished run with probes, and its log. Not to be written to."""
    out, report = tmp_path_factory.mktemp("probe") / "run", Silent()
    probe = {"images": str(data), "targets": str(held_out), "every": 2, "k": 5}
    pretrain(target_root, out, pretrain_settings(epochs=3, probe=probe), report=report)
    return SimpleNamespace(root=out, log=report.lines, random_state=torch.get_rng_state())


def probes(run: Path) -> list[dict]:
    """What was measured, without the time it took."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in cae2pipe.Run(run).probes()]


def figures(run: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in MACHINE_METRICS}
        for line in read_lines(run / "metrics.jsonl")
    ]


def test_a_probe_after_every_second_epoch_and_after_the_last(probed):
    lines = read_probes(probed.root / "probe.jsonl")
    assert [(line["step"], line["epoch"]) for line in lines] == [(2 * STEPS - 1, 1), (3 * STEPS - 1, 2)]
    assert all(line["seconds"] > 0 for line in lines)
    assert inspect_folder(probed.root)["last_probe"] == lines[-1]
    # Better than by chance, or a comparison of scores would show nothing.
    assert 0.4 < lines[0]["knn_top1"] < 1


def test_training_does_not_notice_probes(probed, target_root, pretrain_settings, tmp_path):
    out = tmp_path / "run"
    pretrain(target_root, out, pretrain_settings(epochs=3), report=Silent())
    assert torch.equal(torch.get_rng_state(), probed.random_state)
    assert figures(out) == figures(probed.root)
    differing = {"metrics.jsonl", "probe.jsonl"}
    without, with_probes = (
        {name: data for name, data in contents(root).items() if name not in differing} for root in (out, probed.root)
    )
    assert without == with_probes
    assert any(name.startswith("checkpoints/") for name in without)


def test_the_last_probe_is_the_score_of_the_finished_run(probed, data, tmp_path):
    result = evaluate("knn", str(probed.root), data, out=tmp_path, settings=KnnSettings(k=(5,)), report=Silent())
    assert probes(probed.root)[-1]["knn_top1"] == result["top1"]
    assert result["rejected"]["train"] == 1
    assert sum("broken.jpg" in line for line in probed.log) == 1


def test_held_out_cosines_are_those_of_single_views(probed, held_out, target_root):
    """Each predicted and masked on its own, by the code that draws the report's pictures."""
    targets, trained_on = TargetSet(held_out), TargetSet(target_root)
    model, settings = load_student(probed.root, targets, Silent())
    views = [targets[index] for index in range(len(targets))]
    centred = SimpleNamespace(teacher=targets.teacher, mean=trained_on.mean)
    previews = preview_latents(model, settings, centred, views=views, device=torch.device("cpu"))
    expected = sum(preview.cosine for preview in previews) / len(previews)
    last = probes(probed.root)[-1]
    assert last["held_out_centred_cosine_masked"] == pytest.approx(expected, abs=1e-4)
    first = probes(probed.root)[0]
    assert last["held_out_loss"] < first["held_out_loss"] < 2


def test_images_that_do_not_fit_in_memory_are_read_again(probed, target_root, settings, tmp_path):
    out = tmp_path / "run"
    pretrain(target_root, out, settings(probe={"memory_gb": 0}), report=Silent())
    assert probes(out) == probes(probed.root)


def test_blocks_limit_the_views(held_out, target_root, pretrain_settings):
    """Spread over the set; further views of the images come where one of each has room."""

    def plan(root: Path, blocks: int | None):
        return held_out_plan(TargetSet(root), pretrain_settings(), drop_columns=1, batch=64, blocks=blocks)

    assert [(block.samples, len(block.views)) for block in plan(held_out, None).blocks] == [(64, 1), (6, 1), (2, 1)]
    assert [block.samples for block in plan(held_out, 2).blocks] == [64, 6]
    whole = len(plan(target_root, None).blocks)
    for blocks, shown, epochs in ((whole, whole, 1), (2 * whole, whole, 2), (99, whole, 2), (1, 1, 1)):
        limited = plan(target_root, blocks)
        assert (len(limited.blocks), limited.epochs) == (shown, epochs)


def test_a_resumed_run_has_the_same_probes(probed, target_root, settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, track = tmp_path / "run", {"track": ["tensorboard"]}
    pretrain(target_root, out, settings(stop_after=2 * STEPS, **track), report=Silent())
    assert probes(out) == probes(probed.root)[:1]
    pretrain(target_root, out, settings(**track), report=Silent())
    assert probes(out) == probes(probed.root)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("probe/knn_top1")]
    assert scalars == [(line["step"], pytest.approx(line["knn_top1"])) for line in probes(out)]


@pytest.mark.parametrize("workers_fail", [False, True])
def test_a_stop_during_a_probe_takes_effect_and_the_probe_is_made_on_resuming(
    probed, target_root, settings, tmp_path, monkeypatch, workers_fail
):
    out, read = tmp_path / "run", LabelledCrops.features

    def interrupted(self, split, encode):
        os.kill(os.getpid(), signal.SIGTERM)
        if workers_fail:
            raise WorkerError("a worker process was killed by SIGTERM")
        return read(self, split, encode)

    with monkeypatch.context() as patched:
        patched.setattr(LabelledCrops, "features", interrupted)
        with pytest.raises(Terminated):
            pretrain(target_root, out, settings(), report=Silent())
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{2 * STEPS:08d}.pt"]
    assert probes(out) == []
    pretrain(target_root, out, settings(), report=Silent())
    assert probes(out) == probes(probed.root)
    assert figures(out) == figures(probed.root)


def test_probes_after_the_checkpoint_are_removed_and_made_again(probed, target_root, settings, tmp_path):
    out, speed = tmp_path / "run", {"checkpoint_minutes": 1e-6, "keep": 100}
    pretrain(target_root, out, settings(stop_after=12, speed=speed), report=Silent())
    assert len(probes(out)) == 1
    for path in (out / "checkpoints").iterdir():
        if int(path.stem[5:]) > 8:
            path.unlink()
    pretrain(target_root, out, settings(stop_after=9), report=Silent())
    assert probes(out) == []
    pretrain(target_root, out, settings(), report=Silent())
    assert probes(out) == probes(probed.root)


def test_processes_share_a_probe_and_its_stop(probed, target_root, settings, tmp_path):
    """A signal to one of them, in the first probe, ends it in each. Resumed, they measure what one process does."""
    job = {"targets": str(target_root), "out": str(tmp_path / "run"), "probe_signal": True}
    job["settings"] = settings(speed={"parallel": "fsdp"}).model_dump(mode="json")
    done = launch(train, job)
    assert done.codes == [0, 0], done.stderr
    assert [(tmp_path / f"run-{rank}.end").read_text() for rank in range(2)] == ["Terminated", "Requeued"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{2 * STEPS:08d}.pt"]
    done = launch(train, {**job, "probe_signal": False})
    assert done.codes == [0, 0], done.stderr
    for one, other in zip(probes(tmp_path / "run"), probes(probed.root), strict=True):
        assert one.keys() == other.keys()
        assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], abs=1e-4)
        # One image of 72 may have another neighbour, since the weights differ by rounding.
        assert one["knn_top1"] == pytest.approx(other["knn_top1"], abs=1.01 / 72)


def test_the_cost_is_told_once(probed):
    cost = [line for line in probed.log if line.startswith("a probe takes")]
    assert len(cost) == 1
    assert "all 2 will take at most about" in cost[0]


def test_the_report_draws_probes(probed, target_root, pretrain_settings, tmp_path):
    report_runs([probed.root], [], [], out=tmp_path / "report", report=Silent())
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Accuracy of nearest neighbours during training" in page
    assert "Loss on held-out views during training" in page


def refused(target_root, out, chosen, kind, match):
    with pytest.raises(kind, match=match) as error:
        pretrain(target_root, out, chosen, report=Silent())
    assert not out.exists(), "the run has been begun"
    return error.value


def test_what_cannot_be_measured_is_refused_before_the_run_is_begun(
    target_root, settings, tmp_path, data, extract_settings, teacher_file
):
    out = tmp_path / "run"
    refused(target_root, out, settings(probe={"images": str(tmp_path / "none")}), SourceError, "no such folder")
    refused(target_root, out, settings(probe={"targets": str(target_root)}), SettingsError, "nothing is held out")
    other, weights = tmp_path / "other", tmp_path / "other.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(teacher_file).items()}, weights)
    changed = extract_settings(views=1, teacher={"weights": str(weights)})
    extract_targets(data / "val", other, changed, report=Silent())
    refused(target_root, out, settings(probe={"targets": str(other)}), SettingsError, "teacher mismatch")


def test_a_probe_without_room_is_refused_before_the_run_is_begun(target_root, settings, tmp_path, monkeypatch):
    def full(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Student, "tokens", full)
    error = refused(target_root, tmp_path / "run", settings(), OutOfMemoryError, "64 images per pass")
    assert "probe.batch=16" in error.fix


def test_a_probe_that_fails_later_is_named_and_training_continues(
    probed, target_root, settings, tmp_path, data, monkeypatch
):
    images, out, report = tmp_path / "images", tmp_path / "run", Silent()
    shutil.copytree(data, images)
    check = TrainingProbe.check

    def then_remove(self):
        check(self)
        shutil.rmtree(images / "val")

    monkeypatch.setattr(TrainingProbe, "check", then_remove)
    pretrain(target_root, out, settings(probe={"images": str(images)}), report=report)
    assert [line[:24] for line in report.lines if "no probe" in line] == [
        "no probe after epoch 2: ",
        "no probe after epoch 3: ",
    ]
    assert figures(out) == figures(probed.root)


def test_images_that_are_lost_do_not_matter_to_a_finished_run(probed, target_root, settings, tmp_path):
    out, report = tmp_path / "run", Silent()
    shutil.copytree(probed.root, out)
    pretrain(target_root, out, settings(probe={"images": str(tmp_path / "none")}), report=report)
    assert report.lines[-1].startswith("nothing to do")


def test_every_alone_is_refused(target_root, tmp_path):
    with pytest.raises(SettingsError, match="nothing to measure"):
        cae2pipe.pretrain(target_root, tmp_path / "run", every=5, progress=False)
