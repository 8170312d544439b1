"""Stored targets are the teacher's outputs for exactly the views that the set returns."""

import importlib
import shutil

import pytest
import torch
from PIL import Image

from cae2pipe.artifacts.artifact import open_artifact
from cae2pipe.errors import MismatchError
from cae2pipe.runtime.progress import Silent
from cae2pipe.stages.extract_targets import extract_targets
from cae2pipe.targets.codecs import as_tensors
from cae2pipe.targets.target_set import TargetSet
from cae2pipe.teachers.load import load_teacher
from tests.conftest import contents


def test_fp16_targets_are_the_live_teachers(photos, tmp_path, extract_settings):
    settings = extract_settings(codec={"name": "fp16", "calibration": 64}, views=1)
    extract_targets(photos, tmp_path / "set", settings, report=Silent())
    targets = TargetSet(tmp_path / "set")
    teacher = load_teacher(settings.teacher, torch.device("cpu"))
    reader = targets.reader("v00/000001")
    block = reader.block(1)
    pixels = torch.from_numpy(targets.pixels(block)).permute(0, 3, 1, 2)
    live = teacher(pixels).tokens
    stored = targets.layout.codec.decode(as_tensors(block.arrays))
    norms = torch.from_numpy(block.arrays["norms"]).float().unsqueeze(-1)
    assert torch.equal(stored, torch.nn.functional.normalize(live, dim=-1).half().float())
    torch.testing.assert_close(stored * norms, live, rtol=2e-3, atol=1e-3)


def test_the_draws_kept_recreate_the_stored_view(stored_root, photos, extract_settings):
    from cae2pipe.images.decode import decode_rgb
    from cae2pipe.images.views import ViewDraw, encode_jpeg, render_view
    from cae2pipe.shards.shard_set import ShardSet

    shards = ShardSet.open(stored_root / "shards")
    reader = TargetSet(stored_root).reader("v01/000000")
    original = shards.read(shards.shards[0], 5, 6)[0]
    draw = ViewDraw.from_row(reader.records().draws[5])
    image = decode_rgb(original.data, where="test")
    settings = extract_settings().view
    assert reader.records().keys[5] == original.key
    assert encode_jpeg(render_view(image, draw, settings), settings) == reader.jpegs(0)[5]
    assert (draw.source_height, draw.source_width) == (image.height, image.width)


def test_the_teacher_sees_what_is_cut_from_the_images_kept(target_root, photos, extract_settings, monkeypatch):
    """For every view, the teacher's input in stage 1 equals, bit for bit, the pixels that the set returns."""
    from cae2pipe.shards.shard_set import ShardSet
    from cae2pipe.targets.rendering import Renderer, Task

    targets, settings = TargetSet(target_root), extract_settings()
    shards = ShardSet.open(target_root / "shards")
    for shard in shards.shards:
        for block in range(-(-shard.samples // 64)):
            rendered = Renderer(shards, [Task(shard, block, (0, 1))], settings.view, seed=settings.seed)[0]
            for view in (0, 1):
                held = targets.reader(f"v{view:02d}/{shard.name}").block(block)
                assert held.keys == rendered.keys
                assert held.jpegs == rendered.kept
                pixels = torch.from_numpy(targets.pixels(held)).permute(0, 3, 1, 2)
                assert torch.equal(pixels, rendered.pixels[view])
                draws = held.draws
                assert (draws[:, -2:].min(axis=1) <= settings.view.kept_side).all()  # photographs of up to 59


def test_stored_and_replayed_views_are_not_mistaken_for_each_other(
    target_root, stored_root, photos, tmp_path, extract_settings
):
    for root, asked in ((target_root, "stored"), (stored_root, "replayed")):
        before = contents(root)
        there = {"stored": "replayed", "replayed": "stored"}[asked]
        with pytest.raises(MismatchError, match=f"this set {there}, settings {asked}") as caught:
            extract_targets(photos, root, extract_settings(view={"pixels": asked}), report=Silent())
        assert f"--set view.pixels={there}" in caught.value.fix
        assert contents(root) == before
    # Sets from before views were replayed do not record this, and have stored views.
    assert "pixels" not in open_artifact(stored_root).identity["settings"]["view"]
    assert TargetSet(stored_root).replayed is None


def test_views_are_added_from_the_images_kept(photos, tmp_path, extract_settings, monkeypatch):
    """Reducing an image again could give other pixels with another version of a library."""
    extract_targets(photos, tmp_path / "set", extract_settings(views=1), report=Silent())
    rendering = importlib.import_module("cae2pipe.targets.rendering")
    monkeypatch.setattr(rendering, "keep_image", None)
    monkeypatch.setattr(rendering, "decode_rgb", None)
    extract_targets(photos, tmp_path / "set", extract_settings(views=3), report=Silent())
    assert TargetSet(tmp_path / "set").views == 3


def test_images_longer_than_a_jpeg_can_be_are_reduced(tmp_path, extract_settings):
    (tmp_path / "images" / "class").mkdir(parents=True)
    for name, size in (("wide", (65501, 2)), ("tall", (2, 65501)), ("dot", (1, 1))):
        Image.new("RGB", size, "red").save(tmp_path / "images" / "class" / f"{name}.png")
    settings = extract_settings(views=1, codec={"name": "int8", "calibration": 4})
    extract_targets(tmp_path / "images", tmp_path / "set", settings, report=Silent())
    assert len(TargetSet(tmp_path / "set")) == 3


def test_a_view_that_comes_out_otherwise_is_told(stored_root, photos, tmp_path, extract_settings, monkeypatch):
    root = tmp_path / "set"
    shutil.copytree(stored_root, root)
    (root / "views/v01/000001.tar").unlink()
    rendering = importlib.import_module("cae2pipe.targets.rendering")
    real = rendering.encode_jpeg
    monkeypatch.setattr(rendering, "encode_jpeg", lambda image, settings: real(image.rotate(180), settings))
    said: list[str] = []
    report = Silent()
    monkeypatch.setattr(report, "log", said.append)
    extract_targets(photos, root, extract_settings(view={"pixels": "stored"}), report=report)
    assert [text for text in said if "differs from its earlier content" in text and "v01/000001" in text]


def test_attention_is_kept_for_a_vit(target_root):
    attention = TargetSet(target_root).reader("v00/000000").arrays(0, ["attention"])["attention"]
    assert attention.shape == (64, 16)
    assert (attention.max(axis=1) == 255).all()
    assert attention.min() < 255
