"""Reading JSON: one type of error for any bytes, and never a value that cannot be written again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.artifacts.json_files import parse_json, read_json
from cae2pipe.errors import DamageError, ManifestError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Files are written in UTF-8, which has no surrogates.
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)


@settings(max_examples=50)
@given(values)
def test_what_json_wrote_is_read_as_it_was(value: object) -> None:
    assert parse_json(json.dumps(value), "here", fix="none") == value


@given(st.binary())
def test_any_bytes_give_a_value_or_the_error(data: bytes) -> None:
    with suppress(ManifestError):
        json.dumps(parse_json(data, "here", fix="make it again"), allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 300 + "]" * 300,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "9" * 5000,
        str(2**64),
        "NaN",
        "[-Infinity]",
        "1e999",
        '"\\ud800"',
        "",
        "{} {}",
    ],
)
def test_what_python_would_choke_on_later_is_refused(text: str) -> None:
    with pytest.raises(DamageError, match="not valid JSON"):
        parse_json(text, "here", fix="none", error=DamageError)


def test_files_are_bounded_and_regular(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert read_json(path, fix="none") == [1, 2]
    with pytest.raises(ManifestError, match="too large: 6 bytes, at most 5"):
        read_json(path, fix="none", limit=5)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "fifo", fix="none")
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path, fix="none")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", fix="none")
