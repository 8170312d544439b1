"""`evaluate knn` and `evaluate linear` as a user runs them: results, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.errors import MismatchError, SettingsError, SourceError
from cae2pipe.evaluation import result_store
from cae2pipe.models.export import CONFIG, WEIGHTS
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages import evaluate as stage
from cae2pipe.stages.evaluate import evaluate
from cae2pipe.stages.inspection import inspect_folder
from cae2pipe.stages.verify import verify
from tests.conftest import contents, snapshot
from tests.stages.evaluating import knn, linear


def test_knn_and_linear_share_features_and_separate_colours(exported, data, tmp_path):
    out, report = tmp_path / "out", Silent()
    result = evaluate("knn", str(exported), data, out=out, settings=knn(), report=report)
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

    result = evaluate("linear", str(exported), data, out=out, settings=linear(), report=Silent())
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
    result = evaluate("knn", str(exported), data, out=out, settings=knn(), report=Silent())
    before = snapshot(out)
    monkeypatch.setattr(stage, "extract_features", None)
    report = Silent()
    assert evaluate("knn", str(exported), data, out=out, settings=knn(), report=report) == result
    assert snapshot(out) == before
    assert report.lines == [f"nothing to do: {out / 'knn'} already has this score, top1 1.0000"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}")])
def test_a_lost_result_is_made_again(exported, data, tmp_path, damage):
    out = tmp_path / "out"
    result = evaluate("linear", str(exported), data, out=out, settings=linear(), report=Silent())
    before = contents(out)
    damage(out / "linear" / "result.json")
    assert evaluate("linear", str(exported), data, out=out, settings=linear(), report=Silent()) == result
    assert contents(out) == before


@pytest.mark.parametrize("stopped_at", ["write_json", "file_entry"])
@pytest.mark.parametrize("then", ["temperature=0.07", "temperature=0.1"])
def test_a_stop_before_the_result_is_recorded(exported, data, tmp_path, monkeypatch, stopped_at, then):
    """The predictions are there, and nothing is listed yet: the same command resumes, or another one starts."""
    wanted = evaluate("knn", str(exported), data, out=tmp_path / "whole", settings=knn(then), report=Silent())
    with monkeypatch.context() as patched:
        patched.setattr(result_store, stopped_at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(), report=Silent())
    assert (tmp_path / "out" / "knn" / "predictions.npz").exists()
    assert evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(then), report=Silent()) == wanted
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted(*_):
    raise KeyboardInterrupt


OWN = "give another output folder"


@pytest.mark.parametrize(
    ("override", "field", "fix"),
    [
        ("temperature=0.1", "settings.temperature", f"--set temperature=0.07 gives its score; or {OWN}"),
        ("k=[1]", "settings.k", f"--set 'k=[5, 1]' gives its score; or {OWN}"),
        ("features.feature=mean", "feature = ", OWN),
    ],
)
def test_other_settings_are_refused_by_name(exported, data, tmp_path, override, field, fix):
    evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(), report=Silent())
    with pytest.raises(MismatchError) as caught:
        evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(override), report=Silent())
    assert field in caught.value.what
    assert caught.value.fix == fix


@pytest.mark.parametrize(("given", "old", "now"), [("", "1e-06", "1e-05"), ("eps=1e-6", "1e-05", "1e-06")])
def test_a_score_of_before_a_setting_existed_has_its_earlier_value(exported, data, tmp_path, given, old, now):
    """``eps=1e-6``, the constant of earlier versions, is not recorded."""
    attentive = ["attentive", str(exported), str(data), str(tmp_path / "out"), "--device", "cpu"]
    attentive += ["--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "batch=9"]

    def run(*eps: str):
        return CliRunner().invoke(app, ["evaluate", *attentive, *(part for each in eps for part in ("--set", each))])

    first = run() if given else run("eps=1e-6")
    assert first.exit_code == 0, first.output
    refused = run(*filter(None, [given]))
    assert refused.exit_code == 2
    words = " ".join(refused.output.split())
    assert f"made with settings.eps = {old}, and {now} is requested now" in words
    assert f"--set eps={old} gives its score" in words
    again = run(f"eps={old}")
    assert again.exit_code == 0, again.output
    assert "nothing to do" in again.output


def test_another_encoder_and_other_data_are_refused(exported, data, tmp_path, trained_run):
    out = tmp_path / "out"
    evaluate("knn", str(exported), data, out=out, settings=knn(), report=Silent())
    with pytest.raises(MismatchError, match="encoder"):
        evaluate("knn", f"random:{trained_run()}", data, out=out, settings=knn(), report=Silent())
    (data / "train" / "dark" / "5.png").unlink()
    with pytest.raises(MismatchError, match=r"data\.train"):
        evaluate("knn", str(exported), data, out=out, settings=knn(), report=Silent())


def test_a_run_without_trained_class_token_is_scored_by_its_patches(make_run, data, tmp_path):
    run = make_run(loss={"visible": 0.0})
    assert evaluate("knn", str(run), data, out=tmp_path / "auto", settings=knn(), report=Silent())["feature"] == "mean"
    forced = evaluate(
        "knn", str(run), data, out=tmp_path / "class", settings=knn("features.feature=class"), report=Silent()
    )
    assert forced["feature"] == "class"


def test_the_same_weights_scored_by_another_feature_are_another_score(make_run, data, tmp_path):
    """``auto``: the class token for an exported file, the mean patch for a run that did not train its class token."""
    run, bare = make_run(loss={"visible": 0.0}), tmp_path / "bare"
    bare.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copy(run / name, bare)
    evaluate("knn", str(bare), data, out=tmp_path / "out", settings=knn(), report=Silent())
    with pytest.raises(MismatchError, match='with feature = "class", and "mean"'):
        evaluate("knn", str(run), data, out=tmp_path / "out", settings=knn(), report=Silent())


def test_val_with_fewer_classes_is_scored_by_names(exported, data, tmp_path):
    for path in (data / "val" / "bright").iterdir():
        path.unlink()
    (data / "val" / "bright").rmdir()
    for name, settings in (("knn", knn()), ("linear", linear())):
        result = evaluate(name, str(exported), data, out=tmp_path / name, settings=settings, report=Silent())
        assert result["top1"] == 1
        assert result["classes"] == 3


def test_what_the_encoder_cannot_do_is_refused(exported, data, tmp_path):
    with pytest.raises(SettingsError, match="no class token"):
        evaluate(
            "knn",
            "random:vit_base_patch16_siglip_224",
            data,
            out=tmp_path / "out",
            settings=knn("features.feature=class"),
            report=Silent(),
        )
    with pytest.raises(SettingsError, match="encoder 32 pixels"):
        evaluate(
            "knn", str(exported), data, out=tmp_path / "out", settings=knn("features.image_size=64"), report=Silent()
        )
    assert not (tmp_path / "out").exists()


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
    """A trained ViT distinguishes them from five examples each; an untrained student is worse."""
    for part in ("train", "val"):
        for folder in sorted((real / "imagenette" / part).iterdir())[:3]:
            target = tmp_path / "data" / part / folder.name
            target.mkdir(parents=True)
            for path in sorted(folder.iterdir())[:5]:
                (target / path.name).symlink_to(path)
    weights = real / "teachers" / "vit_tiny_patch16_224.timm.safetensors"
    trained = evaluate(
        "knn",
        f"timm:vit_tiny_patch16_224@{weights}",
        tmp_path / "data",
        out=tmp_path / "trained",
        settings=knn(),
        report=Silent(),
    )
    assert trained["top1"] >= 0.9
    assert trained["images"] == {"train": 15, "val": 15}
    untrained = evaluate(
        "knn", "random:tiny", tmp_path / "data", out=tmp_path / "random", settings=knn(), report=Silent()
    )
    assert untrained["top1"] < trained["top1"]
    assert torch.isfinite(torch.tensor(untrained["top1"]))


def test_more_neighbours_than_images(exported, data, tmp_path):
    with pytest.raises(SettingsError, match="k is 20, but there are only 18") as caught:
        evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn("k=[20, 10]"), report=Silent())
    assert caught.value.fix == "--set 'k=[10]'"
    report = Silent()
    result = evaluate("knn", str(exported), data, out=tmp_path / "out2", settings=knn("k=[10, 20]"), report=report)
    assert set(result["by_feature"]["mean"]) == {"10"}
    assert any("ignored k above the number of training images (18)" in line for line in report.lines)


def test_one_class_alone(exported, data, tmp_path):
    for part in ("train", "val"):
        for name in ("dark", "red"):
            shutil.rmtree(data / part / name)
    with pytest.raises(SourceError, match="only one class, 'bright'"):
        evaluate("knn", str(exported), data, out=tmp_path / "out", settings=knn(), report=Silent())


def test_real_scores_are_those_of_scikit_learn_on_the_same_features(real, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for part, each in (("train", 30), ("val", 20)):
        for folder in sorted((real / "imagenette" / part).iterdir())[::2]:
            target = tmp_path / "data" / part / folder.name
            target.mkdir(parents=True)
            for path in sorted(folder.iterdir())[:each]:
                (target / path.name).symlink_to(path)
    point = 0.01 + 1e-9
    encoder = f"timm:vit_tiny_patch16_224@{real / 'teachers' / 'vit_tiny_patch16_224.timm.safetensors'}"
    out = tmp_path / "out"
    near = evaluate("knn", encoder, tmp_path / "data", out=out, settings=knn("k=[20]"), report=Silent())
    straight = evaluate("linear", encoder, tmp_path / "data", out=out, settings=linear(), report=Silent())
    train, val = sorted((load_file(path) for path in (out / "features").iterdir()), key=lambda p: -len(p["labels"]))
    assert (len(train["labels"]), len(val["labels"])) == (150, 100)
    for kind in ("class", "mean"):
        reference = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        wanted = reference.fit(train[kind], train["labels"]).score(val[kind], val["labels"])
        assert near["by_feature"][kind]["20"]["top1"] == pytest.approx(wanted, abs=point)
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    wanted = reference.fit(train["class"], train["labels"]).score(val["class"], val["labels"])
    assert straight["top1"] == pytest.approx(wanted, abs=point)
