import os
import shutil
from pathlib import Path

import pytest

from cae2pipe.errors import DamageError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.verify import verify


@pytest.fixture
def copy(target_root, tmp_path):
    shutil.copytree(target_root, tmp_path / "set")
    return tmp_path / "set"


def test_a_sound_set_verifies(target_root):
    result = verify(target_root, Silent())
    assert result.problems == []
    assert "all" in result.summary()


@pytest.mark.parametrize(
    "name",
    [
        "images/000000.tar",
        "images/000001.json",
        "latents/v01/000002.zarr/patches/norms/c/0/0",
        "shards/tars/000001.tar",
    ],
)
@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_every_kind_of_damage_is_named_with_its_remedy(copy, name, damage):
    path = copy / name
    data = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (problem,) = verify(copy, Silent()).problems
    assert problem.where.endswith(name)
    assert "cae2pipe" in problem.fix


def test_strangers_are_named(copy):
    (copy / "images" / "extra.tar").write_bytes(b"x")
    (problem,) = verify(copy, Silent()).problems
    assert problem.where.endswith("extra.tar")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"processor": "', '"processor": "another '),
        ('"complete": true', '"complete": false'),
        ('"images": 150', '"images": 151'),
        ('"class0"', '"classO"'),
        ('"centred_mean": 0.', '"centred_mean": 1.'),
        ("}\n", "}"),
    ],
)
def test_changed_facts_of_a_manifest_are_seen(copy, old, new):
    path = copy / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DamageError, match="has changed since it was written") as caught:
        verify(copy, Silent())
    assert caught.value.where == str(path)


def test_what_is_no_file_is_a_stranger_too_and_nothing_is_waited_for(copy):
    os.mkfifo(copy / "images" / "fifo")
    (copy / "latents" / "v00" / "link").symlink_to(copy.parent)
    (copy / "codec.zarr" / "dangling").symlink_to("nowhere")
    damaged = {Path(problem.where).name for problem in verify(copy, Silent()).problems}
    assert damaged == {"fifo", "link", "dangling"}
    tar = copy / "images" / "000000.tar"
    tar.unlink()
    os.mkfifo(tar)
    assert any(problem.where == str(tar) for problem in verify(copy, Silent()).problems)
