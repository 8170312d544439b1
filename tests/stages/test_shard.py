import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cae2pipe.cli import app
from cae2pipe.config.extract import ShardSettings, ShardSpeed
from cae2pipe.errors import SourceError
from cae2pipe.runtime.progress import Silent
from cae2pipe.shards.build import build_shard_set
from cae2pipe.shards.shard_set import ShardSet
from cae2pipe.stages.shard import shard_images
from tests.conftest import contents, write_photos

SETTINGS = ShardSettings(samples=8, speed=ShardSpeed(workers=0))


@pytest.fixture
def source(tmp_path) -> Path:
    """24 images in three classes."""
    return write_photos(tmp_path / "source", classes=3, each=8)


def test_splits_make_a_shard_set_each(source, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(source, root / "train")
    shutil.copytree(source / "class0", root / "val" / "class0")
    made = shard_images(root, tmp_path / "out", SETTINGS, report=Silent())
    assert [(shards.root, shards.images) for shards in made] == [
        (tmp_path / "out/train", 24),
        (tmp_path / "out/val", 8),
    ]
    alone = build_shard_set(source, tmp_path / "alone", SETTINGS, report=Silent())
    assert contents(tmp_path / "out/train") == contents(alone.root)
    with pytest.raises(SourceError, match="splits train, val"):
        build_shard_set(root, tmp_path / "other", SETTINGS, report=Silent())


def test_all_splits_are_looked_at_before_the_first_is_packed(source, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(source, root / "train")
    (root / "val" / "class0").mkdir(parents=True)
    with pytest.raises(SourceError, match="empty"):
        shard_images(root, tmp_path / "out", SETTINGS, report=Silent())
    assert not (tmp_path / "out").exists()


def test_the_command_line(source, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(source, root / "train")
    shutil.copytree(source / "class0", root / "test" / "class0")
    arguments = ["shard", str(root), str(tmp_path / "out"), "--workers", "0", "--set", "samples=8"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert ShardSet.open(tmp_path / "out" / "train").images == 24
    assert ShardSet.open(tmp_path / "out" / "test").images == 8
    for bad in (tmp_path / "nothing", source / "class0" / "image000.jpg"):
        result = CliRunner().invoke(app, ["shard", str(bad), str(tmp_path / "bad")])
        assert result.exit_code == 2
        assert "fix:" in result.stderr
        assert not (tmp_path / "bad").exists()
