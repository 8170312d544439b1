"""YAML 1.2's core schema, and documents that nobody means."""

from __future__ import annotations

import json
import math
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.config.base import package_folder, read_preset
from cae2pipe.config.yaml_core import read_yaml
from cae2pipe.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (text, text)
            for text in ("yes", "no", "on", "Off", "y", "1:30", "190:20:30", "2001-01-01", "1_000", "=", "0b1")
        ),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, None) for text in ("", "~", "null", "Null", "NULL")),
        *((text, 8) for text in ("8", "+8", "008", "0o10", "0x8")),
        *((text, 1e5) for text in ("1e5", "1E+5", "100000.", "1.0e5")),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("'8'", "8"),
        ("{<<: {b: 1}, a: 2}", {"<<": {"b": 1}, "a": 2}),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
    ],
)
def test_plain_values(text, value):
    found = read_yaml(text)
    assert (found, type(found)) == (value, type(value))


TEXT = st.text(st.characters(codec="ascii"), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=50)
@given(VALUES)
def test_what_json_writes_is_read_as_it_is(value):
    assert read_yaml(json.dumps(value)) == value


def test_presets_mean_what_they_meant():
    files = sorted(package_folder("configs").glob("*/*.yaml"))
    assert files
    for path in files:
        assert read_yaml(path.read_text()) == yaml.safe_load(path.read_text()), path


REFUSED = {
    "key": ("epochs: 3\nseed: 1\nepochs: 4\n", r"duplicate key 'epochs'[\s\S]*line 3"),
    "inner key": ("mask: {ratio: 0.1, ratio: 0.2}", "duplicate key 'ratio'"),
    "deep": ("a: " + "[" * 500, "nested too deep"),
    "less deep": ("a: " + "[" * 60 + "]" * 60, "nested too deep"),
    "digits": ("seed: " + "9" * 5000, "digits"),
    "itself": ("a: &a [*a]", "a value contains itself"),
    "laughs": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
        "e: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\n",
        "more than 10000 values",
    ),
    "code": ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "NUL": ("a: '\0'", "special characters"),
    "bytes": (b"a: \xff", "codec can't decode"),
    "half a character": ('a: "\\ud800"', "half of a surrogate pair"),
    "two": ("a: 1\n---\na: 2\n", "single document"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_settings_file_that_nobody_means_is_one_error(name, tmp_path):
    content, message = REFUSED[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match=message) as caught:
        read_preset("pretrain", str(path))
    assert caught.value.where == str(path)


def test_places_that_are_no_files(tmp_path):
    fifo, loop, large = tmp_path / "fifo.yaml", tmp_path / "loop.yaml", tmp_path / "large.yaml"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    large.write_bytes(b"#" * (2**20 + 1))
    for path, message in ((fifo, "not a regular file"), (loop, "symbolic links"), (large, "too large")):
        with pytest.raises(SettingsError, match=message):
            read_preset("pretrain", str(path))
