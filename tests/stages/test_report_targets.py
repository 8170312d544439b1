"""``cae2pipe report TARGETS``: the page shows what the set holds, and what is missing or damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cae2pipe
from cae2pipe.artifacts.manifest import seal
from cae2pipe.artifacts.storage import to_path
from cae2pipe.cli import app
from cae2pipe.config.extract import ShardSettings
from cae2pipe.errors import BadInputError, DamageError, ManifestError, MismatchError, SettingsError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.stages.report_targets import report_targets
from cae2pipe.stages.shard import shard_images
from cae2pipe.targets.auditing import audit
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import load_teacher
from tests.conftest import contents, write_photos
from tests.reporting.test_html import Reader, read


def page_of(root: Path, out: Path, **options) -> Reader:
    """The parsed page, which must be complete, load nothing, and describe every picture."""
    text = report_targets(root, out, report=Silent(), **options).page.read_text(encoding="utf-8")
    assert "http" not in text
    assert "<script" not in text
    reader = read(text)
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert all(picture["src"].startswith("data:") for picture in pictures)
    assert all(picture["alt"] for picture in pictures)
    return reader


def alts(page: Reader) -> list[str]:
    return [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]


def edited(root: Path, change) -> None:
    """Change a manifest, with a matching digest."""
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_bytes(seal(manifest))


def test_a_whole_set(target_root, tmp_path):
    before = contents(target_root)
    page = page_of(target_root, tmp_path / "out")
    text = page.text
    assert "Target set set" in text
    assert "tiny, of open_clip" in text
    assert "4 × 4 patches and a class token, 16 dimensions each" in text
    assert "3 shards of 150 images, 2 views each" in text
    assert re.search(r"mean cosine 0.999; stored 0.999\d+ ✓ reached", text)
    assert "Missing or damaged" not in text
    assert "6 of 6 stores exist: 2 views from top to bottom, 3 shards from left to right." in text
    assert [f"class{label}50" in text for label in range(3)] == [True] * 3
    assert "Images of each of 3 classes, most first." in text
    assert "None: every image of the source could be decoded." in text
    shown = [alt for alt in alts(page) if alt.endswith("with its crop boxes")]
    assert len(set(shown)) == 6
    assert sum(alt.startswith("Latents of the teacher, view") for alt in alts(page)) == 12
    assert text.count("original") >= 6
    assert "reduced image" not in text
    # The commands that add what is not on the page.
    assert f"cae2pipe report {target_root} --live 256" in text
    assert "The teacher on" not in text
    assert contents(target_root) == before


def test_images_are_from_all_over_the_set(target_root, tmp_path):
    keys = {alt.removesuffix(" with its crop boxes") for alt in alts(page_of(target_root, tmp_path)) if "crop" in alt}
    targets = TargetSet(target_root)
    assert {name for name in targets.stores if keys & set(targets.reader(name).records().keys)} == set(targets.stores)


def test_equal_sets_give_equal_bytes(target_root, tmp_path):
    for name in ("one", "two"):
        report_targets(target_root, tmp_path / name, report=Silent())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_teacher_on_stored_views(target_root, teacher_file, extract_settings, tmp_path):
    import torch

    page = page_of(target_root, tmp_path, live=40, weights=teacher_file, device="cpu")
    teacher = load_teacher(extract_settings().teacher, torch.device("cpu"))
    result = audit(TargetSet(target_root), teacher, 40, report=Silent())
    assert "The teacher on 40 stored views" in page.text
    assert f"{result.raw:.4f}mean cosine now; recorded for the set: {result.expected:.4f}" in page.text
    assert f"{result.centred:.4f}mean centred cosine" in page.text
    assert "Mean centred cosine of each patch" in alts(page)
    assert "variance over principal component: the teacher's latents, error of stored latents" in alts(page)
    assert alts(page).count("Latents of the set as colours") == 4
    assert "--live 256" not in page.text


def test_originals_come_from_the_shard_set(stored_root, target_root, photos, tmp_path):
    bare = Path(shutil.copytree(stored_root, tmp_path / "bare", ignore=shutil.ignore_patterns("shards")))
    page = page_of(bare, tmp_path / "without")
    assert "Boxes are drawn on grey, because this set has no whole images." in page.text
    assert page.text.count("original not available") == 6
    assert f"cae2pipe report {bare} --source SHARDS" in page.text
    assert "listed in the shard set, which is not inside this set" in page.text
    # Next to it are a set of other shards, and the one that it was made from.
    shard_images(write_photos(tmp_path / "photos", 1, 2), tmp_path / "a", ShardSettings(), report=Silent())
    shutil.copytree(target_root / "shards", tmp_path / "b c")
    page = page_of(bare, tmp_path / "without")
    assert f"cae2pipe report {bare} --source '{tmp_path / 'b c'}'" in page.text
    page = page_of(bare, tmp_path / "with", source=target_root / "shards")
    assert "--source SHARDS" not in page.text
    assert "original not available" not in page.text
    with pytest.raises(ManifestError, match="no manifest"):
        report_targets(bare, tmp_path / "with", report=Silent(), source=photos)
    shard_images(photos, tmp_path / "other", ShardSettings(seed=1, samples=70, speed={"workers": 0}), report=Silent())
    with pytest.raises(MismatchError, match="differs from the one that this target set was made from"):
        report_targets(bare, tmp_path / "with", report=Silent(), source=tmp_path / "other")


def test_kept_images_stand_for_originals(copy, tmp_path):
    shutil.rmtree(copy / "shards")
    page = page_of(copy, tmp_path / "out")
    assert "Boxes are drawn on the reduced images of the set." in page.text
    assert page.text.count("reduced image") == 7


def test_damaged_originals_are_named_and_kept_images_shown(copy, tmp_path):
    (copy / "shards" / "tars" / "000001.tar").unlink()
    page = page_of(copy, tmp_path / "out")
    assert f"{copy / 'shards' / 'tars' / '000001.tar'}: " in page.text
    assert 0 < page.text.count("reduced image") < 6
    edited(copy / "shards", lambda manifest: manifest["units"].pop("000001"))
    page = page_of(copy, tmp_path / "out")
    assert "shard 000001 of the source differs from the one that this target set was made from" in page.text
    assert page.text.count("reduced image") == 7


def test_what_is_not_there_yet_is_named(copy, tmp_path):
    def cut(manifest):
        del manifest["units"]["v01/000001"]
        manifest["complete"] = False
        manifest["wanted"] |= {"views": 3}

    edited(copy, cut)
    page = page_of(copy, tmp_path / "out")
    assert "4 stores of 9 do not exist yet: v01/000001, v02/000000, v02/000001, v02/000002." in page.text
    assert f"cae2pipe extract-targets SOURCE {copy}" in page.text
    assert "55%of the requested stores exist" in page.text


@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("latents/v01/000002.zarr/patches/norms/c/0/0", ["v01/000002"]),
        ("images/000000.tar", ["v00/000000", "v01/000000"]),
    ],
)
def test_missing_files_are_named_and_the_rest_is_shown(file, lost, copy, tmp_path):
    (copy / file).unlink()
    page = page_of(copy, tmp_path / "out")
    stores = "1 store" if len(lost) == 1 else "2 stores"
    assert f"{stores} cannot be used, because a file is missing or truncated: {', '.join(lost)}." in page.text
    assert f"{copy / file}: a file that the manifest lists is missing" in page.text
    assert f"cae2pipe verify {copy} --repair" in page.text
    assert "orange: damaged" in page.text
    assert "3 shards of 150 images, 2 views each, incomplete" in page.text
    with pytest.raises(DamageError, match="missing"):
        TargetSet(copy)


def test_changed_bytes_are_named_and_the_rest_is_shown(copy, tmp_path):
    path = copy / "latents" / "v00" / "000000.zarr" / "patches/symbols/c/0/0/0/0"
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(data)
    page = page_of(copy, tmp_path / "out")
    assert f"{path}, block 0: stored data are damaged" in page.text
    shown = {alt for alt in alts(page) if alt.endswith("with its crop boxes")}
    assert 0 < len(shown) < 6


def test_nothing_is_left_to_show(copy, tmp_path):
    for path in (copy / "images").glob("*.tar"):
        path.unlink()
    with pytest.raises(DamageError, match="missing"):
        report_targets(copy, tmp_path / "out", report=Silent())
    assert not (tmp_path / "out").exists()


def test_a_set_that_does_not_record_how_it_was_made(copy, tmp_path):
    def age(manifest):
        for name in ("wanted", "versions", "processor"):
            del manifest[name]

    edited(copy, age)
    page = page_of(copy, tmp_path / "out")
    assert "extracted withnot recorded" in page.text
    assert "Missing or damaged" not in page.text


def test_a_recoded_set(int8_root, tmp_path):
    page = page_of(int8_root, tmp_path)
    assert "codecint8" in page.text
    assert "from a set with codec klt" in page.text
    assert "requested fidelity" not in page.text
    assert "17 × 16 int8" in page.text


def test_images_without_classes_and_rejects(extract_settings, tmp_path):
    write_photos(tmp_path / "photos", classes=1, each=20)
    (tmp_path / "flat").mkdir()
    for photo in (tmp_path / "photos" / "class0").iterdir():
        photo.rename(tmp_path / "flat" / photo.name)
    (tmp_path / "flat" / "<b>broken.jpg").write_bytes(b"nothing")
    settings = extract_settings(views=1, codec={"calibration": 16})
    extract_targets(tmp_path / "flat", tmp_path / "set", settings, report=Silent())
    page = page_of(tmp_path / "set", tmp_path / "out")
    assert "The images have no classes" in page.text
    assert "1 image of the source could not be decoded." in page.text
    assert "<b>broken.jpg" in page.text


def test_a_remote_set(target_root, tmp_path):
    remote = to_path("memory://report/set")
    for name, data in contents(target_root).items():
        path = remote / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    ours = report_targets(target_root, tmp_path / "local", report=Silent()).page.read_text()
    theirs = report_targets(remote, to_path("memory://report/out"), report=Silent()).page
    assert theirs.read_text() == ours.replace(str(target_root), str(remote))


def test_an_interrupt_leaves_nothing(target_root, tmp_path):
    class Interrupted(Silent):
        def advance(self, n=1, /, **fields):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_targets(target_root, tmp_path / "out", report=Interrupted())
    assert not (tmp_path / "out").exists()


def test_the_command(target_root, stored_root, trained_run, tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(app, ["report", *map(str, arguments), "--out", str(tmp_path / "out")])

    done = run(target_root)
    assert done.exit_code == 0, done.output
    assert f"report: {tmp_path / 'out' / 'report.html'}" in done.stdout.replace("\n", "")
    assert "report.html" not in done.stderr
    for arguments, said in (
        ((target_root, trained_run()), "a report is about some runs, or about one target set"),
        ((target_root, stored_root), "a report is about some runs, or about one target set"),
        ((target_root, "--scores", tmp_path), "this option does not apply to a report of a target set"),
        ((trained_run(), "--live", 5), "this option does not apply to a report of runs"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert said in refused.stderr


@pytest.mark.parametrize("below", ["", "report", "views/report"])
def test_a_page_is_not_written_into_a_set_or_a_run(below, target_root, trained_run, tmp_path):
    before = contents(target_root), contents(trained_run())
    (tmp_path / "link").symlink_to(target_root)
    for out in (target_root / below, tmp_path / "link" / below, trained_run() / below):
        with pytest.raises(BadInputError, match="cannot be written into"):
            report_targets(target_root, out, report=Silent())
        with pytest.raises(BadInputError, match="cannot be written into"):
            cae2pipe.report(trained_run(), out=out, progress=False)
    assert (contents(target_root), contents(trained_run())) == before


def test_a_page_is_not_written_into_a_remote_set(target_root):
    for path in sorted(target_root.rglob("*")):
        if path.is_file():
            to_path(f"memory://written/set/{path.relative_to(target_root)}").write_bytes(path.read_bytes())
    for out in ("memory://written/set", "memory://written/set/report"):
        with pytest.raises(BadInputError, match="cannot be written into"):
            cae2pipe.report_targets(target_root, out=out, progress=False)


def test_each_kind_of_folder_is_sent_to_its_report(target_root, trained_run, tmp_path):
    with pytest.raises(SettingsError, match="this is a target set, not a run") as caught:
        cae2pipe.report([trained_run(), target_root], out=tmp_path / "page", progress=False)
    assert "report_targets" in caught.value.fix
    with pytest.raises(SettingsError, match="this is a run, not a target set") as caught:
        cae2pipe.report_targets(trained_run(), out=tmp_path / "page", progress=False)
    assert "call report " in caught.value.fix
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("folder", "said"), [("shards", "of kind 'shards'"), ("empty", "no manifest.json"), ("nowhere", "no such folder")]
)
def test_a_folder_of_no_kind_that_has_a_report(folder, said, target_root, tmp_path):
    (tmp_path / "empty").mkdir()
    path = {"shards": target_root / "shards"}.get(folder, tmp_path / folder)
    result = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "page")])
    assert result.exit_code == 2
    words = " ".join(result.output.split())
    assert said in words
    assert "runs of `cae2pipe pretrain`, or one target set of `cae2pipe extract-targets`" in words


def test_the_help_has_an_example_of_each_kind():
    shown = CliRunner().invoke(app, ["report", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    *_, runs, targets = [line.strip() for line in shown.splitlines() if line.strip()]
    assert runs.startswith("Example: cae2pipe report runs/base ")
    assert targets.startswith("Example: cae2pipe report targets ")
