"""Artifacts: complete or absent, journal equivalent to manifest, errors name the mismatch."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import pytest

from cae2pipe.artifacts.artifact import MANIFEST, ShardsArtifact, check_files, is_artifact, open_artifact
from cae2pipe.artifacts.atomic import remove_debris, replacing, temporary_path, write_json
from cae2pipe.artifacts.difference import first_difference
from cae2pipe.artifacts.digest import canonical_json, file_entry, fingerprint
from cae2pipe.artifacts.lock import writing
from cae2pipe.artifacts.manifest import encode_manifest
from cae2pipe.errors import BadInputError, DamageError, LockedError, ManifestError, MismatchError
from tests.conftest import snapshot


def make(root, **settings):
    identity = {"settings": settings, "classes": ["a"]}
    return ShardsArtifact.open_or_create(root, identity, facts={"rejected": 0}, fix="elsewhere")


def add(artifact, name, content=b"x" * 2048):
    (artifact.root / "tars").mkdir(exist_ok=True)
    files = [f"tars/{name}.tar", f"tars/{name}.json"]
    for path in files:
        (artifact.root / path).write_bytes(content)
    entries = {path: file_entry(artifact.root / path) for path in files}
    artifact.add(name, {"files": entries, "samples": 1, "rejected": []})


def test_units_are_the_same_from_journal_and_from_manifest(tmp_path):
    artifact = make(tmp_path / "artifact", seed=1)
    add(artifact, "000000")
    add(artifact, "000001")
    from_journal = open_artifact(artifact.root)
    assert not from_journal.complete
    artifact.save(complete=True)
    assert not (artifact.root / "journal").exists()
    from_manifest = ShardsArtifact.open(artifact.root)
    assert from_manifest.units == from_journal.units
    assert from_manifest.complete
    assert from_manifest.facts == {"rejected": 0}


def test_saving_twice_writes_once(tmp_path):
    artifact = make(tmp_path / "artifact", seed=1)
    artifact.save(complete=True)
    before = (artifact.root / MANIFEST).stat().st_mtime_ns
    open_artifact(artifact.root).save(complete=True)
    assert (artifact.root / MANIFEST).stat().st_mtime_ns == before


def test_another_identity_is_refused_and_the_field_named(tmp_path):
    make(tmp_path / "artifact", seed=1, samples=3)
    with pytest.raises(MismatchError, match=r"settings\.seed = 1, and 2") as caught:
        make(tmp_path / "artifact", seed=2, samples=3)
    assert caught.value.fix == "elsewhere"


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ManifestError, match="not empty"):
        make(tmp_path)
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        open_artifact(tmp_path)
    with pytest.raises(ManifestError, match="no such folder"):
        open_artifact(tmp_path / "none")
    assert not is_artifact(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 3}, ManifestError, "has format 3, and this version of cae2pipe reads format 2"),
        ({"format": "2"}, ManifestError, "has format '2', and this version"),
        ({"kind": "shard"}, ManifestError, "kind: 'shard' is unknown to this version"),
        ({"kind": ["shards"]}, ManifestError, "kind: .'shards'. is unknown"),
        ({"identity": {"settings": {"seed": 5}, "classes": []}}, DamageError, "does not match its fingerprint"),
        ({"complete": 1}, ManifestError, "complete: Input should be a valid boolean; got 1"),
        ({"rejected": 1}, DamageError, "has changed since it was written"),
        ({"digest": "0" * 64}, DamageError, "has changed since it was written"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, change, error, message):
    make(tmp_path / "artifact", seed=1)
    path = tmp_path / "artifact" / MANIFEST
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(error, match=message) as caught:
        ShardsArtifact.open(tmp_path / "artifact")
    assert caught.value.where == str(path)


def test_a_folder_of_another_kind(make_run):
    run = make_run()
    with pytest.raises(ManifestError, match="folder of kind 'run', expected 'shards'") as caught:
        ShardsArtifact.open(run)
    assert caught.value.fix == "give a folder made by `cae2pipe shard`"
    assert not is_artifact(run, "shards")


def test_the_folder_above_an_artifact(tmp_path):
    make(tmp_path / "shards" / "train", seed=1)
    with pytest.raises(ManifestError, match="folders inside it have one") as caught:
        open_artifact(tmp_path / "shards")
    assert str(tmp_path / "shards" / "train") in caught.value.fix


def test_a_manifest_is_damaged_and_no_other_folder(tmp_path):
    """A damaged shard set must not be mistaken for a folder of images."""
    make(tmp_path / "artifact", seed=1)
    (tmp_path / "artifact" / MANIFEST).write_text("{")
    with pytest.raises(ManifestError, match="not valid JSON"):
        is_artifact(tmp_path / "artifact")
    (tmp_path / "artifact" / MANIFEST).write_text('{"name": "app"}')
    assert not is_artifact(tmp_path / "artifact")


@pytest.mark.parametrize("how", ["a bit", "a line", "the digest", "a name", "another unit's"])
def test_what_a_journal_says_is_checked_like_a_manifest(tmp_path, how):
    artifact = make(tmp_path / "artifact", seed=1)
    add(artifact, "000000")
    path = artifact.root / "journal" / "000000.json"
    text = path.read_text()
    if how == "a bit":
        path.write_text(text.replace('"samples": 1', '"samples": 0'))
    elif how == "a line":
        path.write_text(text.replace('"samples": 1', '"samplex": 1'))
    elif how == "the digest":
        path.write_text("".join(line for line in text.splitlines(keepends=True) if "digest" not in line))
    elif how == "a name":
        path.rename(path.with_name("..000000.json")).rename(path.with_name("a000000.json"))
    else:
        path.rename(path.with_name("000001.json"))
    with pytest.raises((ManifestError, DamageError)) as caught:
        open_artifact(artifact.root)
    assert str(artifact.root / "journal") in caught.value.where


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("../../x", {}),
        ("000000", {"files": {"../victim.tar": {"bytes": 1, "sha256": "0" * 64}}}),
        ("000000", {"files": {"tars/000001.tar": {"bytes": 1, "sha256": "0" * 64}}}),
        ("000000", {"samples": -1}),
        ("000000", {"samples": 1.5}),
        ("000000", {"more": 1}),
    ],
)
def test_nothing_is_written_that_would_not_be_read(tmp_path, name, change):
    artifact = make(tmp_path / "artifact", seed=1)
    add(artifact, "000000")
    unit = {**artifact.units["000000"], **change}
    before = snapshot(tmp_path)
    with pytest.raises((ManifestError, BadInputError)):
        artifact.add(name, unit)
    artifact.units[name] = unit
    with pytest.raises(ManifestError):
        encode_manifest(artifact.kind, artifact.format, artifact.manifest(), where=artifact.root)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"some": "json"}'])
def test_broken_manifests(tmp_path, text):
    make(tmp_path / "artifact", seed=1)
    (tmp_path / "artifact" / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ManifestError):
        open_artifact(tmp_path / "artifact")


def test_damage_is_found(tmp_path):
    artifact = make(tmp_path / "artifact", seed=1)
    for name in ("000000", "000001", "000002", "000003"):
        add(artifact, name)
    (artifact.root / "tars/000000.tar").unlink()
    (artifact.root / "tars/000001.tar").write_bytes(b"dat")
    (artifact.root / "tars/000002.tar").write_bytes(b"x" * 2047 + b"y")
    problems = {problem.where.rsplit("/", 1)[1]: problem.what for problem in check_files(artifact)}
    assert "missing" in problems["000000.tar"]
    assert "3 bytes instead of 2048" in problems["000001.tar"]
    assert "SHA-256" in problems["000002.tar"]
    assert len(problems) == 3


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


def test_debris_of_a_killed_process_is_removed_and_nothing_of_others(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"")
    others = [root / "run", root / "latents" / "run"]
    for other in others:
        make(other, seed=1)
    others.append(root / "holiday")
    debris = [temporary_path(root / name) for name in ("a.tar", "latents/v00/b.zarr", "tars/link")]
    kept = [temporary_path(folder / "checkpoints" / "step.pt") for folder in others]
    for path in (*debris, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
    debris[0].write_bytes(b"half")
    (debris[1] / ".tmp-inner").mkdir(parents=True)
    debris[2].symlink_to(outside)
    for path in kept:
        path.write_bytes(b"half")
    assert sorted(remove_debris(root)) == sorted(debris)
    assert not any(path.exists() or path.is_symlink() for path in debris)
    assert all(path.exists() for path in (*kept, outside / "kept"))


def test_a_planted_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    temporary_path(tmp_path / "file").symlink_to(tmp_path / "victim")
    write_json(tmp_path / "file", 1)
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert (tmp_path / "file").read_bytes() == b"1\n"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("name", ["journal", "tars", ".locks", "shards", ".locks/part-1-of-1"])
def test_links_lead_no_writer_out_of_the_folder(tmp_path, name):
    artifact = make(tmp_path / "artifact", seed=1)
    link, outside = artifact.root / name, tmp_path / "outside"
    if link.is_dir():
        shutil.rmtree(link)
    outside.mkdir()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside if "/" not in name else outside / "new")
    with pytest.raises(BadInputError, match=r"symbolic link"), writing(artifact.root):
        pass
    assert list(outside.iterdir()) == []


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
