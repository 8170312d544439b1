"""The benchmark of the loader: in this process, without workers, on views of 32 pixels."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from benchmarks import feed, feed_child, tables
from cae2pipe.artifacts.artifact import TargetsArtifact, check_files
from cae2pipe.targets.target_set import TargetSet

SMALL = feed.Size(2, 64, 2, 0.001, 8, {"originals": 1, "memmap": 1}, 8, 1, size=32, rows=2, dim=8)


ONE_AT_A_TIME = threading.Lock()
"""Tasks replace the teacher of their process."""


def here():
    """A child process's tasks in this process, through JSON as there."""
    tasks = feed_child.tasks()

    def ask(do, **task):
        with ONE_AT_A_TIME:
            return json.loads(json.dumps(tasks[do](**json.loads(json.dumps(task)))))

    return ask


# webdataset leaves the tar open in which it is told to stop.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_all_loaders_are_measured_on_sets_of_repeated_views(photos, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(feed_child.time, "sleep", slept.append)
    monkeypatch.setattr(feed, "photographs", lambda *_: photos)
    names = (feed.OURS, feed.AGAINST, *feed.RIVALS.values())
    report = feed.measure({name: here() for name in names}, SMALL, [0], tmp_path)
    assert [row["loader"] for row in report.rows] == list(names)
    assert all(row[rate]["median"] > 0 for row in report.rows for rate in ("images/s per core", "images/s"))
    ours, against = report.rows[:2]
    # As many batches as a window has steps, since there is no time for more; for both checkouts.
    assert ours["batches"] == against["batches"] == 8
    assert len(slept) == 16
    assert [check["name"].split(",")[0] for check in report.checks] == [
        "images/s per core over against",
        "images/s per core over WebDataset + torchvision",
        "share of time waited at 0.9 of the rate",
        "slowest batch over the median",
    ]
    assert [profile["loader"] for profile in report.profiles] == [feed.OURS, feed.AGAINST]
    spent = dict(report.profiles[0])
    assert sum(value for name, value in spent.items() if name != "loader") == pytest.approx(
        1000 / ours["images/s per core"]["median"], abs=0.01
    )

    page = tmp_path / "feed-cpu.json"
    page.write_text(json.dumps({"rows": report.rows, "checks": report.checks}))
    lines = tables.feed(tmp_path).splitlines()
    assert lines[2].startswith(f"| {feed.OURS} | 0 | ")
    assert f" | {100 * ours['waited']:.1f}% | " in lines[2]
    assert lines[-1].startswith("| slowest batch over the median | ")

    # Two windows of two streams, all from one shard, of which the second has bytes of its own.
    assert report.sets[feed.OURS] == report.sets[feed.AGAINST]
    assert report.sets[feed.OURS]["views"] == 256
    root = tmp_path / "set-0"
    artifact = TargetsArtifact.open(root)
    assert check_files(artifact) == []
    targets = TargetSet(root)
    assert len(targets.stores) == 4
    first, second, third = ((root / targets.stores[name]["tar"]).stat() for name in sorted(targets.stores)[:3])
    assert first.st_ino == third.st_ino != second.st_ino
    # The same photographs and latents in both, whichever code makes them.
    other = TargetSet(tmp_path / "set-1")
    assert targets[70].key == other[70].key
    assert (targets[70].tokens == other[70].tokens).all()


def test_waits_count_as_the_student_has_them():
    row = feed.waiting([0.0, 0.0, 0.1, 0.5], 0.1)
    assert row["waited"] == pytest.approx(0.6)
    assert row["slowest / median"] == pytest.approx(0.6 / 0.15)


def test_claims_are_those_of_the_hardest_number_of_workers():
    cores = {
        (feed.OURS, 1): [10.0, 20.0, 30.0],
        (feed.OURS, 2): [10.0, 18.0, 30.0],
        (feed.AGAINST, 1): [5.0, 10.0, 15.0],
        (feed.AGAINST, 2): [5.0, 10.0, 20.0],
        (feed.RIVALS["originals"], 1): [1.0, 1.0, 1.0],
        (feed.RIVALS["originals"], 2): [9.0, 9.0, 9.0],
    }
    found = feed.claims(cores, {"waited": 0.0201, "slowest / median": 3.0})
    assert [(check["value"], check["ok"]) for check in found] == [
        (1.8, True),
        (2.0, False),
        (0.0201, False),
        (3.0, True),
    ]
    assert found[0]["name"].endswith("workers: 2")
    alone = {key: turns for key, turns in cores.items() if key[0] != feed.AGAINST}
    assert [check["name"] for check in feed.claims(alone, {"waited": 0, "slowest / median": 1})] == [
        check["name"] for check in found[1:]
    ]


def test_a_child_measures_the_checkout_it_was_given(tmp_path, capfd):
    package = tmp_path / "cae2pipe" / "__init__.py"
    with pytest.raises(SystemExit, match="is not a checkout of this project"):
        feed.Child(tmp_path)
    package.parent.mkdir()
    package.touch()
    with feed.Child(tmp_path) as child:
        assert child("where") == str(package)
        with pytest.raises(SystemExit, match="ended with 1 at 'make'"):
            child("make", source="", out="", shape={}, samples=1, copied=1, shards=1)
    assert "No module named 'cae2pipe.config'" in capfd.readouterr().err


def test_time_on_a_core_is_that_of_all_processes():
    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began, before = feed_child.busy_seconds(), children()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    ended, after = feed_child.busy_seconds(), children()
    assert after - before > 0.02
    # In ticks of 10 ms; this process has worked too.
    assert ended - began >= after - before - 0.03


def test_a_gpu_waits_for_batches_that_come_after_it_is_done(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def spend(seconds):
        clock.now += seconds

    def loader(*_, **__):
        for seconds in (9, 1, 3, 6, 1, 1):  # until each batch comes, from when it is asked for
            spend(seconds)
            yield []

    monkeypatch.setattr(feed_child, "batches", loader)
    monkeypatch.setattr(feed_child, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=spend))
    # The fourth comes two seconds late, the others while the GPU works.
    assert feed_child.consume("", 0, {}, count=5, interval=4) == [0, 0, 2, 0, 0]
    assert clock.now == 9 + 4 + 4 + 6 + 4 + 4
