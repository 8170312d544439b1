"""Scores that are trained on new crops: their results, resuming after kills and stops, several processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import EVALUATIONS
from cae2pipe.errors import CompileError, DivergedError, MismatchError, SettingsError, SourceError, Terminated
from cae2pipe.evaluation.finetune import FinetuneLearner
from cae2pipe.evaluation.probe_learner import ProbeLearner
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.verify import verify
from cae2pipe.training import checkpoint
from cae2pipe.training.metrics import read_lines
from tests.conftest import contents, edit_manifest
from tests.ranks import command

ROOT = Path(__file__).parents[2]
COLOURS = {"bright": (230, 220, 40), "dark": (20, 30, 60), "red": (200, 20, 30)}
COMMON = ["speed.workers=0", "speed.device=cpu", "speed.batch=4"]
KINDS = {
    "linear": ["epochs=60", "warmup_epochs=1", "chunk=12"],
    "attentive": ["epochs=12", "warmup_epochs=1", "chunk=5", "lr=50"],
    "finetune": ["epochs=12", "warmup_epochs=1", "batch=8", "chunk=4", "lr=0.2", "head_scale=1", "clip=1"],
}

BRIEF = {"linear": ["epochs=12"], "attentive": [], "finetune": ["epochs=4"]}
"""Long enough to be stopped in the middle; the result does not matter."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three colours with noise, 8 images each for training and 3 for scoring. One val file is not an image."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for part, each in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for number in range(each):
                pixels = np.clip(np.array(colour) + rng.integers(-15, 16, size=(40, 44, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{number}.png")
    (root / "val" / "red" / "broken.png").write_bytes(b"nothing")
    return root


def settings(kind: str, *overrides: str):
    return load(EVALUATIONS[kind], "evaluate", kind, overrides=[*COMMON, *KINDS[kind], *overrides])


def outcome(root: Path) -> dict[str, bytes]:
    """All outputs of an evaluation except measured times."""
    return {name: data for name, data in contents(root).items() if not name.endswith("metrics.jsonl")}


@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_learnt(kind, exported, data, tmp_path):
    result = evaluate(kind, str(exported), data, out=tmp_path / "out", settings=settings(kind), report=Silent())
    assert result["top1"] == 1
    assert result["images"] == {"train": 24, "val": 9}
    assert result["rejected"] == {"train": 0, "val": 1}
    assert result["per_class"] == {"bright": 1.0, "dark": 1.0, "red": 1.0}
    assert verify(tmp_path / "out" / kind, Silent()).problems == []
    assert not (tmp_path / "out" / kind / "checkpoints").exists()
    with np.load(tmp_path / "out" / kind / "predictions.npz") as predictions:
        assert sorted(predictions["keys"])[0] == "bright/0.png"
        assert (predictions["ranked"][:, 0] == predictions["labels"]).all()
    report = Silent()
    assert evaluate(kind, str(exported), data, out=tmp_path / "out", settings=settings(kind), report=report) == result
    assert any("nothing to do" in line for line in report.lines)


def test_without_random_crops_scores_of_earlier_versions_remain(exported, data, tmp_path):
    """Earlier versions never clipped the sides of crops."""

    def score(*overrides: str) -> Silent:
        linear = settings("linear", "epochs=2", "cached_crops=1", *overrides)
        evaluate("linear", str(exported), data, out=tmp_path / "out", settings=linear, report=(report := Silent()))
        return report

    score("draw.clip=false")
    assert any("nothing to do" in line for line in score().lines)
    with pytest.raises(MismatchError, match="cached_crops"):
        score("cached_crops=2")


def test_the_heads_of_an_attentive_probe_are_those_of_the_encoder(exported, data, tmp_path):
    """The encoder has 2 for 32 dimensions; earlier versions took one for 64."""
    out, report = tmp_path / "out", Silent()
    attentive = settings("attentive", "epochs=2")
    result = evaluate("attentive", str(exported), data, out=out, settings=attentive, report=Silent())
    assert result["settings"]["heads"] == 2
    again = settings("attentive", "epochs=2", "heads=2")
    assert evaluate("attentive", str(exported), data, out=out, settings=again, report=report) == result
    assert any("nothing to do" in line for line in report.lines)
    # Of the first revision, whose probe began from other weights.
    identity = json.loads((out / "attentive" / "manifest.json").read_text())["identity"]
    assert identity.pop("revision") == 2
    edit_manifest(out / "attentive", identity=identity, fingerprint=fingerprint(identity))
    with pytest.raises(MismatchError, match="revision"):
        evaluate("attentive", str(exported), data, out=out, settings=again, report=Silent())


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_it_gives_the_same_bytes(kind, exported, data, tmp_path, monkeypatch):
    """Killed at a step, with a checkpoint before it, some steps old."""
    more = [*BRIEF[kind], *(["ema=0.9"] if kind == "finetune" else [])]
    whole = evaluate(kind, str(exported), data, out=tmp_path / "whole", settings=settings(kind, *more), report=Silent())
    learner = FinetuneLearner if kind == "finetune" else ProbeLearner
    real, saved = learner.step, []

    class Killed(BaseException):
        pass

    def step(self, chunks, number, size):
        if number == 7 and not saved:
            saved.append(number)
            raise Killed
        return real(self, chunks, number, size)

    def every_third(folder, step, state, **rest):
        if step % 3 == 0 or step > 7:
            save(folder, step, state, **rest)

    save = checkpoint.save_checkpoint
    monkeypatch.setattr(learner, "step", step)
    monkeypatch.setattr(checkpoint, "save_checkpoint", every_third)
    often = settings(kind, *more, "speed.checkpoint_minutes=1e-9")
    with pytest.raises(Killed):
        evaluate(kind, str(exported), data, out=tmp_path / "out", settings=often, report=Silent())
    assert sorted(path.stem for path in (tmp_path / "out" / kind / "checkpoints").iterdir())[-1] == "step-00000006"
    report = Silent()
    assert evaluate(kind, str(exported), data, out=tmp_path / "out", settings=often, report=report) == whole
    assert any("resuming from step 6" in line for line in report.lines)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    steps = [line["step"] for line in read_lines(tmp_path / "out" / kind / "metrics.jsonl")]
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize("kind", ["linear", "finetune"])
def test_sigterm_ends_the_step_and_keeps_it(kind, exported, data, tmp_path, monkeypatch):
    learner = FinetuneLearner if kind == "finetune" else ProbeLearner
    real = learner.step

    def step(self, chunks, number, size):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, chunks, number, size)

    monkeypatch.setattr(learner, "step", step)
    report = Silent()
    with pytest.raises(Terminated):
        evaluate(kind, str(exported), data, out=tmp_path / "out", settings=settings(kind, *BRIEF[kind]), report=report)
    assert any("stopped after 5 steps" in line for line in report.lines)
    monkeypatch.setattr(learner, "step", real)
    evaluate(kind, str(exported), data, out=tmp_path / "out", settings=settings(kind, *BRIEF[kind]), report=report)
    assert any("resuming from step 5" in line for line in report.lines)
    evaluate(kind, str(exported), data, out=tmp_path / "whole", settings=settings(kind, *BRIEF[kind]), report=Silent())
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_killed_behind_the_last_step_it_is_scored_again(exported, data, tmp_path, monkeypatch):
    from cae2pipe.stages import evaluate as stage

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "write_predictions", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                "finetune",
                str(exported),
                data,
                out=tmp_path / "out",
                settings=settings("finetune", *BRIEF["finetune"]),
                report=Silent(),
            )
    evaluate(
        "finetune",
        str(exported),
        data,
        out=tmp_path / "out",
        settings=settings("finetune", *BRIEF["finetune"]),
        report=Silent(),
    )
    evaluate(
        "finetune",
        str(exported),
        data,
        out=tmp_path / "whole",
        settings=settings("finetune", *BRIEF["finetune"]),
        report=Silent(),
    )
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_best_is_the_best_epoch_and_the_headline_the_last(exported, data, tmp_path, monkeypatch):
    tops = iter([0.2, 0.7, 0.7, 0.4])

    def accuracy(predictions):
        return {"top1": next(tops), "top5": 1.0}

    monkeypatch.setattr("cae2pipe.evaluation.finetune.accuracy", accuracy)
    result = evaluate(
        "finetune",
        str(exported),
        data,
        out=tmp_path / "out",
        settings=settings("finetune", "validate_epochs=3"),
        report=Silent(),
    )
    assert result["best"] == {"epoch": 5, "top1": 0.7, "top5": 1.0}
    assert [line["epoch"] for line in result["history"] if "top1" in line] == [2, 5, 8, 11]
    assert len(result["history"]) == 12


@pytest.mark.parametrize("kind", ["knn", "linear", "finetune"])
def test_two_processes_give_one_process_s_score(kind, exported, data, tmp_path):
    over = {"knn": ["k=[5, 2]"], **KINDS}[kind]
    arguments = [kind, str(exported), str(data)]
    options = [word for override in [*COMMON, *over] for word in ("--set", override)]
    done = command("evaluate", *arguments, tmp_path / "two", *options)
    assert done.codes == [0, 0], done.stderr
    assert done.stdout.count("protocol: ") == 1
    alone = load(EVALUATIONS[kind], "evaluate", kind, overrides=[*COMMON, *over])
    evaluate(kind, str(exported), data, out=tmp_path / "one", settings=alone, report=Silent())
    one, two = (json.loads((tmp_path / name / kind / "result.json").read_text()) for name in ("one", "two"))
    assert two["images"] == one["images"]
    assert (two["top1"], two["top5"], two["per_class"]) == (one["top1"], one["top5"], one["per_class"])
    assert two.get("train_loss", 0) == pytest.approx(one.get("train_loss", 0), rel=1e-3)
    predictions = []
    for name in ("one", "two"):
        with np.load(tmp_path / name / kind / "predictions.npz") as file:
            predictions.append({key: file[key] for key in file})
    assert predictions[0]["keys"].tolist() == predictions[1]["keys"].tolist()
    assert predictions[0]["labels"].tolist() == predictions[1]["labels"].tolist()
    np.testing.assert_allclose(predictions[0]["confidence"], predictions[1]["confidence"], atol=2e-2)


def test_every_run_compiles_its_training_once_and_nothing_else(exported, data, tmp_path, graphs):
    """Batches of val images have another size, and the last is smaller. With a limit of one graph per process (torch's
    is eight for all runs together), a second run still gets its own graph."""
    short = settings("finetune", "epochs=2", "warmup_epochs=0", "speed.compile=true")
    evaluate("finetune", str(exported), data, out=tmp_path / "first", settings=short, report=Silent())
    assert graphs.frame_count == 1
    with torch._dynamo.config.patch(recompile_limit=1):
        evaluate("finetune", str(exported), data, out=tmp_path / "second", settings=short, report=Silent())
    assert graphs.frame_count == 2


def test_a_compiler_that_fails_is_said_to_be_dispensable(exported, data, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no C compiler found")

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend))
    with pytest.raises(CompileError, match="no C compiler found") as caught:
        evaluate(
            "finetune",
            str(exported),
            data,
            out=tmp_path / "out",
            settings=settings("finetune", "speed.compile=true"),
            report=Silent(),
        )
    assert caught.value.fix.startswith("--set speed.compile=false to run without it")


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind, exported, data, tmp_path):
    precision = "precision=bf16" if kind == "finetune" else "features.precision=bf16"
    result = evaluate(
        kind, str(exported), data, out=tmp_path / "out", settings=settings(kind, precision), report=Silent()
    )
    assert result["top1"] > 0.8


