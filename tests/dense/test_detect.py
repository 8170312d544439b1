"""``evaluate detect`` as a user runs it, on coloured rectangles; refused data."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.config.base import load
from cae2pipe.config.dense import DetectSettings
from cae2pipe.dense import rcnn
from cae2pipe.dense.coco import open_coco
from cae2pipe.dense.detect import DetectLearner
from cae2pipe.dense.rcnn import MaskRCNN
from cae2pipe.errors import OutOfMemoryError, SettingsError, SourceError, Terminated
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import export_encoder
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.evaluate_dense import detect
from cae2pipe.stages.verify import verify
from tests.conftest import contents
from tests.ranks import launch

ROOT = Path(__file__).parents[2]
SHORT = [
    "speed.workers=0",
    "speed.device=cpu",
    "epochs=2",
    "drops=[1]",
    "warmup_steps=2",
    "batch=2",
    "chunk=1",
    "short_sides=[64]",
    "long_side=96",
    "proposals=20",
    "rois=16",
    "crop=0.3",
    "score=0.01",
    "min_lr=2e-5",
    "detections=5",
    "pictures=2",
]


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Heads of 32 channels instead of 256, with which a checkpoint of the cascade would have half a gigabyte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rcnn, "CHANNELS", 32)
        yield


def narrow_command(*arguments: str) -> None:
    rcnn.CHANNELS = 32
    app(arguments)


def write_coco(root: Path) -> Path:
    """Images with one or two rectangles of two colours; one image has none, one annotation is a crowd."""
    rng = np.random.default_rng(0)
    for part, count in (("train2017", 5), ("val2017", 3)):
        images, annotations = [], []
        (root / part).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(90, 120, (60, 80, 3)).astype(np.uint8)
            for category in range(0 if number == 4 else 1 + number % 2):
                x, y = int(rng.integers(2, 40)), int(rng.integers(2, 30))
                pixels[y : y + 24, x : x + 30] = ((220, 30, 30), (30, 30, 220))[category]
                corners = [x, y, x + 30, y, x + 30, y + 24, x, y + 24]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": (7, 3)[category],
                        "bbox": [x, y, 30, 24],
                        "area": 720,
                        "iscrowd": 0,
                        "segmentation": [corners],
                    }
                )
            images.append({"id": number, "width": 80, "height": 60, "file_name": f"{number}.png"})
            Image.fromarray(pixels).save(root / part / f"{number}.png")
        annotations.append({**annotations[0], "id": 99, "iscrowd": 1})
        categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("encoder")
    export_encoder(Encoder(width=32, depth=4, heads=2, image_size=64, patch_size=16), root)
    return root


def settings(*overrides: str) -> DetectSettings:
    return load(DetectSettings, "evaluate", "detect", overrides=[*SHORT, *overrides])


def outcome(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if not name.endswith("metrics.jsonl")}


RATES: list[dict[float, float]] = []
"""Of every step of ``whole``: by ``lr_scale``, what was set."""


@pytest.fixture(scope="module")
def whole(data, encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    report, real = Silent(), DetectLearner.step

    def step(self, chunks, number, size):
        loss = real(self, chunks, number, size)
        RATES.append({group["lr_scale"]: group["lr"] for group in self.optimizer.param_groups})
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectLearner, "step", step)
        detect(str(encoder), data, out, settings=settings(), report=report)
    assert "train: 1 image without objects: not used in training" in report.lines
    return out


def test_what_is_left_behind(whole, data, encoder):
    result = json.loads((whole / "detect" / "result.json").read_text())
    assert 0 <= result["ap_box"] <= 1
    assert set(result["box"]) == {"ap50", "ap75", "ap_small", "ap_medium", "ap_large", "per_class"}
    assert result["images"] == {"train": 4, "val": 3}
    assert {path.name for path in (whole / "detect").iterdir()} >= {"pictures.png", "last.safetensors"}
    assert verify(whole / "detect", Silent()).problems == []
    report = Silent()
    assert detect(str(encoder), data, whole, settings=settings(), report=report) == result
    assert any("nothing to do" in line for line in report.lines)
    listed = CliRunner().invoke(app, ["results", str(whole), "--format", "markdown"])
    assert "| AP^b " in listed.stdout


def test_no_layer_s_rate_falls_below_the_lowest(whole):
    """3e-4 at a batch of 16, here 2; one drop after the first epoch, which warms up; layers by 0.8."""
    assert len(RATES) == 4
    lowest, peaks = 2e-5 / 8, [3e-4 / 8 * 0.8**depth for depth in range(6)]
    first, *rest = [sorted(rates.values(), reverse=True) for rates in RATES[1:]]
    assert first == pytest.approx(peaks)
    for rates in rest:
        assert rates == pytest.approx([max(peak / 10, lowest) for peak in peaks])
        assert rates[0] > lowest == pytest.approx(rates[-1])


def test_stopped_and_resumed_it_gives_the_same_bytes(whole, data, encoder, tmp_path, monkeypatch):
    real = DetectLearner.step

    def step(self, chunks, number, size):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, chunks, number, size)

    with monkeypatch.context() as patch:
        patch.setattr(DetectLearner, "step", step)
        with pytest.raises(Terminated):
            detect(str(encoder), data, tmp_path / "out", settings=settings(), report=Silent())
    detect(str(encoder), data, tmp_path / "out", settings=settings("speed.workers=1"), report=Silent())
    assert outcome(tmp_path / "out") == outcome(whole)


def test_two_processes_and_the_cascade(data, encoder, tmp_path):
    """DDP requires that all parameters have gradients."""
    options = [word for override in SHORT for word in ("--set", override)]
    places = (str(path) for path in (encoder, data, tmp_path / "out"))
    done = launch(narrow_command, "evaluate", "detect", *places, "--cascade", *options)
    assert done.codes == [0, 0], done.stderr
    assert done.stdout.count("protocol: Cascade Mask R-CNN") == 1
    assert json.loads((tmp_path / "out" / "detect" / "result.json").read_text())["images"]["val"] == 3


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("losses", "a chunk of 2 images", "--set chunk=1"),
        ("detections", "one image to be scored", "--device cpu --set precision=fp32 resumes from the last checkpoint"),
    ],
)
def test_the_end_of_the_memory(name, what, fix, data, encoder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskRCNN, name, full)
    with pytest.raises(OutOfMemoryError, match=f"^{what} does not fit") as caught:
        detect(
            str(encoder), data, tmp_path / "out", settings=settings("chunk=2", "epochs=1", "drops=[]"), report=Silent()
        )
    assert caught.value.fix == fix


def test_bfloat16(data, encoder, tmp_path):
    for cascade in ("false", "true"):
        short = settings("precision=bf16", "epochs=1", "drops=[]", f"cascade={cascade}")
        assert detect(str(encoder), data, tmp_path / cascade, settings=short, report=Silent())["images"]["val"] == 3


def test_objects_are_read_as_they_are(data):
    train, val = open_coco(data)
    assert (len(train), len(val), train.classes) == (4, 3, ["blue", "red"])
    image, objects = train.read(1)
    assert objects.labels.tolist() == [2, 1]
    for box, label, mask in zip(objects.boxes.astype(int), objects.labels, objects.masks, strict=True):
        assert mask[box[1] + 1 : box[3] - 1, box[0] + 1 : box[2] - 1].all()
        assert mask.sum() == pytest.approx(720, abs=60)
        if label == 1:  # the later one, which nothing covers
            assert np.asarray(image)[box[1] + 2, box[0] + 2].tolist() == [30, 30, 220]


def spoil(root: Path, what: str) -> None:
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    if what == "outside":
        content["annotations"][0]["bbox"] = [200, 10, 20, 20]
    elif what == "image":
        content["annotations"][0]["image_id"] = 1234
    elif what == "category":
        content["annotations"][0]["category_id"] = 4321
    elif what == "empty":
        content["annotations"] = []
    elif what == "crowds":
        content["annotations"] = [{**each, "iscrowd": 1} for each in content["annotations"]]
    elif what == "keys":
        del content["categories"]
    elif what == "others":
        content["categories"][0]["name"] = "green"
    elif what == "escape":
        content["images"][0]["file_name"] = "../secret.png"
    path.write_text(json.dumps(content))
    if what == "size":
        Image.new("RGB", (10, 10)).save(root / "train2017" / "0.png")
    elif what == "gone":
        (root / "train2017" / "0.png").unlink()
    elif what == "folder":
        (root / "val2017").rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("outside", "the box .* of annotation 1 is outside image '0.png', 80 x 60"),
        ("image", "annotation 1 refers to image 1234"),
        ("category", "annotation 1 refers to category 4321"),
        ("empty", "no annotations"),
        ("crowds", "iscrowd=0"),
        ("keys", "not a COCO instances file: there is no list 'categories'"),
        ("others", "different categories: 'green'"),
        ("escape", "points outside the folder"),
        ("size", "the annotations are for 80 x 60 pixels, but the image has 10 x 10"),
        ("gone", "cannot be read"),
        ("folder", "this file or folder is missing"),
    ],
)
def test_data_that_do_not_fit_are_refused_by_name(encoder, tmp_path, what, message):
    root = write_coco(tmp_path / "coco")
    spoil(root, what)
    with pytest.raises(SourceError, match=message) as caught:
        detect(str(encoder), root, tmp_path / "out", settings=settings(), report=Silent())
    assert caught.value.fix


def test_without_the_extra_it_says_so(encoder, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(SettingsError, match="need faster_coco_eval") as caught:
        detect(str(encoder), data, tmp_path / "out", settings=settings(), report=Silent())
    assert "cae2pipe[dense]" in caught.value.fix
