"""The Python API, from a folder of images to a score: results and errors."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cae2pipe
from cae2pipe.api.settings import nested
from cae2pipe.config.pretrain import PretrainSettings
from cae2pipe.errors import BadInputError, ManifestError, SettingsError
from cae2pipe.runtime.progress import Silent

FUNCTIONS = [name for name in cae2pipe.__all__ if inspect.isfunction(getattr(cae2pipe, name))]
QUIET = {"progress": False}


def test_all_names_are_there_and_documented():
    for name in cae2pipe.__all__:
        assert name == "__version__" or getattr(cae2pipe, name).__doc__
    assert set(cae2pipe.__all__) <= set(dir(cae2pipe))
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        cae2pipe.pretrian  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, cae2pipe; dir(cae2pipe); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_path_may_be_text_and_every_option_is_a_keyword(name):
    for parameter in inspect.signature(getattr(cae2pipe, name)).parameters.values():
        if "Path" in str(parameter.annotation) and str(parameter.annotation) != "Paths":
            assert "str" in str(parameter.annotation)
        if parameter.default is not parameter.empty and name != "settings":
            assert parameter.kind is parameter.KEYWORD_ONLY


def test_from_images_to_a_score(tmp_path, photos, extract_settings, pretrain_settings):
    (shards,) = cae2pipe.shard(str(photos), str(tmp_path / "shards"), overrides={"samples": 70}, workers=0, **QUIET)
    assert repr(shards) == f"ShardSet({str(tmp_path / 'shards')!r}: 150 images, 3 classes, 3 tars)"

    config = extract_settings()
    targets = cae2pipe.extract_targets(
        str(shards.root), str(tmp_path / "targets"), config=config, overrides={"view.size": 32}, views=1, **QUIET
    )
    assert len(targets) == targets.images == 150
    assert "150 views of 150 images" in repr(targets)
    assert targets[0].tokens.shape == (targets.teacher.tokens, targets.teacher.dim)

    coarse = cae2pipe.recode(targets.root, tmp_path / "coarse", fidelity=0.9, lossy_source=True, workers=0, **QUIET)
    assert coarse.fidelity()["mean"] < targets.fidelity()["mean"]

    report = Silent()
    run = cae2pipe.pretrain(
        str(targets.root), str(tmp_path / "run"), config=pretrain_settings(), epochs=2, progress=report
    )
    assert run.finished
    assert run.settings.epochs == 2
    assert "finished" in repr(run)
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert any("encoder.safetensors" in line for line in report.lines)
    tokens = run.encoder().forward_features(torch.zeros(1, 3, 32, 32))
    frozen = cae2pipe.load_encoder(str(run.path), device="cpu")
    assert frozen.tokens(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).together().shape == tokens.shape

    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(photos)
    options = {"overrides": ["k=[1]"], "workers": 0, "device": "cpu"}
    score = cae2pipe.evaluate("knn", run.path, str(data), out=str(tmp_path / "scores"), **options, **QUIET)
    assert score.top1 == score.result["top1"] == 1.0
    assert repr(score).startswith("Score(knn of run: top1=1.0000")
    assert (score.path / "result.json").is_file()
    with pytest.raises(AttributeError, match="no score 'miou'"):
        _ = score.miou

    page = cae2pipe.report([str(run.path)], out=str(tmp_path / "report"), scores=[tmp_path / "scores"], **QUIET)
    assert page.page.is_file()
    assert page.table()[0]["knn"] == "100.0"

    outcome = cae2pipe.verify(str(targets.root), **QUIET)
    assert outcome.problems == []
    assert cae2pipe.inspect(str(run.path))["kind"] == "run"
    exported = cae2pipe.export(str(run.path), str(tmp_path / "exported"), scores=[str(tmp_path / "scores")])
    assert all(path.is_file() for path in exported)


def test_a_page_about_a_target_set(tmp_path, target_root, teacher_file):
    options = {"source": str(target_root / "shards"), "live": 4, "teacher_weights": str(teacher_file), "device": "cpu"}
    shown = cae2pipe.report_targets(cae2pipe.TargetSet(target_root), out=str(tmp_path / "a"), **options, **QUIET)
    assert shown.page == tmp_path / "a" / "report.html"
    assert "The teacher on 4 stored views" in shown.page.read_text()
    assert shown.problems == ()

    damaged = Path(shutil.copytree(target_root, tmp_path / "damaged"))
    lost = damaged / "latents" / "v01" / "000002.zarr" / "patches/norms/c/0/0"
    lost.unlink()
    (problem,) = cae2pipe.report_targets(str(damaged), out=tmp_path / "b", **QUIET).problems
    assert problem == f"{lost}: a file that the manifest lists is missing"


def test_a_damaged_file_is_found_and_made_again(tmp_path, photos):
    (shards,) = cae2pipe.shard(photos, tmp_path / "shards", workers=0, **QUIET)
    tar = shards.shards[0].path
    tar.write_bytes(tar.read_bytes()[:-512])
    outcome = cae2pipe.verify(shards.root, **QUIET)
    assert len(outcome.problems) == 1
    assert cae2pipe.repair(outcome, source=str(photos), workers=0, **QUIET).problems == []


def test_a_run_that_has_no_encoder_says_so(tmp_path, target_root, pretrain_settings):
    run = cae2pipe.pretrain(
        target_root, tmp_path / "run", config=pretrain_settings(), overrides={"stop_after": 1}, **QUIET
    )
    assert not run.finished
    assert "unfinished, 1 steps" in repr(run)
    with pytest.raises(ManifestError, match="no encoder yet"):
        run.encoder()


def test_a_set_with_only_a_calibration_is_none(tmp_path, photos, extract_settings):
    out = tmp_path / "set"
    assert cae2pipe.extract_targets(photos, out, config=extract_settings(), calibrate_only=True, **QUIET) is None
    assert cae2pipe.extract_targets(photos, out, config=extract_settings(), **QUIET).views == 2


def test_overrides_have_three_forms(tmp_path):
    forms = [
        {"optimizer.lr": 1e-3, "mask": {"ratio": 0.4}},
        {"optimizer": {"lr": 1e-3}, "mask.ratio": 0.4},
        ["optimizer.lr=1e-3", "mask.ratio=0.4"],
    ]
    first, *others = [cae2pipe.settings("pretrain", "small", form) for form in forms]
    assert isinstance(first, PretrainSettings)
    assert first.optimizer.lr == 1e-3
    assert all(other == first for other in others)
    assert "small" in cae2pipe.presets("pretrain")
    file = tmp_path / "mine.yaml"
    file.write_text("extends: small\nepochs: 70\n")
    assert cae2pipe.settings("pretrain", file, {"mask.ratio": 0.4}).epochs == 70
    assert nested({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cae2pipe.settings("pretrian", "base"), "unknown stage 'pretrian'"),
        (lambda: cae2pipe.presets("train"), "unknown stage 'train'"),
        (lambda: cae2pipe.settings("pretrain", "bsae"), "unknown pretrain preset 'bsae'"),
        (lambda: cae2pipe.settings("pretrain", "base", {"optimiser.lr": 1}), "unknown setting 'optimiser'"),
        (lambda: cae2pipe.settings("pretrain", "base", {"optimizer..lr": 1}), "is not the name of a setting"),
        (lambda: cae2pipe.settings("pretrain", "base", {3: 1}), "is not the name of a setting"),
        (lambda: cae2pipe.settings("pretrain", "base", "optimizer.lr=1"), "is a single string"),
        (lambda: cae2pipe.evaluate("knm", "e", "d", out="o"), "no evaluation 'knm'"),
        (
            lambda: cae2pipe.pretrain("t", "o", config=cae2pipe.settings("shard", "default"), progress=False),
            "expected PretrainSettings, got ShardSettings",
        ),
        (lambda: cae2pipe.extract_targets("s", "o", part="3-8"), "3-8"),
        (lambda: cae2pipe.Run("nowhere"), "no such folder"),
        (lambda: cae2pipe.TargetSet("nowhere"), "no such folder"),
    ],
)
def test_mistakes_are_told_in_words(call, words):
    with pytest.raises((SettingsError, BadInputError, ManifestError), match=words) as caught:
        call()
    assert caught.value.fix or "unknown" in words


def test_arrays_of_a_set_are_read_by_index(target_root):
    targets = cae2pipe.TargetSet(str(target_root), "torch")
    assert isinstance(targets[-1].tokens, torch.Tensor)
    assert isinstance(cae2pipe.TargetSet(Path(target_root))[0].tokens, np.ndarray)


def test_a_single_path_need_not_be_in_a_list(trained_run, tmp_path):
    run = cae2pipe.Run(trained_run())
    page = cae2pipe.report(run, out=tmp_path / "report", progress=None)
    assert len(page.table()) == 1
    with pytest.raises(SettingsError, match="no run is given"):
        cae2pipe.report([], out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_functions_return_is_taken_by_others(target_root, trained_run):
    assert cae2pipe.verify(cae2pipe.TargetSet(target_root), **QUIET).problems == []
    assert cae2pipe.load_encoder(cae2pipe.Run(trained_run()), device="cpu").image_size == 32


def test_an_interval_of_probes_counts_those_of_the_settings(target_root, pretrain_settings, tmp_path):
    with pytest.raises(SettingsError, match="nothing to measure"):
        cae2pipe.pretrain(target_root, tmp_path / "run", config=pretrain_settings(), every=1, **QUIET)
    with pytest.raises(BadInputError, match="nowhere"):
        cae2pipe.pretrain(
            target_root,
            tmp_path / "run",
            config=pretrain_settings(),
            every=1,
            overrides={"probe.images": str(tmp_path / "nowhere")},
            **QUIET,
        )


@pytest.mark.parametrize(("name", "builder"), [("caev2", dict), ("", dict), ("mine", 3)])
def test_methods_that_cannot_be_registered(name, builder):
    with pytest.raises(SettingsError):
        cae2pipe.register_method(name, builder)


def test_a_negative_number_of_live_views(target_root, tmp_path):
    with pytest.raises(SettingsError, match="-1 stored views"):
        cae2pipe.report_targets(target_root, out=tmp_path / "page", live=-1, **QUIET)


LOSING = """
import sys, cae2pipe
{before}
cae2pipe.verify(sys.argv[1])
print("verified")
"""


@pytest.mark.parametrize("before", ["sys.stderr = open('/dev/full', 'w')", "sys.stderr = None"])
def test_a_log_that_cannot_be_written_does_not_end_the_work(before, target_root):
    code = LOSING.format(before=before)
    result = subprocess.run([sys.executable, "-c", code, str(target_root)], capture_output=True, text=True, check=False)
    assert result.stdout == "verified\n", result.stderr


def test_a_script_without_a_main_guard_is_told_of_it(photos, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import cae2pipe\ncae2pipe.shard({str(photos)!r}, {str(tmp_path / 'out')!r}, workers=1)\n")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'below `if __name__ == "__main__":`' in result.stderr
    assert "LockedError" not in result.stderr