def test_chunks_that_cannot_be_shared_out(data, tmp_path):
    from cae2pipe.evaluation.datasets import open_data
    from cae2pipe.stages import evaluate as stage

    train, val = open_data(data, 4)
    job = stage.Job(
        encoder=None,
        spec="x",
        feature="mean",
        size=32,
        train=train,
        val=val,
        shared=tmp_path,
        root=tmp_path,
        world=stage.World(0, 3, None),
        report=Silent(),
    )
    with pytest.raises(SettingsError, match=r"chunks per step \(2\) is not divisible by the number of processes \(3\)"):
        stage.score_finetune(job, settings("finetune"))


def test_refused_settings_leave_the_folder_free_for_others(exported, data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SettingsError, match="5 heads do not divide") as caught:
        evaluate("attentive", str(exported), data, out=out, settings=settings("attentive", "heads=5"), report=Silent())
    assert caught.value.fix == "--set heads=4"
    with pytest.raises(SourceError, match="24 training images are fewer than one batch of 32"):
        evaluate("finetune", str(exported), data, out=out, settings=settings("finetune", "batch=32"), report=Silent())
    with pytest.raises(SettingsError, match="cannot be fine-tuned"):
        evaluate(
            "finetune",
            "random:vit_srelpos_small_patch16_224",
            data,
            out=out,
            settings=settings("finetune"),
            report=Silent(),
        )
    evaluate("finetune", str(exported), data, out=out, settings=settings("finetune"), report=Silent())
    with pytest.raises(MismatchError, match=r"settings\.epochs"):
        evaluate("finetune", str(exported), data, out=out, settings=settings("finetune", "epochs=3"), report=Silent())


