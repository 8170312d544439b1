"""``evaluate segment`` as a user runs it, on pictures whose colours are their labels."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.cli import app
from cae2pipe.config.base import load
from cae2pipe.config.dense import SegmentSettings
from cae2pipe.dense.label_crops import draw_crop, fitted_size
from cae2pipe.dense.label_maps import open_label_maps
from cae2pipe.dense.segment import SegmentLearner
from cae2pipe.errors import MismatchError, OutOfMemoryError, SettingsError, SourceError, Terminated
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate_dense import segment
from cae2pipe.stages.verify import verify
from tests.conftest import contents, edit_manifest
from tests.ranks import command

ROOT = Path(__file__).parents[2]
COLOURS = np.array([(230, 220, 40), (20, 30, 60), (200, 20, 30), (90, 90, 90)], dtype=np.uint8)
SHORT = [
    "speed.workers=0",
    "speed.device=cpu",
    "steps=40",
    "warmup_steps=4",
    "batch=4",
    "chunk=2",
    "image_size=32",
    "scale=[64, 32]",
    "stride=20",
    "decoder_width=32",
    "dropout=0",
    "lr=0.02",
    "layer_decay=0.9",
    "pictures=2",
    "distort=false",
]


def write_maps(root: Path, first: int = 0) -> Path:
    """Images of coloured quarters; one corner of each label map is void (255)."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for number in range(count):
            height, width = int(rng.integers(30, 50)), int(rng.integers(30, 50))
            labels = np.zeros((height, width), dtype=np.uint8)
            cut = rng.permutation(4)
            top, left = int(height * rng.uniform(0.3, 0.7)), int(width * rng.uniform(0.3, 0.7))
            labels[:top, :left], labels[:top, left:], labels[top:, :left], labels[top:, left:] = cut
            pixels = np.clip(COLOURS[labels].astype(int) + rng.integers(-12, 13, (height, width, 3)), 0, 255)
            labels = labels + first
            labels[:3, :3] = 255
            for kind, array in (("images", pixels.astype(np.uint8)), ("annotations", labels.astype(np.uint8))):
                (root / kind / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / kind / part / f"{number}.png")
    (root / "classes.txt").write_text("yellow\nblue\nred\ngrey\n")
    return root


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> Path:
    return write_maps(tmp_path_factory.mktemp("maps"))


def settings(*overrides: str) -> SegmentSettings:
    return load(SegmentSettings, "evaluate", "segment", overrides=[*SHORT, *overrides])


def outcome(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if not name.endswith("metrics.jsonl")}


@pytest.fixture(scope="module")
def whole(maps, tmp_path_factory) -> tuple[Path, Path]:
    """An encoder and an undisturbed evaluation of it."""
    from cae2pipe.models.encoder import Encoder
    from cae2pipe.models.export import export_encoder

    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(3)
    export_encoder(Encoder(width=32, depth=4, heads=2, image_size=32, patch_size=8), root / "encoder")
    segment(str(root / "encoder"), maps, root / "out", settings=settings(), report=Silent())
    return root / "encoder", root / "out"


def test_colours_are_learnt_and_all_is_left_behind(whole, maps):
    encoder, out = whole
    result = json.loads((out / "segment" / "result.json").read_text())
    assert result["miou"] > 0.6
    assert result["pixel_accuracy"] > result["miou"]
    assert set(result["per_class"]) == {"yellow", "blue", "red", "grey"}
    assert result["images"] == {"train": 6, "val": 3}
    assert {path.name for path in (out / "segment").iterdir()} >= {"pictures.png", "last.safetensors", "result.json"}
    assert not (out / "segment" / "checkpoints").exists()
    assert verify(out / "segment", Silent()).problems == []
    report = Silent()
    assert segment(str(encoder), maps, out, settings=settings(), report=report) == result
    assert any("nothing to do" in line for line in report.lines)
    with pytest.raises(MismatchError, match=r"settings\.steps"):
        segment(str(encoder), maps, out, settings=settings("steps=41"), report=Silent())


