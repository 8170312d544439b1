"""Random changes of one file of a folder, as from damage, an attacker or another tool."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = (
    "../precious",
    "../../precious",
    "../victim.zarr",
    "/etc/hostname",
    "a\x1b[2Jb",
    "",
    ".",
    "..",
    "x" * 300,
    "a\0b",
    "[/]",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    10**9,
    2**64,
    0.5,
    1e308,
    [],
    {},
    [[]],
    {"a": 1},
    "text",
    "0" * 64,
    *NAMES,
)
TEXTS = ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 100_000, '"\\ud800"')
"""JSON that ``json.dumps`` does not write, as replacement of a value."""


def mutate(root: Path, rng: np.random.Generator) -> str:
    """Change one file below ``root``; returns a description. JSON files, which are few, are chosen as often as all
    others together."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    texts = [path for path in files if path.suffix in (".json", ".jsonl")]
    chosen = texts if texts and rng.random() < 0.5 else files
    path = chosen[int(rng.integers(len(chosen)))]
    name = path.relative_to(root.parent).as_posix()
    if path.suffix == ".json" and rng.random() < 0.7:
        return f"{name}: {change_json(path, rng)}"
    kind = KINDS[int(rng.integers(len(KINDS)))]
    kind(path, files, rng)
    return f"{name}: {kind.__name__}"


def flip_bit(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def overwrite(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    at, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 64))
    data[at : at + size] = rng.bytes(len(data[at : at + size]))
    path.write_bytes(data)


def cut_off(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(len(data) + 1))])


def fill_with_zeros(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def lengthen(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 2000))))


def delete(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.unlink()


def make_folder(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to_nowhere(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to(path.name)


def replace_by_another(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    data = files[int(rng.integers(len(files)))].read_bytes()
    path.write_bytes(data)


def forbid_reading(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    path.chmod(0)


def insert_text(path: Path, files: list[Path], rng: np.random.Generator) -> None:
    data, text = path.read_bytes(), TEXTS[int(rng.integers(len(TEXTS)))].encode()
    at = int(rng.integers(len(data) + 1))
    path.write_bytes(data[:at] + text + data[at:])


KINDS: tuple[Callable[[Path, list[Path], np.random.Generator], None], ...] = (
    flip_bit,
    flip_bit,
    overwrite,
    cut_off,
    fill_with_zeros,
    lengthen,
    delete,
    make_folder,
    make_fifo,
    link_to_nowhere,
    link_to_itself,
    replace_by_another,
    forbid_reading,
    insert_text,
)


def change_json(path: Path, rng: np.random.Generator) -> str:
    """Change one value or key of a JSON file; the syntax mostly stays valid."""
    data = json.loads(path.read_text())
    spots = list(inside(data))
    if not spots:
        path.write_text("{}")
        return "emptied"
    holder, key, name = spots[int(rng.integers(len(spots)))]
    kind = int(rng.integers(5))
    if kind == 0:
        del holder[key]
        done = f"{name} removed"
    elif kind == 1 and isinstance(holder, dict):
        new = str(NAMES[int(rng.integers(len(NAMES)))])
        holder[new] = holder.pop(key)
        done = f"{name} renamed {new[:20]!r}"
    elif kind == 2:
        other, there, _ = spots[int(rng.integers(len(spots)))]
        holder[key] = json.loads(json.dumps(other[there]))
        done = f"{name} becomes another value of the file"
    elif kind == 3:
        text = TEXTS[int(rng.integers(len(TEXTS)))]
        holder[key] = "@@"
        path.write_text(json.dumps(data).replace('"@@"', text, 1))
        return f"{name} becomes {text[:20]}"
    else:
        value = VALUES[int(rng.integers(len(VALUES)))]
        holder[key] = value
        done = f"{name} becomes {str(value)[:20]!r}"
    path.write_text(json.dumps(data))
    return done


def inside(value: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every position in a JSON value: its container, its key there, and a readable name."""
    keys: Any = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key, f"{name}.{key}"
        yield from inside(value[key], f"{name}.{key}")