def test_a_loss_that_is_not_finite(exported, data, tmp_path):
    with pytest.raises(DivergedError, match="not finite at step"):
        evaluate(
            "finetune",
            str(exported),
            data,
            out=tmp_path / "out",
            settings=settings("finetune", "lr=1e30", "clip=null"),
            report=Silent(),
        )


def test_a_class_with_one_image(exported, data, tmp_path):
    import shutil

    shutil.copytree(data, tmp_path / "data")
    for number in range(1, 8):
        (tmp_path / "data" / "train" / "dark" / f"{number}.png").unlink()
    for kind in ("linear", "finetune"):
        with pytest.raises(SourceError, match=r"fewer than two training images: 'dark' \(1\)"):
            evaluate(
                kind, str(exported), tmp_path / "data", out=tmp_path / "out", settings=settings(kind), report=Silent()
            )


def test_a_teacher_is_probed_and_fine_tuned_like_a_student(data, tmp_path):
    """timm:NAME uses the teachers' code; an open_clip tower has no such blocks."""
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    spec = f"timm:test_vit@{weights}"
    for kind in ("attentive", "finetune"):
        short = settings(kind, "epochs=1", "warmup_epochs=0")
        assert evaluate(kind, spec, data, out=tmp_path / "out", settings=short, report=Silent())["images"]["val"] == 9


def test_every_step_has_the_rates_of_the_schedule_and_of_the_layers(exported, data, tmp_path, monkeypatch):
    """By hand: 0.2 x 8 / 1024 at the peak, linear over the 3 steps of the first epoch, cosine to 1e-6 x 8 / 1024."""
    seen = []
    real = FinetuneLearner.step

    def step(self, chunks, number, size):
        loss = real(self, chunks, number, size)
        seen.append({group["lr_scale"]: group["lr"] for group in self.optimizer.param_groups})
        return loss

    monkeypatch.setattr(FinetuneLearner, "step", step)
    evaluate("finetune", str(exported), data, out=tmp_path / "out", settings=settings("finetune"), report=Silent())
    peak, least, last = 0.2 * 8 / 1024, 1e-6 * 8 / 1024, 35
    assert len(seen) == last + 1
    for number, rates in enumerate(seen):
        share = (1 + np.cos(np.pi * (number - 3) / (last - 3))) / 2
        wanted = peak * number / 3 if number < 3 else least + (peak - least) * share
        assert rates == pytest.approx({0.75**depth: wanted * 0.75**depth for depth in range(4)})
