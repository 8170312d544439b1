"""Folders as sources: the images found, and every reason for which a folder is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from cae2pipe.artifacts.storage import to_path
from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.errors import SourceError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.source import find_splits, scan


def fill(root: Path, *paths: str) -> Path:
    """Files with their own path as content; a path that ends in a slash is a folder."""
    root.mkdir(exist_ok=True)
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(path)
    return root


def refused(root: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        scan(root)
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def test_classes_are_sorted_and_images_labelled_by_the_top_folder(tmp_path):
    source = scan(fill(tmp_path / "s", "dog/1.jpg", "cat/deep/er/2.jpg", "cat/1.jpg"))
    assert source.classes == ["cat", "dog"]
    assert [(e.path, e.key, e.label, e.bytes) for e in source.entries] == [
        ("cat/1.jpg", "cat+1", 0, 9),
        ("cat/deep/er/2.jpg", "cat+deep+er+2", 0, 17),
        ("dog/1.jpg", "dog+1", 1, 9),
    ]


def test_a_flat_folder_has_no_classes(tmp_path):
    source = scan(fill(tmp_path / "s", "b.jpg", "a.PNG"))
    assert source.classes == []
    assert [(e.path, e.key, e.label) for e in source.entries] == [("a.PNG", "a", -1), ("b.jpg", "b", -1)]


def test_suffixes_in_any_case_and_nothing_hidden(tmp_path):
    suffixes = ["jpg", "JPEG", "Png", "webp", "BMP", "gif", "tif", "tiff", "ppm"]
    suffixes += ["jfif", "jpe", "JP2", "avif", "pnm", "pbm", "apng", "heic", "tga"]
    names = [f"{n:02d}.{suffix}" for n, suffix in enumerate(suffixes)]
    source = fill(tmp_path / "s", *names)
    fill(source, ".hidden.jpg", ".thumbnails/x.jpg", ".thumbnails/y.jpg", "labels.txt", "README", "x.jpg.part")
    listed = scan(source)
    assert [entry.path for entry in listed.entries] == names
    assert listed.passed_over == Counter({"hidden": 2, ".txt": 1, "suffixless": 1, ".part": 1})
    assert listed.remarks()[0].startswith("skipped 5 files that are not images: 2 hidden files, 1 ")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("1" if kind == "PBM" else "RGB", (20, 10)).save(buffer, "PPM" if kind == "PBM" else kind)
    return buffer.getvalue()


KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "PBM", "JPEG2000", "AVIF"]


def test_images_are_known_by_their_content_where_the_suffix_says_nothing(tmp_path):
    images = {f"s/{kind}{end}": encoded(kind) for kind in KINDS for end in ("", ".JPG_", ".001", ".002")}
    others = {"s/notes": b"some text", "s/old.bak": b"BM and more text", "s/empty": b"", "s/raw.nef": encoded("TIFF")}
    for name, data in {**images, **others}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "s", "s")
    folder, archive = scan(tmp_path / "s"), scan(tmp_path / "s.tar")
    expected = sorted(name.removeprefix("s/") for name in images)
    assert [entry.path for entry in folder.entries] == expected
    assert [entry.path for entry in archive.entries] == [f"s/{name}" for name in expected]
    assert folder.passed_over == archive.passed_over == Counter({"suffixless": 2, ".bak": 1, ".nef": 1})
    assert {entry.key for entry in folder.entries} >= {"JPEG", "JPEG~2eJPG_", "JPEG~2e001", "JPEG~2e002"}


def test_every_kind_is_packed_and_what_is_not_decoded_is_a_reject(tmp_path):
    (tmp_path / "s").mkdir()
    for kind in [*KINDS, "DIB", "TGA", "ICO", "PCX"]:
        suffix = {"JPEG2000": "jp2"}.get(kind, kind.lower())
        (tmp_path / "s" / f"{kind}.{suffix}").write_bytes(encoded(kind))
    (tmp_path / "s" / "notes.txt").write_text("x")
    report = Silent()
    shards = build_shard_set(
        tmp_path / "s", tmp_path / "out", ShardSettings(samples=20, speed=ShardSpeed(workers=0)), report=report
    )
    assert shards.images == len(KINDS)
    rejects = [json.loads(line)["path"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert rejects == ["DIB.dib", "ICO.ico", "PCX.pcx", "TGA.tga"]
    assert report.lines[0] == "skipped 1 file that is not an image: 1 .txt file"


def test_files_of_unknown_kind_that_cannot_be_looked_into(tmp_path):
    source = fill(tmp_path / "s", "1.jpg")
    os.mkfifo(source / "pipe")
    (source / "link").symlink_to(source / "gone")
    assert scan(source).passed_over == Counter({"suffixless": 2})


def test_dots_spaces_and_other_scripts_in_names(tmp_path):
    source = fill(tmp_path / "s", "a class/v1.2 final.jpg", "a class/Ünïcode 漢字.jpeg")
    assert [entry.key for entry in scan(source).entries] == [
        "a~20class+v1~2e2~20final",
        "a~20class+~c3~9cn~c3~afcode~20~e6~bc~a2~e5~ad~97",
    ]


def test_links_to_files_and_folders_are_followed(tmp_path):
    real = fill(tmp_path / "real", "cats/1.jpg", "loose.jpg")
    source = fill(tmp_path / "s", "dog/1.jpg")
    (source / "dog" / "2.jpg").symlink_to(real / "loose.jpg")
    (source / "cat").symlink_to(real / "cats")
    listed = scan(source)
    assert listed.classes == ["cat", "dog"]
    assert [(entry.path, entry.bytes) for entry in listed.entries] == [
        ("cat/1.jpg", 10),
        ("dog/1.jpg", 9),
        ("dog/2.jpg", 9),
    ]


def test_no_such_folder_and_a_file(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing").what
    assert "neither a .tar nor" in refused(fill(tmp_path / "s", "a.jpg") / "a.jpg").what


def test_an_empty_folder(tmp_path):
    assert "empty" in refused(fill(tmp_path / "s")).what


def test_a_folder_of_something_else_says_of_what(tmp_path):
    source = fill(tmp_path / "s", *(f"{n}.txt" for n in range(12)), "notes", "deep/x.csv")
    assert refused(source).what == "no images here: 12 .txt files, 1 .csv file, 1 suffixless file"


def test_a_class_folder_without_images_is_named(tmp_path):
    source = fill(tmp_path / "s", "cat/1.jpg", "dog/readme.txt", "elk/")
    error = refused(source)
    assert error.where == str(source / "dog")
    assert error.what == "a class folder holds no images (and 1 more): 1 .txt file"
    assert "remove the folder" in error.fix


def test_images_beside_class_folders(tmp_path):
    error = refused(fill(tmp_path / "s", "cat/1.jpg", "stray.jpg"))
    assert "stray.jpg" in error.what
    assert "cat/" in error.what


def test_a_flat_folder_with_an_empty_folder_names_that(tmp_path):
    source = fill(tmp_path / "s", "1.jpg", "notes/x.txt")
    assert refused(source).where == str(source / "notes")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cat/a.jpg", "cat/a.png"),
        ("cat/a.jfif", "cat/a.jpg"),
        ("cat/a.JPG", "cat/a.jpg"),
        ("cat/caf\u00e9.jpg", "cat/cafe\u0301.jpg"),
    ],
)
def test_two_files_with_one_key_are_both_named(tmp_path, first, second):
    error = refused(fill(tmp_path / "s", first, second))
    assert first in error.what
    assert second in error.what
    assert "rename" in error.fix


def test_links_that_lead_nowhere(tmp_path):
    source = fill(tmp_path / "s", "cat/1.jpg")
    for name, goal in (("broken.jpg", source / "gone.jpg"), ("self.jpg", source / "cat" / "self.jpg")):
        link = source / "cat" / name
        link.symlink_to(goal)
        error = refused(source)
        assert error.where == str(link)
        assert "does not exist" in error.what
        link.unlink()


def test_a_link_to_a_folder_above_it(tmp_path):
    source = fill(tmp_path / "s", "cat/deep/1.jpg")
    (source / "cat" / "deep" / "back").symlink_to(source / "cat")
    error = refused(source)
    assert "contains it" in error.what
    assert error.where.startswith(str(source / "cat" / "deep" / "back"))


def test_a_folder_linked_twice_is_no_loop(tmp_path):
    source = fill(tmp_path / "s", "cat/1.jpg")
    (source / "felis").symlink_to(source / "cat")
    assert [entry.path for entry in scan(source).entries] == ["cat/1.jpg", "felis/1.jpg"]


def test_a_pipe_with_an_image_s_name_is_not_waited_for(tmp_path):
    source = fill(tmp_path / "s", "cat/1.jpg")
    os.mkfifo(source / "cat" / "2.jpg")
    assert refused(source).where == str(source / "cat" / "2.jpg")


def test_names_that_are_not_utf8(tmp_path):
    source = fill(tmp_path / "s", "cat/1.jpg")
    try:
        (source / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_text("x")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    error = refused(source)
    assert r"b'cat/caf\xe9.jpg'" in error.what
    str(error).encode()  # can be printed


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["train/a/1.jpg", "val/a/1.jpg"], ["train", "val"]),
        (["Train/a/1.jpg", "TEST/a/1.jpg"], ["TEST", "Train"]),
        (["train/a/1.jpg", "validation/a/1.jpg", "test/1.jpg"], ["test", "train", "validation"]),
        (["train/1.jpg"], ["train"]),
        (["train/a/1.jpg", "val/a/1.jpg", "annotations/x.json", "list.txt"], ["train", "val"]),
        (["train/1.jpg", "car/1.jpg", "plane/1.jpg"], []),
        (["train/a/1.jpg", "val/a/1.jpg", "stray.jpg"], []),
        (["cat/1.jpg", "dog/1.jpg"], []),
        (["1.jpg"], []),
        (["cat/train/1.jpg", "cat/val/1.jpg"], []),
    ],
)
def test_what_is_taken_for_splits(tmp_path, paths, splits):
    root = fill(tmp_path / "s", *paths)
    assert find_splits(root) == {name: root / name for name in splits}


def test_a_folder_of_splits_is_refused_with_the_one_to_give(tmp_path):
    source = fill(tmp_path / "s", "test/a/1.jpg", "train/a/1.jpg")
    error = refused(source)
    assert "test, train" in error.what
    assert str(source / "train") in error.fix
    assert scan(source / "train").classes == ["a"]


def write_tar(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))


def test_tars_and_images_do_not_mix_in_silence(tmp_path):
    root = fill(tmp_path / "s", "cat/1.jpg")
    write_tar(root / "cat" / "more.TAR", "1.jpg")
    assert "holds both tars (cat/more.TAR) and images (cat/1.jpg)" in refused(root).what
    (root / "cat" / "1.jpg").unlink()
    assert "tars in subfolders" in refused(root).what


def test_tars_in_capitals_and_what_lies_beside_tars(tmp_path):
    root = fill(tmp_path / "s", "readme.md")
    write_tar(root / "SHARD-000.TAR", "1.jpg", "1.cls")
    source = scan(root)
    assert [(entry.path, entry.label) for entry in source.entries] == [("SHARD-000/1.jpg", 1)]
    assert source.passed_over == Counter({".md": 1})
    assert len(scan(root / "SHARD-000.TAR").entries) == 1
    fill(root, "more.tar.gz")
    assert refused(root).where == str(root / "more.tar.gz")
    (root / "more.tar.gz").unlink()
    write_tar(root / "SHARD-000.tar", "1.jpg", "1.cls")
    assert "the same name" in refused(root).what


def test_folders_in_tars_are_never_lost_as_classes(tmp_path):
    root = tmp_path / "s"
    write_tar(root / "pets.tar", "cats/1.jpg", "dogs/2.jpg")
    assert scan(root).classes == ["cats", "dogs"]
    write_tar(root / "more.tar", "cats/3.jpg", "dogs/4.jpg")
    assert "would be the class 'more', but holds several folders: cats and dogs" in refused(root).what
    (root / "pets.tar").rename(root / "a-000.tar")
    (root / "more.tar").rename(root / "a-001.tar")
    assert "not used as classes" in scan(root).remarks()[0]


def test_labels_that_only_tars_may_hold(tmp_path):
    assert "label files next to these images (1.cls)" in refused(fill(tmp_path / "s", "1.jpg", "1.cls")).what
    assert scan(fill(tmp_path / "t", "cat/1.jpg", "cat/1.cls")).passed_over == Counter({".cls": 1})


def test_names_that_the_locale_cannot_read(tmp_path):
    fill(tmp_path / "s", "猫/1.jpg")
    code = (
        "import sys; from pathlib import Path; from cae2pipe.shards.source import scan\n"
        "from cae2pipe.errors import SourceError\n"
        "try: scan(Path(sys.argv[1]))\n"
        "except SourceError as error: print(ascii(str(error)))"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "s"],
        env=os.environ | locale,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "this locale, whose encoding is ascii, cannot read the name" in result.stdout
    assert "LC_ALL=C.UTF-8" in result.stdout


@pytest.mark.parametrize("url", ["http://localhost:1/images.tar", "http://localhost:1/images", "memory://nowhere"])
def test_a_url_with_nothing_behind_it(url):
    """Nothing listens on port 1, and http's file system does not say so."""
    with pytest.raises(SourceError, match="nothing is there, or its server does not answer"):
        scan(to_path(url))
