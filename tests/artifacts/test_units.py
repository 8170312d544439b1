"""Units that are kept as text: the same values, the same bytes, and no other document mistaken for a manifest."""

from __future__ import annotations

import json
import pickle

import pytest

from cae2pipe.artifacts.artifact import TargetsArtifact
from cae2pipe.artifacts.manifest import decode_manifest, encode_manifest, seal
from cae2pipe.artifacts.manifest_text import split, text
from cae2pipe.artifacts.units import Units


@pytest.fixture
def data(target_root) -> bytes:
    return (target_root / "manifest.json").read_bytes()


def test_units_stay_text_and_are_read_and_written_as_the_document_says(target_root, data):
    artifact, truth = TargetsArtifact.open(target_root), json.loads(data)
    assert all(isinstance(artifact.units.kept(name), memoryview) for name in truth["units"])
    assert artifact.units == truth["units"]
    assert {name: artifact.units.samples(name) for name in truth["units"]} == {
        name: unit["samples"] for name, unit in truth["units"].items()
    }
    assert encode_manifest("targets", artifact.format, artifact.manifest(), where="") == data
    # Parsed units are written as text is.
    artifact.units = Units(dict(artifact.units))
    assert encode_manifest("targets", artifact.format, artifact.manifest(), where="") == data
    assert text({**truth, "units": Units({})}) == text({**truth, "units": {}})


def test_a_unit_that_is_assigned_replaces_its_text(target_root):
    artifact = TargetsArtifact.open(target_root)
    unit = {**artifact.units["v00/000001"], "samples": 3}
    others = Units({"v00/000001": unit})
    assert artifact.units.merged(others).samples("v00/000001") == 3
    artifact.units["v00/000001"] = unit
    assert artifact.units.samples("v00/000001") == artifact.units["v00/000001"]["samples"] == 3
    again = pickle.loads(pickle.dumps(artifact.units))
    assert again == artifact.units
    assert again.samples("v00/000000") == artifact.units.samples("v00/000000")
    del again["v00/000001"]
    assert again.keys() == artifact.units.keys() - {"v00/000001"}


def test_units_elsewhere_in_a_document_are_not_taken_for_its_own(data):
    """Lines that look like those of the units, in a field of the identity, or before a second field of the name."""
    parts = split(data)
    assert parts is not None
    assert parts[1].keys() == json.loads(data)["units"].keys()
    start, stop = (
        data.index(b'\n "units": {'),
        data.index(b"\n  }\n }", data.index(b'\n "units": {')) + len(b"\n  }\n }"),
    )
    units = data[start:stop]
    nested = data[:start].replace(b'\n "identity": {', b'\n "identity": {%b,' % units) + b'\n "units": {}' + data[stop:]
    assert json.loads(nested)["units"] == {}
    assert split(nested) is None
    repeated = data[:stop] + b',\n "units": {}' + data[stop:]
    assert json.loads(repeated)["units"] == {}
    assert split(repeated) is None
    name = b'\n  "v00/000001": {'
    assert split(data.replace(name, b'\n  "v00/000000": {')) is None, "a name that occurs twice"


def test_another_layout_is_read_too(data):
    manifest = json.loads(data)
    manifest.pop("digest")
    compact = json.dumps({**manifest, "format": 2}).encode()
    assert split(compact) is None
    assert decode_manifest(compact, "here") == {**manifest, "format": 2}


@pytest.mark.parametrize("end", [b"", b"\n", b"\n}", b"\n}\n}"])
def test_what_follows_the_units_must_be_json(data, end):
    cut = data[: data.index(b"\n  }\n }", data.index(b'\n "units": {')) + len(b"\n  }\n }")]
    assert split(cut + end) is None or end == b"\n}"
    assert split(seal(json.loads(data))) is not None
