"""Whole stages on a device, as in a user's command but without workers, threads and the compiler."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cae2pipe.config.base import build, load
from cae2pipe.config.evaluate import EVALUATIONS, ZeroshotSettings
from cae2pipe.loading import device
from cae2pipe.runtime import upload
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.evaluate_zeroshot import evaluate_zeroshot
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.metrics import read_lines, read_probes
from tests.conftest import DIM, write_photos

BF16, FP32 = torch.bfloat16, torch.float32
COLOURS = {"bright": (230, 220, 40), "dark": (20, 30, 60)}
COMMON = ["speed.workers=0", "speed.batch=4"]
TRAINED = ["epochs=2", "warmup_epochs=1", "speed.compile=false"]
KINDS = {
    "linear": ("linear", ["chunk=4"]),
    "cached": ("linear", ["cached_crops=2"]),
    "sweep": ("linear", ["cached_crops=1", "sweep=[0.1, 1.0]", "held_out=0.3"]),
    "attentive": ("attentive", ["chunk=4"]),
    "finetune": ("finetune", ["batch=4", "chunk=2", "erase=1", "clip=1", "ema=0.9"]),
    "unmixed": ("finetune", ["batch=4", "chunk=2", "mixup=0", "cutmix=0", "precision=fp32", "image_size=40"]),
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The simulation is limited to this thread."""
    for module in (upload, device):
        monkeypatch.setattr(module, "in_threads", lambda work, tasks, *_, **__: (work(*task) for task in tasks))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two colours with noise, four images each for training and two for scoring."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for part, each in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for number in range(each):
                pixels = np.clip(np.array(colour) + rng.integers(-15, 16, size=(40, 44, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{number}.png")
    return root


@pytest.mark.parametrize("teachers", [1, 2])
def test_a_run_stops_goes_on_and_ends(teachers, wide_root, summary_root, pretrain_settings, cuda, machine, tmp_path):
    roots = [wide_root, summary_root][:teachers]
    speed = {"device": "cuda:1", "compile": False, "accumulation": 2}
    fast = {"epochs": 1, "optimizer": {"warmup_epochs": 0}, "data": {"batch": 64}}
    with cuda:
        pretrain(roots, tmp_path, pretrain_settings(**fast, speed=speed, stop_after=1), report=Silent())
        assert not (tmp_path / "encoder.safetensors").exists()
        pretrain(roots, tmp_path, pretrain_settings(**fast, speed=speed), report=Silent())
    assert machine.current == 1
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm"))
    assert json.loads((tmp_path / "manifest.json").read_text())["identity"]["settings"]["precision"] == "bf16"
    assert set(cuda.products) == {BF16, FP32}
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "encoder.safetensors").values())


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_neighbours_are_the_same(kind, exported, target_root, teacher_file, data, cuda, tmp_path):
    spec = str(exported) if kind == "student" else f"teacher:{target_root}@{teacher_file}"

    def score(device: str) -> dict[str, np.ndarray]:
        over = [*COMMON, f"speed.device={device}", "features.precision=fp32", "k=[3]"]
        settings = load(EVALUATIONS["knn"], "evaluate", "knn", overrides=over)
        evaluate("knn", spec, data, out=tmp_path / device, settings=settings, report=Silent())
        with np.load(tmp_path / device / "knn" / "predictions.npz") as file:
            return dict(file)

    wanted = score("cpu")
    with cuda:
        got = score("cuda:1")
    # A teacher runs in its own precision. Neighbours are compared in float32.
    assert set(cuda.products) == {FP32} | ({torch.float16} if kind == "teacher" else set())
    same_predictions(got, wanted)


def same_predictions(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name in wanted:
        if name == "confidence":
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-4)
        else:
            assert np.array_equal(got[name], wanted[name])


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_zero_shot_scores_are_the_same(kind, trained_run, target_root, teacher_file, data, cuda, machine, tmp_path):
    spec = str(trained_run()) if kind == "student" else f"teacher:{target_root}@{teacher_file}"
    classes = tmp_path / "classes.safetensors"
    save_file({"embeddings": torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))}, classes)

    def score(device: str) -> dict[str, np.ndarray]:
        values = {"classes": str(classes), "features": {"precision": "fp32"}, "speed": {"workers": 0, "device": device}}
        settings = build(ZeroshotSettings, values, "test")
        evaluate_zeroshot(spec, data, out=tmp_path / device, settings=settings, report=Silent())
        with np.load(tmp_path / device / "zeroshot" / "predictions.npz") as file:
            return dict(file)

    wanted = score("cpu")
    with cuda:
        got = score("cuda:1")
    assert machine.current == 1
    same_predictions(got, wanted)


# Copying fake tensors, with which the average of weights starts, needs their address.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", KINDS)
def test_trained_scores(kind, exported, data, cuda, machine, tmp_path):
    name, over = KINDS[kind]
    settings = load(EVALUATIONS[name], "evaluate", name, overrides=[*COMMON, "speed.device=cuda:1", *TRAINED, *over])
    with cuda:
        result = evaluate(name, str(exported), data, out=tmp_path, settings=settings, report=Silent())
    assert 0 <= result["top1"] <= 1
    assert result["images"] == {"train": 8, "val": 4}
    assert machine.current == 1
    # Encoders run in bfloat16; heads on frozen encoders, and scoring, in float32.
    assert set(cuda.products) == {"unmixed": {FP32}}.get(kind, {BF16, FP32})


def test_a_run_is_probed(target_root, extract_settings, pretrain_settings, data, cuda, machine, tmp_path, monkeypatch):
    """On copies of the student, with the device's random generator restored."""
    state, restored = torch.zeros(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(device))
    held_out, photos = tmp_path / "held-out", write_photos(tmp_path / "photos", classes=1, each=20, seed=5)
    extract_targets(photos, held_out, extract_settings(views=1, codec={"calibration": 16}), report=Silent())
    chosen = pretrain_settings(
        epochs=1,
        optimizer={"warmup_epochs": 0},
        data={"batch": 64},
        speed={"device": "cuda:1", "compile": False},
        probe={"images": str(data), "targets": str(held_out), "k": 3, "batch": 8},
    )
    with cuda:
        pretrain(target_root, tmp_path / "run", chosen, report=Silent())
    (probe,) = read_probes(tmp_path / "run" / "probe.jsonl")
    assert machine.current == 1
    assert 0 <= probe["knn_top1"] <= 1
    assert 0 < probe["held_out_loss"] < 3
    assert restored == 2 * [torch.device("cuda", 1)]  # once to try whether it fits
