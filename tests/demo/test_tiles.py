import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cae2pipe.demo import tiles
from cae2pipe.demo.tiles import PHOTOGRAPHS, SIDES, SPLITS, Photograph, cut_tiles, find_photograph, place_tile
from cae2pipe.errors import MismatchError, SourceError
from cae2pipe.runtime.progress import Silent
from tests.conftest import contents, snapshot

ONE = (Photograph("rocket", "skimage", "data/rocket.jpg"),)


@given(st.integers(330, 1500), st.integers(330, 1500), st.integers(0, 10**6))
def test_training_and_test_tiles_share_no_pixel(width, height, seed):
    across = width >= height
    for number in range(4):
        train = place_tile(width, height, "train", seed, number)
        val = place_tile(width, height, "val", seed, number)
        for tile in (train, val):
            left, top, right, bottom = tile.box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert SIDES[0] <= tile.side <= SIDES[1]
        cut = 2 * max(width, height) // 3
        assert train.box[2 if across else 3] <= cut <= val.box[0 if across else 1]


def test_a_part_too_small_for_the_smallest_tile_gives_what_it_holds():
    assert place_tile(150, 90, "val", 0).side == 50
    assert place_tile(90, 150, "train", 0).side <= 90


def test_tiles_depend_on_their_key():
    assert place_tile(600, 400, "train", 0, "a") == place_tile(600, 400, "train", 0, "a")
    assert len({place_tile(600, 400, "train", 0, name) for name in "abcdefgh"}) > 4


def test_all_photographs_are_shipped():
    assert len({photograph.name for photograph in PHOTOGRAPHS}) == 16
    for photograph in PHOTOGRAPHS:
        with Image.open(find_photograph(photograph)) as image:
            assert min(image.size) >= 300


def test_cutting_twice_gives_the_same_bytes_and_then_nothing(tmp_path):
    counts = cut_tiles(tmp_path / "a", 0, Silent(), photographs=ONE)
    cut_tiles(tmp_path / "b", 0, Silent(), photographs=ONE)
    assert counts == SPLITS
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["tiles.json", "train", "val"]
    before, report = snapshot(tmp_path / "a"), Silent()
    assert cut_tiles(tmp_path / "a", 0, report, photographs=ONE) == counts
    assert snapshot(tmp_path / "a") == before
    assert any("nothing to do" in line for line in report.lines)


def test_the_seed_moves_the_tiles(tmp_path):
    for seed in (0, 1):
        cut_tiles(tmp_path / str(seed), seed, Silent(), photographs=ONE)
    first, second = (contents(tmp_path / str(seed)) for seed in (0, 1))
    assert all(first[name] != second[name] for name in first)


def test_the_tiles_are_the_photographs_pixels(tmp_path):
    cut_tiles(tmp_path / "out", 0, Silent(), photographs=ONE)
    with Image.open(find_photograph(ONE[0])) as file:
        photograph = file.convert("RGB")
    artifact = place_tile(*photograph.size, "val", 0, "rocket", "val", 3).box
    with Image.open(tmp_path / "out" / "val" / "rocket" / "03.jpg") as tile:
        error = np.asarray(tile, dtype=float) - np.asarray(photograph.crop(artifact), dtype=float)
    assert np.abs(error).mean() < 2


def test_large_photographs_are_shrunk(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "SPLITS", {"train": 1, "val": 1})
    seen = []
    monkeypatch.setattr(
        tiles, "place_tile", lambda width, height, *key: seen.append((width, height)) or tiles.Tile(0, 0, 9)
    )
    cut_tiles(tmp_path / "out", 0, Silent(), photographs=(Photograph("retina", "skimage", "data/retina.jpg"),))
    assert {max(size) for size in seen} == {tiles.LONGEST}


@pytest.mark.parametrize(
    ("package", "file", "message"),
    [("no_such_package", "data/x.png", "not installed"), ("skimage", "data/no_such_photograph.png", "lacks")],
)
def test_a_missing_package_or_photograph_is_named_with_its_remedy(tmp_path, package, file, message):
    with pytest.raises(SourceError, match=message) as caught:
        cut_tiles(tmp_path / "out", 0, Silent(), photographs=(Photograph("x", package, file),))
    assert caught.value.fix == "pip install 'cae2pipe[demo]'"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(MismatchError, match="does not contain"):
        cut_tiles(tmp_path / "mine", 0, Silent(), photographs=ONE)


@pytest.mark.parametrize("damage", ["lost tile", "other seed"])
def test_other_tiles_are_refused(tmp_path, damage):
    out = tmp_path / "out"
    cut_tiles(out, 0, Silent(), photographs=ONE)
    if damage == "lost tile":
        (out / "val" / "rocket" / "00.jpg").unlink()
    else:
        record = json.loads((out / "tiles.json").read_text())
        (out / "tiles.json").write_text(json.dumps({**record, "seed": 7}))
    with pytest.raises(MismatchError, match="differ"):
        cut_tiles(out, 0, Silent(), photographs=ONE)
