"""One image of a set: its views and their crop boxes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cae2pipe.images.views import ViewDraw
from cae2pipe.targets.stored_image import crop_box, find_image, read_stored_image
from cae2pipe.targets.target_set import TargetSet


def test_boxes_are_those_of_the_unflipped_image():
    draw = ViewDraw(2, 5, 10, 20, False, 1.0, 1.0, 1.0, 0, 40, 60)
    assert crop_box(draw) == (5, 2, 25, 12)
    flipped = ViewDraw(2, 5, 10, 20, True, 1.0, 1.0, 1.0, 0, 40, 60)
    assert crop_box(flipped) == (60 - 25, 2, 60 - 5, 12)


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_stored_of_an_image(kept, target_root, stored_root, photos):
    targets = TargetSet(target_root if kept else stored_root)
    shard, position = find_image(targets, "class2+image011")
    stored = read_stored_image(targets, shard, position)
    assert stored.key == "class2+image011"
    with Image.open(photos / "class2" / "image011.jpg") as photo:
        assert (stored.width, stored.height) == photo.size, "too small to be reduced"
        if kept:
            assert np.abs(stored.picture.astype(float) - np.asarray(photo)).mean() < 8, "JPEG's error"
    assert (stored.picture is not None) == kept
    assert [view.number for view in stored.views] == [0, 1]
    for view in stored.views:
        left, top, right, bottom = view.box
        assert 0 <= left < right <= stored.width
        assert 0 <= top < bottom <= stored.height
        item = next(item for item in targets if (item.key, item.view) == (stored.key, view.number))
        assert np.array_equal(view.pixels, item.pixels)
        unit = item.tokens[1:] / np.linalg.norm(item.tokens[1:], axis=1, keepdims=True)
        np.testing.assert_allclose(view.latents, unit, atol=1e-6)
    assert not np.array_equal(stored.views[0].pixels, stored.views[1].pixels)
    assert [view.number for view in read_stored_image(targets, shard, position, [1, 7]).views] == [1]


def test_an_unknown_key(target_root):
    with pytest.raises(KeyError, match="class9"):
        find_image(TargetSet(target_root), "class9+image000")