def test_a_folder_of_the_first_revision_is_read_and_not_taken_for_this_one(whole, maps, tmp_path):
    """Its manifest has no revision. Its crops had channels swapped, so its score is not what is asked for now."""
    encoder, out = whole
    shutil.copytree(out, tmp_path / "out")
    root = tmp_path / "out" / "segment"
    identity = json.loads((root / "manifest.json").read_text())["identity"]
    assert identity.pop("revision") == 2
    edit_manifest(root, identity=identity, fingerprint=fingerprint(identity))
    assert verify(root, Silent()).problems == []
    assert "| mIoU " in CliRunner().invoke(app, ["results", str(tmp_path / "out"), "--format", "markdown"]).stdout
    with pytest.raises(MismatchError, match=r"made with revision = null, and 2 is requested"):
        segment(str(encoder), maps, tmp_path / "out", settings=settings(), report=Silent())


def test_stopped_and_resumed_it_gives_the_same_bytes(whole, maps, tmp_path, monkeypatch):
    import os
    import signal

    encoder, out = whole
    real = SegmentLearner.step

    def step(self, chunks, number, size):
        if number == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, chunks, number, size)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentLearner, "step", step)
        with pytest.raises(Terminated):
            segment(str(encoder), maps, tmp_path / "out", settings=settings(), report=Silent())
    segment(str(encoder), maps, tmp_path / "out", settings=settings("speed.workers=1"), report=Silent())
    assert outcome(tmp_path / "out") == outcome(out)


def test_two_processes(whole, maps, tmp_path):
    """BatchNorm has different statistics on each, so scores agree only approximately; every image counts once."""
    encoder, out = whole
    options = [word for override in SHORT for word in ("--set", override)]
    done = command("evaluate", "segment", encoder, maps, tmp_path / "out", *options)
    assert done.codes == [0, 0], done.stderr
    assert done.stdout.count("protocol: ") == 1
    two, one = (json.loads((root / "segment" / "result.json").read_text()) for root in (tmp_path / "out", out))
    assert two["miou"] == pytest.approx(one["miou"], abs=0.25)
    assert two["images"] == one["images"]


def test_every_run_compiles_its_training_once_and_nothing_else(whole, maps, tmp_path, graphs):
    """The numbers of windows per image are not multiples of a chunk."""
    short = settings("steps=2", "warmup_steps=0", "stride=16", "speed.compile=true")
    segment(str(whole[0]), maps, tmp_path / "first", settings=short, report=Silent())
    assert graphs.frame_count == 1
    with torch._dynamo.config.patch(recompile_limit=1):
        segment(str(whole[0]), maps, tmp_path / "second", settings=short, report=Silent())
    assert graphs.frame_count == 2


