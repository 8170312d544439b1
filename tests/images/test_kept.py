"""A view's pixels from what a set stores, written where they belong."""

import numpy as np
import pytest

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import ImageError
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.jpeg import open_jpeg
from cae2pipe.images.kept import keep_image, view_into, view_pixels
from cae2pipe.images.views import draw_view, encode_jpeg, render_view
from tests.images.test_stored_view import picture

REPLAYED = ViewSettings(size=32, pixels="replayed")
JPEG = keep_image(picture(60, 80), REPLAYED)
DRAW = draw_view(REPLAYED, 0, "key", view=0, height=open_jpeg(JPEG).height, width=open_jpeg(JPEG).width)


def stored() -> bytes:
    return encode_jpeg(render_view(open_jpeg(JPEG), DRAW, REPLAYED), REPLAYED)


@pytest.mark.parametrize("replayed", [None, REPLAYED], ids=["stored", "replayed"])
def test_pixels_are_written_into_the_row_that_is_given(replayed):
    data = JPEG if replayed else stored()
    wanted = render_view(open_jpeg(JPEG), DRAW, REPLAYED) if replayed else decode_rgb(data, "view")
    batch = np.full((3, 32, 32, 3), 7, dtype=np.uint8)
    view_into(data, DRAW.to_row(), replayed, batch[1])
    np.testing.assert_array_equal(batch[1], np.asarray(wanted))
    assert (batch[::2] == 7).all()
    np.testing.assert_array_equal(view_pixels(data, DRAW.to_row(), replayed, size=32), np.asarray(wanted))


@pytest.mark.parametrize("replayed", [None, REPLAYED], ids=["stored", "replayed"])
def test_an_image_of_another_size_is_an_error(replayed):
    data = encode_jpeg(picture(31, 33), REPLAYED)
    with pytest.raises(ImageError, match="33 x 31"):
        view_into(data, DRAW.to_row(), replayed, np.empty((32, 32, 3), dtype=np.uint8))
