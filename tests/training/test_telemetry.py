import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.training.metrics import read_lines
from cae2pipe.training.telemetry import MACHINE_METRICS, TensorBoard, Wandb, wandb_id


class Watching(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.fields: list[dict[str, float]] = []

    def advance(self, n: int = 1, /, **fields: float) -> None:
        self.fields.append(fields)


def test_a_line_and_a_panel_a_step(target_root, pretrain_settings, tmp_path):
    report = Watching()
    pretrain(target_root, tmp_path / "run", pretrain_settings(speed={"peak_tflops": 0.001}), report=report)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(10))
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_visible"] + line["loss_masked"], rel=1e-5)
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["mfu"] > 0
        assert line["memory_gb"] > 0
        assert set(MACHINE_METRICS) <= line.keys()
    assert lines[-1]["left_s"] == 0 < lines[0]["left_s"]
    assert len(report.fields) == 10
    assert report.fields[3]["loss"] == lines[3]["loss"]
    assert {"visible", "masked", "cos_masked", "lr", "grad_norm", "images_per_s", "data_wait", "mfu"} <= report.fields[
        0
    ].keys()


def test_several_masks_count_as_images(target_root, pretrain_settings, tmp_path):
    pretrain(target_root, tmp_path / "run", pretrain_settings(mask={"repeat": 4}, epochs=2), report=Silent())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 * 19  # 150 images, 8 per step
    assert sum(line["images"] for line in lines) == 2 * 4 * 150


def test_tensorboard_holds_every_step_once_after_a_resumption(target_root, pretrain_settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    track = {"track": ["tensorboard"]}
    pretrain(target_root, out, pretrain_settings(stop_after=4, **track), report=Silent())
    pretrain(target_root, out, pretrain_settings(**track), report=Silent())
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = read_lines(out / "metrics.jsonl")
    found = events.Scalars("loss")
    assert [event.step for event in found] == list(range(10))
    assert [event.value for event in found] == pytest.approx([line["loss"] for line in lines])


def wandb_records(path: Path) -> list[Any]:
    """wandb's records of an offline run: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, block, records, pending = path.read_bytes(), 7, 32768, [], b""
    while place + 7 <= len(data):
        if block - place % block < 7:  # too little for a header: padded
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pending += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(pending))
            pending = b""
    return records


def test_wandb_resumes_the_same_run(target_root, pretrain_settings, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    pretrain(target_root, out, pretrain_settings(stop_after=2, track=["wandb"]), report=Silent())
    # As in a new process: its service confuses two runs of the same name that start within a second.
    wandb.teardown()
    (out / "wandb").rename(out / "first")
    pretrain(target_root, out, pretrain_settings(stop_after=3, track=["wandb"]), report=Silent())
    wandb.teardown()
    files = [path for folder in ("first", "wandb") for path in (out / folder).glob("offline-run-*/run-*.wandb")]
    assert len(files) == 2
    records = [record for path in files for record in wandb_records(path)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {(out / "wandb-id.txt").read_text().strip()}
    assert {item.key: item.value_json for item in runs[0].config.update}["epochs"] == "2"
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(line["_step"], line["loss"]) for line in lines] == [
        (line["step"], line["loss"]) for line in read_lines(out / "metrics.jsonl")
    ]


def test_a_probe_of_the_step_before_a_resumed_run_reaches_wandb(pretrain_settings, tmp_path, monkeypatch):
    """wandb drops what is logged for a step before the one at which it resumes."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = Wandb(tmp_path, pretrain_settings(), start=4)
    tracker.write({"step": 3, "probe/knn_top1": 0.5})
    for step in (4, 5):
        tracker.write({"step": step, "loss": float(step)})
    tracker.close()
    wandb.teardown()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]
    told = [{name: line[name] for name in ("_step", "probe/knn_top1", "loss") if name in line} for line in lines]
    assert told == [{"_step": 4, "probe/knn_top1": 0.5, "loss": 4.0}, {"_step": 5, "loss": 5.0}]


def test_a_probe_of_the_step_before_a_resumed_run_reaches_tensorboard(pretrain_settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, pretrain_settings(), start=0)
    for step in range(6):
        first.write({"step": step, "loss": 1.0})
    first.close()
    resumed = TensorBoard(tmp_path, pretrain_settings(), start=4)
    resumed.write({"step": 3, "probe/knn_top1": 0.5})
    resumed.write({"step": 4, "loss": 2.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("probe/knn_top1")] == [(3, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [*((n, 1.0) for n in range(4)), (4, 2.0)]


def test_an_id_of_wandb_that_is_none(tmp_path):
    assert wandb_id(tmp_path / "id.txt") == wandb_id(tmp_path / "id.txt")
    (tmp_path / "id.txt").write_text("../x")
    with pytest.raises(SettingsError, match="not contain a wandb run id"):
        wandb_id(tmp_path / "id.txt")


def test_a_tracker_that_is_not_installed_is_named_before_the_run_is_begun(
    tmp_path, target_root, pretrain_settings, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match="wandb is not installed") as caught:
        pretrain(target_root, tmp_path / "run", pretrain_settings(track=["wandb"]), report=Silent())
    assert "pip install wandb" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_step_is_told_when_the_next_has_begun_where_work_runs_ahead(
    target_root, pretrain_settings, tmp_path, monkeypatch
):
    """With an asynchronous device: the same lines, checkpoints and weights."""
    from cae2pipe.training import step_loop

    pretrain(target_root, tmp_path / "plain", pretrain_settings(), report=Silent())
    monkeypatch.setattr(step_loop, "runs_ahead", lambda device: True)
    settings = pretrain_settings(speed={"keep_epochs": 1})
    pretrain(target_root, tmp_path / "ahead", pretrain_settings(stop_after=7), report=Silent())
    pretrain(target_root, tmp_path / "ahead", settings, report=Silent())
    plain, ahead = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("plain", "ahead"))
    assert [line["loss"] for line in ahead] == [line["loss"] for line in plain]
    one, two = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000010.pt", weights_only=True)["model"]
        for name in ("plain", "ahead")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
