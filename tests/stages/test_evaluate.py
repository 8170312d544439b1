"""`evaluate knn` and `evaluate linear` as a user runs them: results, going on, refusals."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cae2pipe.artifacts.box import open_box
from cae2pipe.cli import app
from cae2pipe.config.base import load
from cae2pipe.config.evaluate import KnnSettings, LinearSettings
from cae2pipe.errors import MismatchError, SettingsError, SourceError
from cae2pipe.evaluation import features as features_module
from cae2pipe.evaluation.crop_batches import batch_for
from cae2pipe.models.export import CONFIG, WEIGHTS
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import evaluate as stage
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.verify import verify
from tests.conftest import contents, snapshot

CLASSES = {"bright": (230, 220, 40), "dark": (20, 30, 60), "red": (200, 20, 30)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three colours with noise: even an untrained encoder tells them apart. One val image is none."""
    rng = np.random.default_rng(0)
    for part, each in (("train", 6), ("val", 3)):
        for name, colour in CLASSES.items():
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(each):
                pixels = np.clip(np.array(colour) + rng.integers(-15, 16, size=(40, 44, 3)), 0, 255)
                path = tmp_path / "data" / part / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "data" / "val" / "red" / "broken.png").write_bytes(b"nothing")
    return tmp_path / "data"


def knn(*overrides: str) -> KnnSettings:
    return load(KnnSettings, "evaluate", "knn", ["speed.workers=0", "speed.device=cpu", "k=[5, 1]", *overrides])


def linear(*overrides: str) -> LinearSettings:
    return load(
        LinearSettings, "evaluate", "linear", ["speed.workers=0", "speed.device=cpu", "cached_crops=1", *overrides]
    )


def test_knn_and_linear_share_features_and_separate_colours(exported, data, tmp_path):
    out, report = tmp_path / "out", Silent()
    result = evaluate("knn", str(exported), data, out, knn(), report)
    assert result["top1"] == 1
    assert {"evaluation": "knn", "encoder": "exported", "feature": "class", "k": 5}.items() <= result.items()
    assert {kind: set(scores) for kind, scores in result["by_feature"].items()} == {
        "class": {"1", "5"},
        "mean": {"1", "5"},
    }
    assert result["protocol"] == "k 5, temperature 0.07, crop 32 of 37"
    assert (result["images"], result["rejected"]) == ({"train": 18, "val": 9}, {"train": 0, "val": 1})
    assert any("broken.png" in line for line in report.lines)
    features = snapshot(out / "features")
    assert len(features) == 2

    result = evaluate("linear", str(exported), data, out, linear(), Silent())
    assert result["top1"] == 1
    assert len(result["losses"]) == 90
    assert snapshot(out / "features") == features

    for name in ("knn", "linear"):
        assert verify(out / name, Silent()).problems == []
        facts = inspect_folder(out / name)
        assert facts["result"]["top1"] == 1
        assert "losses" not in facts["result"]
        assert str(tmp_path) not in (out / name / "manifest.json").read_text()


