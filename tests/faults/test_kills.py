"""After any interruption at any point, the same command makes what an uninterrupted run makes.

``make faults N=30`` tries more points than ``make test``.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cae2pipe.config.base import build
from cae2pipe.config.compare import GridSettings
from cae2pipe.config.evaluate import FinetuneSettings
from cae2pipe.config.pretrain import TrainSpeed
from cae2pipe.models.encoder import Encoder
from cae2pipe.models.export import export_encoder
from cae2pipe.runtime.keyed import keyed_uniforms
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.training.telemetry import MACHINE_METRICS
from tests.conftest import contents, write_photos
from tests.faults.victim import EXITS, FAULTS, Job, do, run
from tests.ranks import imported

POINTS = int(os.environ.get("CAE2PIPE_FAULTS", "1"))
"""Points tried of each kind of fault in each job."""

EVALUATED = {"device": "cpu", "checkpoint_minutes": 1e-9}
SPEED = {"device": "cpu", "keep_epochs": 1, "keep": 1}

DAMAGED = (
    "images/000001.tar",
    "latents/v00/000002.zarr/patches/symbols/c/0/0/0/0",
    "codec.zarr/patches/mean/c/0",
    "shards/tars/000000.tar",
)


@pytest.fixture(scope="module")
def victim() -> Callable[[Job, str, int], tuple[int | None, int]]:
    """Runs a job with a fault in a separate process; returns its exit code and the number of events."""

    def start(job: Job, fault: str, at: int) -> tuple[int | None, int]:
        counted = job.out.with_name("events")
        counted.unlink(missing_ok=True)
        process = imported().Process(target=run, args=(job, fault, at, counted))
        process.start()
        process.join()
        return process.exitcode, int(counted.read_text()) if counted.exists() else 0

    return start


@pytest.fixture(scope="module")
def jobs(
    photos, target_root, summary_root, extract_settings, pretrain_settings, second_file, tmp_path_factory
) -> dict[str, tuple[Job, Callable[[Path], None]]]:
    """Every job, with the function that prepares its output folder."""
    settings, second = extract_settings(), {"weights": str(second_file), "name": "second"}
    fp16 = tmp_path_factory.mktemp("fp16") / "set"
    extract_targets(photos, fp16, extract_settings(codec={"name": "fp16"}), report=Silent())
    few = tmp_path_factory.mktemp("few") / "photos"
    shutil.copytree(photos, few)
    for path in few.rglob("image00*.jpg"):
        path.unlink()

    def begun(out: Path) -> None:
        build_shard_set(few, out, settings.shard, report=Silent())

    def damaged(out: Path) -> None:
        shutil.copytree(target_root, out)
        for name in DAMAGED:
            data = bytearray((out / name).read_bytes())
            data[len(data) // 2] ^= 1
            (out / name).write_bytes(data)

    def first(out: Path) -> None:
        shutil.copytree(target_root, out)

    data = tmp_path_factory.mktemp("labelled")
    write_photos(data / "train", 3, each=6)
    write_photos(data / "val", 3, each=3, seed=1)
    export_encoder(Encoder(width=32, depth=2, heads=2, image_size=32, patch_size=8), data / "encoder")
    tuning = {"epochs": 2, "warmup_epochs": 0, "batch": 6, "chunk": 2, "speed": {**EVALUATED, "workers": 0}}

    compared = tmp_path_factory.mktemp("compared")
    for name, folder in (("fp16", fp16), ("data", data)):
        (compared / name).symlink_to(folder)
    student = pretrain_settings(epochs=1, optimizer={"warmup_epochs": 0}).model_dump(
        mode="json", exclude={"speed", "seed", "stop_after"}
    )
    grid = {
        "title": "Codecs",
        "config": "default",
        "set": student,
        "seeds": 0,
        "variants": [{"name": "klt", "codec": {"name": "klt", "fidelity": 0.9, "calibration": 64}}, {"name": "fp16"}],
        "evaluate": [{"kind": "knn", "set": {"k": 3}}],
    }

    return {
        "compare": (Job("compare", compared, Path(), build(GridSettings, grid, "test")), lambda out: None),
        "finetune": (Job("finetune", data, Path(), FinetuneSettings(**tuning)), lambda out: None),
        "extract": (Job("extract", photos, Path(), settings), lambda out: None),
        "add": (Job("add", photos, Path(), extract_settings(teacher=second)), first),
        "shard": (Job("shard", photos, Path(), settings), begun),
        "copy": (Job("copy", target_root, Path(), settings), lambda out: None),
        "recode": (Job("recode", fp16, Path(), settings), lambda out: None),
        "repair": (Job("repair", photos, Path(), settings), damaged),
        "pretrain": (Job("pretrain", target_root, Path(), pretrain_settings(speed=SPEED)), lambda out: None),
        "two teachers": (
            Job(
                "pretrain",
                target_root,
                Path(),
                pretrain_settings(speed=SPEED, loss={"drop_teachers": 0.5}),
                more=(summary_root,),
            ),
            lambda out: None,
        ),
    }


def left_by(job: Job) -> dict[str, bytes]:
    """The outputs of a job. For a training run without checkpoints, which depend on where it was stopped, and without
    measured times."""
    files = contents(job.out)
    if job.name == "finetune":
        files.pop("finetune/metrics.jsonl")
    if job.name == "compare":
        # Pages and metrics contain measured times.
        clocked = ("reports/", "metrics.jsonl", "/checkpoints/")
        files = {name: data for name, data in files.items() if not any(part in name for part in clocked)}
    if job.name == "pretrain":
        files = {name: data for name, data in files.items() if not name.startswith("checkpoints/")}
        lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
        kept = [{name: value for name, value in line.items() if name not in MACHINE_METRICS} for line in lines]
        files["metrics.jsonl"] = json.dumps(kept).encode()
    return files


@pytest.fixture(scope="module")
def undisturbed(victim, jobs, tmp_path_factory) -> Callable[[str], tuple[int, dict[str, bytes]]]:
    """The number of events of a job without a fault, and its outputs."""
    known: dict[str, tuple[int, dict[str, bytes]]] = {}

    def find(name: str) -> tuple[int, dict[str, bytes]]:
        if name not in known:
            job, prepare = jobs[name]
            job = replace(job, out=tmp_path_factory.mktemp(name) / "set")
            prepare(job.out)
            code, events = victim(job, "SIGKILL", -1)
            assert code == 0
            known[name] = events, left_by(job)
        return known[name]

    return find


NAMES = ("extract", "shard", "copy", "recode", "repair", "pretrain", "finetune", "compare")
CASES = [*itertools.product(NAMES, FAULTS), ("two teachers", "SIGKILL")]
if POINTS > 1:  # adding a teacher is an extraction, which is tried anyway
    CASES += itertools.product(["add"], FAULTS)


@pytest.mark.parametrize("point", range(POINTS))
@pytest.mark.parametrize(("name", "fault"), CASES)
def test_the_same_command_goes_on_to_the_same_bytes(victim, jobs, undisturbed, tmp_path, name, fault, point) -> None:
    events, expected = undisturbed(name)
    at = 1 + int(keyed_uniforms(1, "fault", name, fault, point)[0] * events)
    job, prepare = jobs[name]
    job = replace(job, out=tmp_path / "set")
    prepare(job.out)
    code, _ = victim(job, fault, at)
    assert code == EXITS[fault], f"{fault} at event {at} of {events}"
    if job.name == "pretrain":  # with another number of workers, which is allowed
        job = replace(job, settings=job.settings.model_copy(update={"speed": TrainSpeed(**SPEED, workers=point % 2)}))
    do(job)
    assert left_by(job) == expected, f"{fault} at event {at} of {events}"


def test_undisturbed_runs_are_the_sets_of_other_tests(undisturbed, target_root):
    for name in ("extract", "copy", "repair"):
        assert undisturbed(name)[1] == contents(target_root)


def test_killed_again_and_again_it_still_arrives(victim, jobs, undisturbed, tmp_path):
    events, expected = undisturbed("extract")
    job = replace(jobs["extract"][0], out=tmp_path / "set")
    for turn in range(3):
        code, _ = victim(job, "SIGKILL", events // 5 + turn)
        assert code == EXITS["SIGKILL"]
    do(job)
    assert contents(job.out) == expected
