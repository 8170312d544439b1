"""Boxes: whole or absent, journal as good as manifest, mismatches named."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from cae2pipe.artifacts.atomic import remove_debris, replacing, temporary_path, write_json
from cae2pipe.artifacts.box import MANIFEST, check_files, first_difference, is_box, open_box, open_or_create
from cae2pipe.artifacts.digest import canonical_json, file_entry, fingerprint
from cae2pipe.artifacts.lock import writing
from cae2pipe.errors import DamageError, LockedError, ManifestError, MismatchError


def make(root, **identity):
    return open_or_create(root, "shards", identity, {"classes": []}, fix="elsewhere")


def add(box, name, content=b"data"):
    (box.root / f"{name}.bin").write_bytes(content)
    box.add(name, {"files": {f"{name}.bin": file_entry(box.root / f"{name}.bin")}, "samples": 1})


def test_units_are_the_same_from_journal_and_from_manifest(tmp_path):
    box = make(tmp_path / "box", seed=1)
    add(box, "000000")
    add(box, "000001")
    from_journal = open_box(box.root)
    assert not from_journal.complete
    box.save(complete=True)
    assert not (box.root / "journal").exists()
    from_manifest = open_box(box.root, "shards")
    assert from_manifest.units == from_journal.units
    assert from_manifest.complete
    assert from_manifest.facts == {"classes": []}


def test_saving_twice_writes_once(tmp_path):
    box = make(tmp_path / "box", seed=1)
    box.save(complete=True)
    before = (box.root / MANIFEST).stat().st_mtime_ns
    open_box(box.root).save(complete=True)
    assert (box.root / MANIFEST).stat().st_mtime_ns == before


def test_another_identity_is_refused_and_the_field_named(tmp_path):
    make(tmp_path / "box", settings={"seed": 1, "samples": 3})
    with pytest.raises(MismatchError, match=r"settings\.seed = 1, and 2") as caught:
        make(tmp_path / "box", settings={"seed": 2, "samples": 3})
    assert caught.value.fix == "elsewhere"


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ManifestError, match="not empty"):
        make(tmp_path)
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        open_box(tmp_path)
    with pytest.raises(ManifestError, match="no such folder"):
        open_box(tmp_path / "none")
    assert not is_box(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, ManifestError, "has format 2, and this version of cae2pipe reads format 1"),
        ({"kind": "run"}, ManifestError, "holds 'run', and 'shards' is needed"),
        ({"identity": {"seed": 5}}, DamageError, "does not match its fingerprint"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, change, error, message):
    make(tmp_path / "box", seed=1)
    path = tmp_path / "box" / MANIFEST
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(error, match=message):
        open_box(tmp_path / "box", "shards")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"some": "json"}'])
def test_broken_manifests(tmp_path, text):
    make(tmp_path / "box", seed=1)
    (tmp_path / "box" / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ManifestError):
        open_box(tmp_path / "box")


def test_damage_is_found(tmp_path):
    box = make(tmp_path / "box", seed=1)
    for name in ("a", "b", "c", "d"):
        add(box, name)
    (box.root / "a.bin").unlink()
    (box.root / "b.bin").write_bytes(b"dat")
    (box.root / "c.bin").write_bytes(b"dxta")
    problems = {problem.where.rsplit("/", 1)[1]: problem.what for problem in check_files(box)}
    assert "missing" in problems["a.bin"]
    assert "3 bytes instead of 4" in problems["b.bin"]
    assert "SHA-256" in problems["c.bin"]
    assert "d.bin" not in problems


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_debris_of_a_killed_process_is_removed(tmp_path):
    debris = [temporary_path(tmp_path / "a.tar"), temporary_path(tmp_path / "sub/b.zarr")]
    debris[0].write_bytes(b"half")
    debris[1].mkdir(parents=True)
    (tmp_path / "kept.tar").write_bytes(b"")
    assert sorted(remove_debris(tmp_path)) == sorted(debris)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["kept.tar", "sub"]


def hold(root, held, release):
    with writing(root):
        held.set()
        release.wait(60)


def test_one_writer_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(LockedError, match="another process"), writing(tmp_path):
        pass
    release.set()
    other.join()
    with writing(tmp_path):
        pass


def test_first_difference_is_the_first_in_order():
    assert first_difference({"b": 1, "a": {"x": 1}}, {"b": 2, "a": {"x": 1}}) == ("b", 1, 2)
    assert first_difference({"a": {"x": 1}}, {"a": {"x": 1, "y": 2}}) == ("a.y", None, 2)
    assert first_difference({"a": (1, 2)}, {"a": [1, 2]}) is None


def test_fingerprints_do_not_depend_on_key_order():
    assert fingerprint({"a": 1, "b": [1, {"d": 2, "c": 3}]}) == fingerprint({"b": [1, {"c": 3, "d": 2}], "a": 1})
    assert canonical_json({"ü": 1}) == '{"\\u00fc":1}'
    with pytest.raises(ValueError, match="Out of range"):
        fingerprint({"a": float("nan")})
