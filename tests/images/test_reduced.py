"""Stored views read at a student's smaller size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import ImageError
from cae2pipe.images.jpeg import decode_view
from cae2pipe.images.kept import keep_image, view_pixels
from cae2pipe.images.reduced import reduced_view, reduced_views
from cae2pipe.images.views import draw_view, encode_jpeg, render_view, resize
from tests.images.test_stored_view import picture

STORED = ViewSettings(size=64, pixels="stored")


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 99))
def test_a_batch_on_a_device_has_pillows_pixels(size, more, seed):
    views = np.random.default_rng(seed).integers(0, 256, (2, size + more, size + more, 3), dtype=np.uint8)
    wanted = np.stack([np.asarray(reduced_view(Image.fromarray(view), size)) for view in views])
    batch = reduced_views(torch.from_numpy(views).permute(0, 3, 1, 2), size)
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1), wanted)


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 6, 7])
def test_whole_factors_give_the_rounded_mean_of_whole_pixels(factor):
    view = np.random.default_rng(factor).integers(0, 256, (6 * factor, 6 * factor, 3), dtype=np.uint8)
    exact = view.reshape(6, factor, 6, factor, 3).mean(axis=(1, 3))
    reduced = np.asarray(reduced_view(Image.fromarray(view), 6))
    assert np.abs(reduced - exact).max() < 0.6  # Pillow multiplies by a reciprocal that is rounded down
    batch = torch.from_numpy(view).permute(2, 0, 1).expand(3, -1, -1, -1)
    np.testing.assert_array_equal(reduced_views(batch, 6)[2].permute(1, 2, 0), reduced)


@pytest.mark.parametrize("size", [64, 32, 48])
def test_a_stored_view_is_decoded_at_its_size_and_then_reduced(size):
    jpeg = encode_jpeg(picture(64, 64), STORED)
    whole = Image.fromarray(decode_view(jpeg))
    wanted = {64: whole, 32: whole.reduce(2), 48: resize(whole, 48, 48)}[size]
    given_ = view_pixels(jpeg, np.zeros(11), None, size=size, view_size=64)
    np.testing.assert_array_equal(given_, np.asarray(wanted))
    with pytest.raises(ImageError, match="64 x 64 pixels instead of 80 x 80"):
        view_pixels(jpeg, np.zeros(11), None, size=size, view_size=80)


def test_a_replayed_view_is_cropped_at_the_students_size_from_the_same_box():
    chosen = ViewSettings(size=64)
    jpeg = keep_image(picture(150, 180), chosen)
    image = Image.fromarray(decode_view(jpeg))
    draw = draw_view(chosen, 0, "key", view=1, height=image.height, width=image.width)
    small = chosen.model_copy(update={"size": 32})
    given_ = view_pixels(jpeg, draw.to_row(), chosen, size=32, view_size=64)
    np.testing.assert_array_equal(given_, np.asarray(render_view(image, draw, small)))
    whole = render_view(image, draw, chosen)
    assert np.abs(given_.astype(int) - np.asarray(whole.reduce(2))).mean() < 4