def test_an_image_too_large_for_the_device_is_scored_on_the_cpu(whole, maps, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    short = ["steps=2", "warmup_steps=0", "speed.checkpoint_minutes=1e-9"]
    with monkeypatch.context() as patch:
        patch.setattr("cae2pipe.dense.segment.sliding_logits", full)
        with pytest.raises(OutOfMemoryError, match="one image to be scored does not fit") as caught:
            segment(str(whole[0]), maps, tmp_path / "out", settings=settings(*short), report=Silent())
    assert caught.value.fix == "--device cpu --set precision=fp32 resumes from the last checkpoint"
    report = Silent()
    segment(str(whole[0]), maps, tmp_path / "out", settings=settings(*short, "precision=fp32"), report=report)
    assert any("from step 1" in line for line in report.lines)


def test_bfloat16(whole, maps, tmp_path):
    result = segment(str(whole[0]), maps, tmp_path / "out", settings=settings("precision=bf16"), report=Silent())
    assert result["miou"] > 0.5


def test_the_command(whole, maps, tmp_path):
    options = [word for override in [*SHORT, "steps=2", "warmup_steps=0"] for word in ("--set", override)]
    done = CliRunner().invoke(
        app, ["evaluate", "segment", str(whole[0]), str(maps), str(tmp_path / "out"), *options, "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert "miou" in done.stdout
    listed = CliRunner().invoke(app, ["results", str(tmp_path / "out"), "--format", "markdown"])
    assert "| mIoU " in listed.stdout


def test_labels_from_one_on_mean_the_same(maps, tmp_path):
    shifted = write_maps(tmp_path / "shifted", first=1)
    plain, _ = open_label_maps(maps, settings())
    reduced, _ = open_label_maps(shifted, settings("reduce_zero=true"))
    for index in range(len(plain)):
        assert np.array_equal(plain.read(index)[1], reduced.read(index)[1])
    (shifted / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t.1\t1\t1\t1\twall\n2\t.1\t1\t1\t1\tsky\n"
    )
    (shifted / "classes.txt").unlink()
    ade, _ = open_label_maps(shifted, settings())
    assert (ade.classes, ade.first) == (["wall", "sky"], 1)


def broken(root: Path, what: str) -> None:
    first = root / "annotations" / "train" / "0.png"
    if what == "label":
        labels = np.array(Image.open(first))
        labels[5, 5] = 77
        Image.fromarray(labels).save(first)
    elif what == "size":
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(first)
    elif what == "colour":
        Image.open(root / "images" / "train" / "0.png").save(first)
    elif what == "nothing":
        first.write_bytes(b"nothing")
    elif what == "missing":
        first.unlink()
    elif what == "folder":
        (root / "annotations" / "val").rename(root / "annotations" / "other")
    elif what == "classes":
        (root / "classes.txt").unlink()
    elif what == "twice":
        (root / "classes.txt").write_text("a\na\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("label", r"label values \[77\] are outside 0..3"),
        ("size", "the labels are for 5 x 5 pixels"),
        ("colour", "mode is RGB"),
        ("nothing", "cannot be decoded"),
        ("missing", "image '0' has no labels"),
        ("folder", "no such folder"),
        ("classes", "classes are unknown"),
        ("twice", "2 classes are listed, 1 of them different"),
    ],
)
def test_data_that_do_not_fit_are_refused_by_name(whole, tmp_path, what, message):
    root = write_maps(tmp_path / "maps")
    broken(root, what)
    with pytest.raises((SourceError, SettingsError), match=message) as caught:
        segment(str(whole[0]), root, tmp_path / "out", settings=settings("warmup_steps=0"), report=Silent())
    assert caught.value.fix


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (64, 64), (3000, 200)])
def test_images_are_brought_to_the_scale_and_keep_their_shape(size):
    width, height = fitted_size(*size, (2048, 512))
    assert max(width, height) <= 2048
    assert min(width, height) <= 512
    assert max(width, height) == 2048 or min(width, height) == 512
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)


def test_crops_hold_pixels_with_their_labels(maps):
    train, _ = open_label_maps(maps, settings())
    random.seed(0)
    for index in range(len(train)):
        pixels, labels = draw_crop(*train.read(index), settings("image_size=48"), fill=(1, 2, 3))
        assert (pixels.shape, labels.shape) == ((48, 48, 3), (48, 48))
        known = labels != 255
        distance = np.abs(pixels[known].astype(int)[:, None] - COLOURS[None].astype(int)).sum(axis=2)
        assert (distance.argmin(axis=1) == labels[known]).mean() > 0.9
        # Padding does not count.
        assert (labels[(pixels == (1, 2, 3)).all(axis=2)] == 255).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chunk=3", "batch 4 is not divisible by chunk 3"),
        ("stride=40", "leaves gaps"),
        ("warmup_steps=40", "must be less than steps"),
        ("scale_range=[2, 1]", "not a range"),
    ],
)
def test_settings_that_do_not_fit(override, message):
    with pytest.raises(SettingsError, match=message):
        settings(override)


@pytest.mark.parametrize(
    ("size", "rates", "drop"),
    [
        *((size, {0.8e-4, 1e-4, 1.5e-4, 2e-4}, 0.1) for size in ("tiny", "small", "base")),
        ("large", {1e-5, 2e-5, 3e-5, 4e-5}, 0.15),
    ],
)
def test_presets_hold_the_fixed_values_of_table_11_and_one_of_each_grid(size, rates, drop):
    preset = load(SegmentSettings, "evaluate", f"segment-{size}")
    assert preset.lr in rates
    assert preset.layer_decay in {0.65, 0.75, 0.8, 0.85, 0.95}
    assert preset.drop_path == drop
    assert (preset.batch, preset.steps, preset.warmup_steps, preset.image_size) == (16, 160000, 1500, 512)
    assert (preset.min_lr, preset.weight_decay, preset.beta1, preset.beta2) == (1e-6, 0.05, 0.9, 0.999)
    assert (preset.scale_range, preset.stride, preset.auxiliary) == ((0.5, 2.0), 341, 0.4)
