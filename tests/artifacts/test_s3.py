"""The whole pipeline on an object store, including failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from cae2pipe.artifacts import retries, transfer
from cae2pipe.artifacts.lock import can_lock, writing
from cae2pipe.artifacts.storage import file_sizes, put_bytes, read_bytes, remove, to_path
from cae2pipe.artifacts.work_share import WorkShare
from cae2pipe.errors import BadInputError, DamageError, LockedError, StorageError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.stages.copy_set import copy_set
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.pretrain import pretrain
from cae2pipe.stages.verify import verify
from tests.artifacts.conftest import BUSY, FORBIDDEN
from tests.conftest import contents


def remote_contents(root: Path) -> dict[str, bytes]:
    return {name: read_bytes(root / name) for name in file_sizes(root) if not name.startswith(".locks")}


def test_shard_extract_pretrain_and_verify(
    bucket, photos, target_root, tmp_path, extract_settings, pretrain_settings
) -> None:
    settings = extract_settings()
    shards = build_shard_set(photos, to_path(f"{bucket}/shards"), settings.shard, report=Silent())
    assert remote_contents(shards.root) == contents(target_root / "shards")
    out = to_path(f"{bucket}/targets")
    extract_targets(shards.root, out, settings, report=Silent())
    local = {name: data for name, data in contents(target_root).items() if not name.startswith("shards/")}
    assert remote_contents(out) == local, "the same bytes as on a disk"
    report = Silent()
    extract_targets(shards.root, out, settings, report=report)
    assert any("nothing to do" in line for line in report.lines)
    assert not verify(out, Silent()).problems
    run = pretrain_settings(stop_after=1)
    pretrain(out, tmp_path / "run", run, report=Silent())
    pretrain(target_root, tmp_path / "local", run, report=Silent())
    assert [p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_file()] == [
        p.read_bytes() for p in (tmp_path / "local" / "checkpoints").iterdir() if p.is_file()
    ]


def test_a_set_is_copied_there_and_back(bucket, target_root, tmp_path, monkeypatch, moods) -> None:
    shards_root = target_root / "shards"
    monkeypatch.setattr(transfer, "PIECE", 50_000)  # so that some files count as large
    there, back = to_path(f"{bucket}/set"), tmp_path / "back"
    moods.extend([BUSY] * 2)
    assert copy_set(shards_root, there, report=Silent(), workers=2).complete
    assert moods == []
    assert remote_contents(there) == contents(shards_root)
    assert file_sizes(there / ".locks") == {}
    assert copy_set(there, to_path(f"{bucket}/other"), report=Silent(), workers=2).complete
    assert remote_contents(to_path(f"{bucket}/other")) == contents(shards_root)
    copy_set(there, back, report=Silent(), workers=2)
    assert contents(back) == contents(shards_root)
    remove([there / "tars/000001.tar"])
    with pytest.raises(DamageError, match="is missing"):
        copy_set(there, tmp_path / "again", report=Silent(), workers=2)
    assert copy_set(back, there, report=Silent()).brought == 1


def test_a_source_on_an_object_store(bucket, photos, tmp_path, extract_settings) -> None:
    source = to_path(f"{bucket}/photos")
    for name, data in contents(photos).items():
        put_bytes(source / name, data)
    settings = extract_settings().shard
    alone = build_shard_set(photos, tmp_path / "local", settings, report=Silent())
    assert contents(build_shard_set(source, tmp_path / "remote", settings, report=Silent()).root) == contents(
        alone.root
    )
    put_bytes(source / "class0" / "empty.jpg", b"")
    grown = build_shard_set(source, tmp_path / "remote", settings, report=Silent())
    assert grown.images == alone.images
    assert b"class0/empty.jpg" in (grown.root / "rejects.jsonl").read_bytes()


def test_lost_and_changed_objects_are_found_and_made_again(bucket, photos, tmp_path, extract_settings) -> None:
    settings = extract_settings(views=1)
    shards = build_shard_set(photos, tmp_path / "shards", settings.shard, report=Silent())
    out = to_path(f"{bucket}/targets")
    extract_targets(shards.root, out, settings, report=Silent())
    before = remote_contents(out)
    lost, flipped = "images/000001.tar", "latents/v00/000002.zarr/patches/symbols/c/0/0/0/0"
    remove([out / lost])
    put_bytes(out / flipped, bytes([before[flipped][0] ^ 1]) + before[flipped][1:])
    problems = verify(out, Silent()).problems
    assert {type(problem) for problem in problems} == {DamageError}
    assert sorted(problem.where.removeprefix(f"{out}/") for problem in problems) == sorted([lost, flipped])
    remove([out / flipped])
    extract_targets(shards.root, out, settings, report=Silent())
    assert remote_contents(out) == before


def test_parts_exclude_each_other_on_an_object_store(bucket) -> None:
    root = to_path(f"{bucket}/set")
    assert can_lock(root)
    with writing(root, WorkShare(1, 2)):
        with writing(root, WorkShare(2, 2)):
            pass
        with pytest.raises(LockedError, match="part 1/2"), writing(root, WorkShare(3, 4)):
            pass
    assert file_sizes(root) == {}


def test_a_server_that_is_busy_for_a_moment_is_asked_again(bucket, moods) -> None:
    path = to_path(f"{bucket}/file")
    put_bytes(path, b"content")
    moods.append(BUSY)
    assert read_bytes(path) == b"content"
    assert moods == [], "the answer was given"


def test_a_server_that_stays_busy_is_explained(bucket, moods, monkeypatch) -> None:
    monkeypatch.setattr(retries, "WAITS", ())
    path = to_path(f"{bucket}/file")
    put_bytes(path, b"content")
    monkeypatch.setattr(path.fs, "retries", 1)
    moods.extend([BUSY] * 40)
    with pytest.raises(StorageError, match="did not answer in 1 tries") as caught:
        read_bytes(path)
    moods.clear()
    assert str(path) in str(caught.value)
    assert "same command" in caught.value.fix


def test_wrong_credentials_are_explained(bucket, photos, extract_settings, moods) -> None:
    moods.extend([FORBIDDEN] * 40)
    with pytest.raises(BadInputError, match="refuses access") as caught:
        extract_targets(to_path(f"{bucket}/shards"), to_path(f"{bucket}/out"), extract_settings(), report=Silent())
    moods.clear()
    assert "AWS_PROFILE" in caught.value.fix
