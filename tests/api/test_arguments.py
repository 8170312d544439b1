"""Arguments of the wrong type, and URLs where only local paths can be."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.artifacts.storage import to_path
from cae2pipe.artifacts.verification import Verification
from cae2pipe.cli import app
from cae2pipe.errors import BadInputError, ManifestError, SettingsError
from cae2pipe.runtime.progress import Silent

CALLED = {
    name: getattr(cae2pipe, name)
    for name in cae2pipe.__all__
    if inspect.isfunction(getattr(cae2pipe, name)) or name in ("Run", "TargetSet", "TargetBatches")
}
OTHERS = {"outcome": Verification(Path("x"), "run", files=0), "builder": dict}
QUIET = {"progress": False}
REMOTE = "memory://nowhere/x"


@pytest.mark.parametrize("name", CALLED)
def test_an_argument_of_the_wrong_type_is_named(name):
    function = CALLED[name]
    parameters = inspect.signature(function).parameters
    needed = {own.name: OTHERS.get(own.name, "x") for own in parameters.values() if own.default is own.empty}
    for wrong in parameters:
        with pytest.raises(SettingsError, match=f"^{wrong}=<object") as caught:
            function(**{**needed, wrong: object()})
        assert caught.value.where == name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cae2pipe.pretrain(None, "out"), r"targets=None is not a str, a path or a list"),
        (lambda: cae2pipe.TargetSet(3), "root=3 is not a path or a str"),
        (lambda: cae2pipe.TargetBatches("set", batch_size=2.5), "batch_size=2.5 is not a whole number"),
        (lambda: cae2pipe.TargetBatches("set", seed=True), "seed=True is not a whole number"),
        (lambda: cae2pipe.TargetBatches("set", layout="maps"), "layout='maps' is not 'map' or 'tokens'"),
        (lambda: cae2pipe.presets(None), "stage=None is not a str"),
        (lambda: cae2pipe.settings("pretrain", "base", 3), "overrides=3 is not a mapping, a list"),
        (lambda: cae2pipe.settings("pretrain", "base", [3]), r"overrides=\[3\] is not a mapping, a list"),
        (lambda: cae2pipe.extract_targets("source", "out", part=None), "part=None is not a str"),
        (lambda: cae2pipe.report(["run", 3]), r"runs=\['run', 3\] is not a str, a path or a list"),
        (lambda: cae2pipe.report(path for path in (3,)), "3 is not a path"),
        (lambda: cae2pipe.verify("set", progress="loud"), "progress='loud' is not True or False, a Report or None"),
    ],
)
def test_what_would_fit_is_told(call, words):
    with pytest.raises(BadInputError, match=words):
        call()


def test_numbers_of_numpy_and_other_paths_are_taken(target_root, trained_run):
    batches = cae2pipe.TargetBatches(cae2pipe.TargetSet(target_root), batch_size=np.int64(32), cache_gb=1)
    batches.set_epoch(np.int32(3))
    assert batches.batch_size == 32
    assert cae2pipe.load_encoder(trained_run(), device=torch.device("cpu")).image_size == 32
    assert cae2pipe.verify(target_root, progress=Silent()).problems == []


def test_a_set_of_a_remote_file_system_is_given_as_itself(target_root, trained_run):
    """Its ``__fspath__`` is a URL."""
    for path in sorted(target_root.rglob("*")):
        if path.is_file():
            to_path(f"memory://given/{path.relative_to(target_root)}").write_bytes(path.read_bytes())
    targets = cae2pipe.TargetSet("memory://given")
    assert cae2pipe.verify(targets, **QUIET).problems == []
    over = {"probe.targets": to_path("memory://given")}
    assert cae2pipe.settings("pretrain", "base", over).probe.targets.startswith("memory://")


@pytest.mark.parametrize("name", ["plain", "with space", "per%cent"])
def test_a_file_url_is_a_local_path(tmp_path, name):
    path = tmp_path / name
    assert to_path(path.as_uri()) == path
    assert to_path(path.as_uri().replace("file://", "FILE://localhost")) == path
    for url in ("file://host/x", "file://x", "file:///"[:-1]):
        with pytest.raises(BadInputError, match="names no local path"):
            to_path(url)


def test_folders_given_as_file_urls(target_root, trained_run, pretrain_settings, photos, tmp_path):
    run, out = trained_run(), tmp_path / "out"
    assert cae2pipe.Run(run.as_uri()).path == run
    made = cae2pipe.pretrain(target_root.as_uri(), out.as_uri(), config=pretrain_settings(stop_after=1), **QUIET)
    assert made.path == out
    assert len(made.metrics()) == 1
    page = cae2pipe.report(run.as_uri(), out=(tmp_path / "page").as_uri(), **QUIET).page
    assert page == tmp_path / "page" / "report.html"
    assert page.is_file()
    assert cae2pipe.load_encoder(run.as_uri(), device="cpu").image_size == 32
    over = {"probe.images": photos.as_uri(), "speed.cache": tmp_path.as_uri(), "originals": tmp_path}
    settings = cae2pipe.settings("pretrain", "base", over)
    assert (settings.probe.images, settings.speed.cache, settings.originals) == (photos, tmp_path, str(tmp_path))


def test_a_page_can_be_written_to_a_url(target_root, trained_run):
    assert "<html" in cae2pipe.report(trained_run(), out="memory://page/runs", **QUIET).page.read_text()
    assert "<html" in cae2pipe.report_targets(target_root, out="memory://page/set", **QUIET).page.read_text()


WRITTEN_LOCALLY = {
    "pretrain": lambda root: cae2pipe.pretrain(root, REMOTE, **QUIET),
    "evaluate": lambda root: cae2pipe.evaluate("knn", "random:tiny", root, out=REMOTE, **QUIET),
    "export": lambda root: cae2pipe.export("random:tiny", REMOTE),
    "compare": lambda root: cae2pipe.compare("table1", root, root, out=REMOTE, **QUIET),
}


@pytest.mark.parametrize("name", WRITTEN_LOCALLY)
def test_a_remote_folder_to_write_to_is_refused_where_only_local_ones_are_written(name, target_root):
    with pytest.raises(BadInputError, match="a local path is needed") as caught:
        WRITTEN_LOCALLY[name](target_root)
    assert caught.value.where == REMOTE
    assert "copy it to the URL" in caught.value.fix


@pytest.mark.parametrize(
    "call",
    [
        lambda: cae2pipe.Run(REMOTE),
        lambda: cae2pipe.load_encoder(REMOTE),
        lambda: cae2pipe.report([REMOTE]),
        lambda: cae2pipe.report("run", scores=REMOTE),
        lambda: cae2pipe.evaluate("knn", "random:tiny", REMOTE, out="out"),
        lambda: cae2pipe.settings("pretrain", "base", {"speed.cache": REMOTE}),
        lambda: cae2pipe.settings("pretrain", REMOTE + ".yaml"),
        lambda: cae2pipe.Run(to_path(REMOTE)),
    ],
)
def test_a_remote_folder_to_read_is_refused_where_only_local_ones_are_read(call):
    with pytest.raises(BadInputError, match="a local path is needed") as caught:
        call()
    assert caught.value.where.startswith("memory://nowhere/x")


@pytest.mark.parametrize(
    "command",
    [
        "pretrain SET memory://x",
        "evaluate knn random:tiny SET memory://x",
        "evaluate knn random:tiny memory://x OUT",
        "export random:tiny memory://x",
        "compare table1 SET SET memory://x",
        "results memory://x",
        "replay memory://x",
        "demo memory://x",
        "pretrain SET OUT --probe memory://x",
        "report RUN --scores memory://x",
    ],
)
def test_the_command_line_refuses_the_same(command, target_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"SET": str(target_root), "OUT": str(tmp_path / "out")}
    result = CliRunner().invoke(app, [words.get(word, word) for word in command.split()])
    assert result.exit_code == 2
    assert "a local path is needed" in " ".join(result.output.replace("│", "").split())
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("command", ["copy SET memory://x", "recode SET memory://x", "extract-targets SET memory://x"])
def test_the_command_line_writes_nothing_that_ends_with_it(command, target_root):
    result = CliRunner().invoke(app, [str(target_root) if word == "SET" else word for word in command.split()])
    assert result.exit_code == 2
    assert "is lost when the command ends" in " ".join(result.output.replace("│", "").split())


def test_no_run_at_a_file_url():
    with pytest.raises(ManifestError, match="no such folder"):
        cae2pipe.Run("file:///nowhere")