def test_a_second_run_does_nothing(exported, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = evaluate("knn", str(exported), data, out, knn(), Silent())
    before = snapshot(out)
    monkeypatch.setattr(stage, "extract_features", None)
    report = Silent()
    assert evaluate("knn", str(exported), data, out, knn(), report) == result
    assert snapshot(out) == before
    assert report.lines == [f"nothing to do: {out / 'knn'} holds this score, top1 1.0000"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}")])
def test_a_lost_result_is_made_again(exported, data, tmp_path, damage):
    out = tmp_path / "out"
    result = evaluate("linear", str(exported), data, out, linear(), Silent())
    before = contents(out)
    damage(out / "linear" / "result.json")
    assert evaluate("linear", str(exported), data, out, linear(), Silent()) == result
    assert contents(out) == before


def flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def last_label(path: Path) -> None:
    """One label of a part, changed; the file is as whole as before."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors["labels"][-1] += 7
    save_file(tensors, path, about)


def unsigned(path: Path) -> None:
    """A part as versions before checksums wrote it."""
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
    evaluate("knn", str(exported), data, out, knn(), Silent())
    before = contents(out)
    # The train images' part, which is the larger one.
    part = max((out / "features").iterdir(), key=lambda path: path.stat().st_size)
    damage(part)
    (out / "knn" / "result.json").unlink()
    report = Silent()
    evaluate("knn", str(exported), data, out, knn(), report)
    assert contents(out) == before
    assert any("damaged" in line and part.name in line for line in report.lines)


def test_a_broken_off_extraction_goes_on_with_the_next_part(exported, data, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "PART", 4)
    settings = knn("speed.batch=4")
    whole = evaluate("knn", str(exported), data, tmp_path / "whole", settings, Silent())
    write, calls = features_module.write_part, []

    def interrupted(path, *arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(path.name)
        write(path, *arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(features_module, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("knn", str(exported), data, out, settings, Silent())
    assert not open_box(out / "knn").complete
    done, parts = list(calls), 5 + 3  # 18 and 10 files in fours
    monkeypatch.setattr(features_module, "write_part", lambda path, *a: (calls.append(path.name), write(path, *a)))
    assert evaluate("knn", str(exported), data, out, settings, Silent()) == whole
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
    evaluate("knn", str(exported), data, tmp_path / "out", knn("k=[5]"), Silent())
    train, val = (load_file(path)["mean"] for path in (tmp_path / "out" / "features").iterdir())
    assert not torch.equal(train, val)


def test_features_leave_the_device_once_a_part(exported, data, tmp_path, monkeypatch):
    """To take each batch off would wait for it. What is kept until then are features, not the tokens they are of."""
    calls, kept, to_cpu, join = [], [], torch.Tensor.cpu, torch.cat

    def cat(parts, *rest, **options):
        kept.extend(parts)
        return join(parts, *rest, **options)

    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(self) or to_cpu(self))
    monkeypatch.setattr(features_module.torch, "cat", cat)
    split, _ = stage.open_data(data, 2)
    encoder = stage.load_encoder(str(exported), 0, torch.device("cpu"))
    world = stage.World(0, 1, torch.device("cpu"))
    found = features_module.extract_features(tmp_path, encoder, split, stage.CentralCrop(32, 37), 0, world, Silent())
    assert len(found.labels) == 18
    assert [len(tensor) for tensor in calls] == [18, 18]
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept if part.ndim == 2)


@pytest.mark.parametrize(("device", "batch"), [("cpu", 64), ("cuda", 256)])
def test_the_batch_suits_the_device(device, batch):
    assert batch_for(None, torch.device(device)) == batch
    assert batch_for(7, torch.device(device)) == 7


def test_the_batch_changes_no_identity(exported, data, tmp_path):
    evaluate("knn", str(exported), data, tmp_path / "out", knn("speed.batch=5"), Silent())
    report = Silent()
    result = evaluate("knn", str(exported), data, tmp_path / "out", knn(), report)
    assert any("nothing to do" in line for line in report.lines)
    again = evaluate("knn", str(exported), data, tmp_path / "again", knn(), Silent())
    assert (again["fingerprint"], again["top1"]) == (result["fingerprint"], result["top1"])


def test_workers_change_nothing(exported, data, tmp_path):
    evaluate("knn", str(exported), data, tmp_path / "none", knn(), Silent())
    evaluate("knn", str(exported), data, tmp_path / "two", knn("speed.workers=2"), Silent())
    assert contents(tmp_path / "none") == contents(tmp_path / "two")


def test_errors_in_workers_keep_their_message(exported, data, tmp_path, monkeypatch):
    opened = stage.open_data(data, 64)
    (data / "train" / "dark" / "3.png").unlink()
    monkeypatch.setattr(stage, "open_data", lambda *_: opened)
    with pytest.raises(SourceError) as caught:
        evaluate("knn", str(exported), data, tmp_path / "out", knn("speed.workers=1"), Silent())
    assert caught.value.where.endswith("3.png")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "field"),
    [("temperature=0.1", "settings.temperature"), ("features.feature=mean", "feature = "), ("k=[1]", "settings.k")],
)
def test_other_settings_are_refused_by_name(exported, data, tmp_path, override, field):
    evaluate("knn", str(exported), data, tmp_path / "out", knn(), Silent())
    with pytest.raises(MismatchError) as caught:
        evaluate("knn", str(exported), data, tmp_path / "out", knn(override), Silent())
    assert field in caught.value.what


def test_another_encoder_and_other_data_are_refused(exported, data, tmp_path, trained_run):
    out = tmp_path / "out"
    evaluate("knn", str(exported), data, out, knn(), Silent())
    with pytest.raises(MismatchError, match="encoder"):
        evaluate("knn", f"random:{trained_run()}", data, out, knn(), Silent())
    (data / "train" / "dark" / "5.png").unlink()
    with pytest.raises(MismatchError, match=r"data\.train"):
        evaluate("knn", str(exported), data, out, knn(), Silent())


def test_a_run_without_trained_class_token_is_scored_by_its_patches(make_run, data, tmp_path):
    run = make_run(loss={"visible": 0.0})
    assert evaluate("knn", str(run), data, tmp_path / "auto", knn(), Silent())["feature"] == "mean"
    forced = evaluate("knn", str(run), data, tmp_path / "class", knn("features.feature=class"), Silent())
    assert forced["feature"] == "class"


def test_the_same_weights_scored_by_another_feature_are_another_score(make_run, data, tmp_path):
    """auto is the class token of an exported file, and the patches of a run that did not train its class token."""
    run, bare = make_run(loss={"visible": 0.0}), tmp_path / "bare"
    bare.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copy(run / name, bare)
    evaluate("knn", str(bare), data, tmp_path / "out", knn(), Silent())
    with pytest.raises(MismatchError, match='with feature = "class", and "mean"'):
        evaluate("knn", str(run), data, tmp_path / "out", knn(), Silent())


def test_val_with_fewer_classes_is_scored_by_names(exported, data, tmp_path):
    for path in (data / "val" / "bright").iterdir():
        path.unlink()
    (data / "val" / "bright").rmdir()
    for name, settings in (("knn", knn()), ("linear", linear())):
        result = evaluate(name, str(exported), data, tmp_path / name, settings, Silent())
        assert result["top1"] == 1
        assert result["classes"] == 3


def test_what_the_encoder_cannot_do_is_refused(exported, data, tmp_path):
    with pytest.raises(SettingsError, match="no class token"):
        evaluate(
            "knn", "random:vit_base_patch16_siglip_224", data, tmp_path / "out", knn("features.feature=class"), Silent()
        )
    with pytest.raises(SettingsError, match="takes 32 pixels"):
        evaluate("knn", str(exported), data, tmp_path / "out", knn("features.image_size=64"), Silent())
    assert not (tmp_path / "out").exists()


def test_a_part_of_rejects_alone(exported, data, tmp_path):
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(SourceError, match="not one image"):
        evaluate("knn", str(exported), data, tmp_path / "out", knn(), Silent())


def test_weights_that_give_no_numbers(exported, data, tmp_path):
    state = load_file(exported / "encoder.safetensors")
    state["norm.weight"][0] = float("nan")
    save_file(state, exported / "encoder.safetensors")
    with pytest.raises(SourceError, match="not finite"):
        evaluate("knn", str(exported), data, tmp_path / "out", knn(), Silent())
    assert not list((tmp_path / "out" / "features").iterdir())


def test_rejects_that_fill_a_part(exported, data, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "PART", 1)
    result = evaluate("knn", str(exported), data, tmp_path / "out", knn("speed.batch=1"), Silent())
    assert result["images"]["val"] == 9
    parts = [load_file(path) for path in (tmp_path / "out" / "features").iterdir()]
    assert {frozenset(part) for part in parts} == {frozenset({"labels"}), frozenset({"class", "mean", "labels"})}
    assert {part["mean"].shape[1] for part in parts if "mean" in part} == {32}


def test_the_command(exported, data, tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(app, [str(a) for a in ("evaluate", *arguments, "--device", "cpu", "--workers", 0)])

    for kind in ("knn", "linear"):
        for _ in range(2):
            few = ("--set", "k=[5,100]") if kind == "knn" else ("--fast",)
            done = run(kind, exported, data, tmp_path / "out", *few)
            assert done.exit_code == 0, done.output
            assert "1.0000" in done.stdout
            assert "exported" in done.stdout
            assert "protocol: " in done.stdout
        assert json.loads((tmp_path / "out" / kind / "result.json").read_text())["top1"] == 1
    refused = run("knn", tmp_path / "nowhere", data, tmp_path / "out2")
    assert refused.exit_code == 2
    assert "timm:NAME@FILE" in refused.stderr


def test_real_photographs_of_three_classes(real, tmp_path):
    """A trained ViT tells them apart from five examples each, an untrained student does not do as well."""
    for part in ("train", "val"):
        for folder in sorted((real / "imagenette" / part).iterdir())[:3]:
            target = tmp_path / "data" / part / folder.name
            target.mkdir(parents=True)
            for path in sorted(folder.iterdir())[:5]:
                (target / path.name).symlink_to(path)
    weights = real / "teachers" / "vit_tiny_patch16_224.timm.safetensors"
    trained = evaluate(
        "knn", f"timm:vit_tiny_patch16_224@{weights}", tmp_path / "data", tmp_path / "trained", knn(), Silent()
    )
    assert trained["top1"] >= 0.9
    assert trained["images"] == {"train": 15, "val": 15}
    untrained = evaluate("knn", "random:tiny", tmp_path / "data", tmp_path / "random", knn(), Silent())
    assert untrained["top1"] < trained["top1"]
    assert torch.isfinite(torch.tensor(untrained["top1"]))


def test_more_neighbours_than_images(exported, data, tmp_path):
    with pytest.raises(SettingsError, match="20 neighbours are asked for, and there are 18") as caught:
        evaluate("knn", str(exported), data, tmp_path / "out", knn("k=[20, 10]"), Silent())
    assert caught.value.fix == "--set 'k=[10]'"
    report = Silent()
    result = evaluate("knn", str(exported), data, tmp_path / "out2", knn("k=[10, 20]"), report)
    assert set(result["by_feature"]["mean"]) == {"10"}
    assert any("left out k above the 18" in line for line in report.lines)


def test_one_class_alone(exported, data, tmp_path):
    for part in ("train", "val"):
        for name in ("dark", "red"):
            shutil.rmtree(data / part / name)
    with pytest.raises(SourceError, match="one class only, 'bright'"):
        evaluate("knn", str(exported), data, tmp_path / "out", knn(), Silent())


def test_real_scores_are_those_of_scikit_learn_on_the_same_features(real, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for part, each in (("train", 30), ("val", 20)):
        for folder in sorted((real / "imagenette" / part).iterdir()):
            target = tmp_path / "data" / part / folder.name
            target.mkdir(parents=True)
            for path in sorted(folder.iterdir())[:each]:
                (target / path.name).symlink_to(path)
    point = 0.01 + 1e-9
    encoder = f"timm:vit_tiny_patch16_224@{real / 'teachers' / 'vit_tiny_patch16_224.timm.safetensors'}"
    out = tmp_path / "out"
    near = evaluate("knn", encoder, tmp_path / "data", out, knn("k=[20]"), Silent())
    straight = evaluate("linear", encoder, tmp_path / "data", out, linear(), Silent())
    train, val = sorted((load_file(path) for path in (out / "features").iterdir()), key=lambda p: -len(p["labels"]))
    assert (len(train["labels"]), len(val["labels"])) == (300, 200)
    for kind in ("class", "mean"):
        reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        wanted = reference.fit(train[kind], train["labels"]).score(val[kind], val["labels"])
        assert near["by_feature"][kind]["20"]["top1"] == pytest.approx(wanted, abs=point)
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    wanted = reference.fit(train["class"], train["labels"]).score(val["class"], val["labels"])
    assert straight["top1"] == pytest.approx(wanted, abs=point)
