"""Manifests of real stages, changed field by field: each is refused with file and field named, or harmless."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.artifacts.digest import fingerprint
from cae2pipe.artifacts.manifest import DIGESTED, decode_manifest, decode_unit, encode_unit, seal
from cae2pipe.artifacts.manifest_kinds import TARGETS
from cae2pipe.errors import DamageError, ManifestError

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1.5,
    float("1e300"),
    "",
    "x",
    "../../x",
    "/etc/passwd",
    [],
    {},
    [[]],
    {"a": 1},
]


@pytest.fixture(params=["targets", "stored", "shards", "run"])
def manifest(request: pytest.FixtureRequest) -> Any:
    if request.param == "run":
        root = request.getfixturevalue("make_run")()
    else:
        root = request.getfixturevalue("stored_root" if request.param == "stored" else "target_root")
    return json.loads((root / ("shards" if request.param == "shards" else ".") / "manifest.json").read_text())


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def changed(manifest: Any, path: tuple[Any, ...], pick: random.Random) -> Any:
    """The manifest with one field replaced, removed or renamed."""
    result = copy.deepcopy(manifest)
    holder = result
    for key in path[:-1]:
        holder = holder[key]
    how = pick.choice(["replaced", "removed", "renamed"])
    old = holder.pop(path[-1])
    if how == "replaced":
        value = pick.choice(VALUES)
        if isinstance(holder, dict):
            holder[path[-1]] = value
        else:
            holder.insert(path[-1], value)
    elif how == "renamed" and isinstance(holder, dict):
        holder[pick.choice([path[-1][:-1] + "q", "../" + path[-1], "000001", "v00/000001"])] = old
    return result


def test_every_change_is_found_and_the_file_named(manifest: Any) -> None:
    pick = random.Random(0)
    where = "OUT/manifest.json"
    for path in pick.choices(list(nodes(manifest)), k=100):
        after = changed(manifest, path, pick)
        data = json.dumps(after, allow_nan=False, indent=1, sort_keys=True).encode() + b"\n"
        if after == manifest:
            continue
        with pytest.raises((ManifestError, DamageError)) as caught:
            decode_manifest(data, where)
        assert caught.value.where == where


def test_whoever_makes_the_digests_fit_gets_no_path_past_the_door(manifest: Any) -> None:
    """Only our own errors; accepted manifests have the names, types and sizes of a folder of their kind."""
    pick = random.Random(1)
    refused = 0
    for path in pick.choices(list(nodes(manifest)), k=200):
        after = changed(manifest, path, pick)
        if isinstance(after.get("identity"), dict) and "fingerprint" in after:
            after["fingerprint"] = fingerprint(after["identity"])
        found = None
        with suppress(ManifestError, DamageError):
            found = decode_manifest(seal(after), "here")
        if found is None:
            refused += 1
            continue
        for name, unit in found["units"].items():
            assert re.fullmatch(r"[a-z0-9][a-z0-9/-]*", name)
            for file, entry in unit["files"].items():
                assert not file.startswith("/")
                assert ".." not in file
                assert entry["bytes"] >= 0
            assert unit.get("tar", "") in ("", *unit["files"], f"images/{unit.get('shard')}.tar")
        json.dumps({**found, "units": dict(found["units"])}, allow_nan=False)
    assert refused > 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"format": 3, "kind": "targets", "identity": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"format": 3, "kind": "targets", "identity": NaN}', "not valid JSON"),
        ('{"format": 3, "kind": "targets"}', "lacks complete, fingerprint, identity, units"),
        ('{"format": true, "kind": "targets"}', "has format True"),
        ('{"format": 9, "kind": "targets", "units": []}', "has format 9, and this version"),
        ('{"format": 3, "kind": null}', "kind: None is unknown"),
        ('{"some": 1}', "was not written by cae2pipe"),
        ("3", "was not written by cae2pipe"),
    ],
)
def test_what_is_no_manifest_is_told_apart(text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        decode_manifest(text.encode(), "here")


GROUP = {"codec": "fp16", "level": 1, "dim": 7, "rows": 0, "cols": 0, "class_token": True, "attention": False}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("units", "v00/000001", "files"), [], r"units\.v00/000001\.files: Input should be an object"),
        (("units", "v00/000001"), "x", r"units\.v00/000001: Input should be an object"),
        (("units", "v00/000001", "samples"), "70", r"v00/000001\.samples: .*valid integer; got '70'"),
        (("groups",), {"summary": GROUP}, r"groups\.patches: Field required"),
        (("groups", "patches", "codec"), "int8", r"groups\.patches\.codec: the teacher or the codec has 'klt'"),
        (("groups", "patches", "rows"), 2, r"groups\.patches\.rows: the teacher or the codec has 4"),
        (("groups", "patches", "codec"), "zip", r"groups\.patches\.codec: "),
        (("groups", "../patches"), GROUP, r"groups"),
        (("units", "v00/000001", "samples"), 69, r"v00/000001: samples: the store does not have 69 records"),
        (
            ("units", "v00/000001", "shard"),
            "000002",
            r"v00/000001: view, shard, zarr: they do not match the unit's name",
        ),
        (("units", "v00/000001", "zarr"), "s/../../precious", "zarr: they do not match the unit's name"),
        (("units", "v00/000001", "tar"), "../../victim.tar", "tar: it does not match the unit's name"),
        (("units", "images/000001", "tar"), "images/000000.tar", "tar: they do not match the unit's name"),
        (("units", "codec", "files", "codec.zarr/../../x"), {"bytes": 1, "sha256": "0" * 64}, r"codec\.files"),
        (("units", "../x"), {}, r"units\.\.\./x"),
        (("teacher", "dim"), "16", r"teacher\.dim: .*valid integer"),
        (("teacher", "rows"), 10**9, r"teacher\.rows: .*less than or equal to 1024"),
        (("identity", "settings", "codec", "name"), "zip", r"identity\.settings\.codec\.name"),
        (("identity", "settings", "codec", "fidelity"), 5.0, r"codec\.fidelity: .*less than 1"),
        (("wanted", "views"), -1, r"wanted\.views"),
        (("codec",), None, "codec: Input should be an object"),
    ],
)
def test_the_field_is_named(target_root: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    manifest = json.loads((target_root / "manifest.json").read_text())
    holder = manifest
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(ManifestError, match=message) as caught:
        decode_manifest(seal(manifest), "here")
    assert "Store." not in str(caught.value)
    assert "Images." not in str(caught.value)


def test_folders_of_earlier_formats_are_read_without_a_digest(manifest: Any) -> None:
    kind = manifest["kind"]
    old = {**manifest, "format": DIGESTED[kind] - 1}
    old.pop("digest")
    found = decode_manifest(json.dumps(old).encode(), "here")
    assert found == old
    old["format"] += 1
    with pytest.raises(DamageError, match="digest"):
        decode_manifest(json.dumps(old).encode(), "here")


def test_units_come_back_from_the_journal_as_they_were_written(target_root: Path) -> None:
    artifact = open_artifact(target_root)
    for form in (2, 3):
        for name, unit in artifact.units.items():
            data = encode_unit(TARGETS, form, name, unit=unit, where="")
            assert decode_unit(TARGETS, form, name, data=data, where="") == unit
