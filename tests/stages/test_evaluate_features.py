"""Features of `evaluate knn` and `evaluate linear`: written in parts, checked, recomputed, independent of batches."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.errors import SourceError
from cae2pipe.evaluation import features as features_module
from cae2pipe.evaluation.crop_batches import batch_for
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import evaluate as stage
from cae2pipe.stages.evaluate import evaluate
from tests.conftest import contents
from tests.stages.evaluating import knn


def flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def last_label(path: Path) -> None:
    """Change one label of a part; the file stays valid."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors["labels"][-1] += 7
    save_file(tensors, path, about)


def unsigned(path: Path) -> None:
    """A part as written by versions without checksums."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["samples"])
    del about["crc32c"]
    save_file(load_file(path), path, {"samples": json.dumps(about)})


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: flipped(path, -100),
        lambda path: flipped(path, path.read_bytes().index(b"bright/")),
        last_label,
        unsigned,
        fifo,
    ],
)
def test_a_damaged_part_is_made_again(damage, exported, data, tmp_path):
    out = tmp_path / "out"
    evaluate("knn", str(exported), data, out=out, settings=knn(), report=Silent())
    before = contents(out)
    # The train images' part, which is the larger one.
    part = max((out / "features").iterdir(), key=lambda path: path.stat().st_size)
    damage(part)
    (out / "knn" / "result.json").unlink()
    report = Silent()
    evaluate("knn", str(exported), data, out=out, settings=knn(), report=report)
    assert contents(out) == before
    assert any("damaged" in line and part.name in line for line in report.lines)


def test_a_broken_off_extraction_goes_on_with_the_next_part(exported, data, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "PART", 4)
    settings = knn("speed.batch=4")
    whole = evaluate("knn", str(exported), data, out=tmp_path / "whole", settings=settings, report=Silent())
    write, calls = features_module.write_part, []

    def interrupted(path, *arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(path.name)
        write(path, *arguments, **options)

    out = tmp_path / "out"
    monkeypatch.setattr(features_module, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("knn", str(exported), data, out=out, settings=settings, report=Silent())
    assert not open_artifact(out / "knn").complete
    done, parts = list(calls), 5 + 3  # 18 and 10 files in fours
    monkeypatch.setattr(
        features_module, "write_part", lambda path, *a, **k: (calls.append(path.name), write(path, *a, **k))
    )
    assert evaluate("knn", str(exported), data, out=out, settings=settings, report=Silent()) == whole
    assert len(calls) == len(set(calls)) == parts
    assert calls[:3] == done
    assert contents(out) == contents(tmp_path / "whole")


def test_files_of_equal_names_and_sizes_are_other_images(exported, data, tmp_path):
    for path in list(data.rglob("*.png")):
        if path.name == "broken.png" or int(path.stem) > 2:
            path.unlink()
        else:
            pixels = np.asarray(Image.open(path))
            Image.fromarray(pixels if "train" in path.parts else pixels[::-1]).save(path.with_suffix(".bmp"))
            path.unlink()
    evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn("k=[5]"), report=Silent())
    train, val = (load_file(path)["mean"] for path in (tmp_path / "out" / "features").iterdir())
    assert not torch.equal(train, val)


def test_features_leave_the_device_once_a_part(exported, data, tmp_path, monkeypatch):
    """Copying each batch to the host would wait for it. Until then only features are kept, not tokens."""
    calls, kept, to_cpu, join = [], [], torch.Tensor.cpu, torch.cat

    def cat(parts, *rest, **options):
        kept.extend(parts)
        return join(parts, *rest, **options)

    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(self) or to_cpu(self))
    monkeypatch.setattr(features_module.torch, "cat", cat)
    split, _ = stage.open_data(data, 2)
    encoder = stage.load_encoder(str(exported), 0, torch.device("cpu"))
    world = stage.World(0, 1, torch.device("cpu"))
    found = features_module.extract_features(
        tmp_path, encoder, split, crop=stage.CentralCrop(32, 37), workers=0, world=world, report=Silent()
    )
    assert len(found.labels) == 18
    assert [len(tensor) for tensor in calls] == [18, 18]
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept if part.ndim == 2)


@pytest.mark.parametrize(("device", "batch"), [("cpu", 64), ("cuda", 256)])
def test_the_batch_suits_the_device(device, batch):
    assert batch_for(None, torch.device(device)) == batch
    assert batch_for(7, torch.device(device)) == 7


def test_the_batch_changes_no_identity(exported, data, tmp_path):
    evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn("speed.batch=5"), report=Silent())
    report = Silent()
    result = evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(), report=report)
    assert any("nothing to do" in line for line in report.lines)
    again = evaluate("knn", str(exported), data, out=tmp_path / "again", settings=knn(), report=Silent())
    assert (again["fingerprint"], again["top1"]) == (result["fingerprint"], result["top1"])


def test_workers_change_nothing(exported, data, tmp_path):
    evaluate("knn", str(exported), data, out=tmp_path / "none", settings=knn(), report=Silent())
    evaluate("knn", str(exported), data, out=tmp_path / "two", settings=knn("speed.workers=2"), report=Silent())
    assert contents(tmp_path / "none") == contents(tmp_path / "two")


def test_errors_in_workers_keep_their_message(exported, data, tmp_path, monkeypatch):
    opened = stage.open_data(data, 64)
    (data / "train" / "dark" / "3.png").unlink()
    monkeypatch.setattr(stage, "open_data", lambda *_: opened)
    with pytest.raises(SourceError) as caught:
        evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn("speed.workers=1"), report=Silent())
    assert caught.value.where.endswith("3.png")
    assert "Traceback" not in str(caught.value)


def test_a_part_of_rejects_alone(exported, data, tmp_path):
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(SourceError, match="no image here"):
        evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(), report=Silent())


def test_weights_that_give_no_numbers(exported, data, tmp_path):
    state = load_file(exported / "encoder.safetensors")
    state["norm.weight"][0] = float("nan")
    save_file(state, exported / "encoder.safetensors")
    with pytest.raises(SourceError, match="not finite"):
        evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(), report=Silent())
    assert not list((tmp_path / "out" / "features").iterdir())


def test_rejects_that_fill_a_part(exported, data, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "PART", 1)
    result = evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn("speed.batch=1"), report=Silent())
    assert result["images"]["val"] == 9
    parts = [load_file(path) for path in (tmp_path / "out" / "features").iterdir()]
    assert {frozenset(part) for part in parts} == {frozenset({"labels"}), frozenset({"class", "mean", "labels"})}
    assert {part["mean"].shape[1] for part in parts if "mean" in part} == {32}
