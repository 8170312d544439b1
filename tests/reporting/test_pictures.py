import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cae2pipe.reporting.pictures import (
    PALETTE,
    captioned,
    colour_basis,
    enlarge,
    hide_patches,
    jpeg_uri,
    latent_colours,
    outline_boxes,
    png_uri,
    resized_picture,
    tiled,
)


@pytest.fixture
def latents() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 8)) * np.array([9, 5, 3, 0.1, 0.1, 0.1, 0.1, 0.1]) + 4


def test_the_basis_finds_the_axes_of_largest_variance(latents):
    basis = colour_basis(latents)
    assert basis.axes.shape == (8, 3)
    np.testing.assert_allclose(basis.axes.T @ basis.axes, np.eye(3), atol=1e-10)
    # Here these are the first three coordinates, largest variance first, signs positive.
    np.testing.assert_allclose(basis.axes[:3], np.eye(3), atol=0.15)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_colours_do_not_hang_on_rotation_or_offset(seed):
    """PCA up to the axes' signs: each channel is kept or inverted."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(64, 6)) * np.array([8, 4, 2, 0.1, 0.1, 0.1])
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a = latent_colours(tokens, 8, 8, basis=colour_basis(tokens)).astype(int)
    moved = tokens @ turn + 7
    b = latent_colours(moved, 8, 8, basis=colour_basis(moved)).astype(int)
    for channel in range(3):
        same, inverted = np.abs(a - b)[..., channel].max(), np.abs(255 - a - b)[..., channel].max()
        assert min(same, inverted) <= 1


def test_colours_use_the_whole_range_and_clip(latents):
    basis = colour_basis(latents)
    picture = latent_colours(latents, 15, 20, basis=basis)
    assert picture.shape == (15, 20, 3)
    assert picture.dtype == np.uint8
    assert picture.min() == 0
    assert picture.max() == 255
    assert latent_colours(latents * 100, 15, 20, basis=basis).shape == (15, 20, 3)


def test_like_latents_have_equal_colours_and_the_middle_is_grey(latents):
    basis = colour_basis(latents)
    middle = basis.mean + basis.axes @ ((basis.low + basis.high) / 2)
    picture = latent_colours(np.stack([middle] * 4), 2, 2, basis=basis)
    assert (picture == 128).all()


def test_constant_latents_do_no_harm():
    basis = colour_basis(np.ones((10, 5)))
    assert latent_colours(np.ones((4, 5)), 2, 2, basis=basis).shape == (2, 2, 3)


def test_hidden_patches_are_painted_and_no_others():
    view = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 2] = True
    shown = hide_patches(view, mask, fill=(100, 100, 100), strength=1.0)
    assert (shown[8:16, 16:24] == 100).all()
    other = np.ones((32, 32), dtype=bool)
    other[8:16, 16:24] = False
    assert np.array_equal(shown[other], view[other])


def test_enlarging_repeats_pixels_at_any_size():
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = enlarge(picture, 5, 4)
    assert large.shape == (5, 4, 3)
    assert np.array_equal(np.unique(large.reshape(-1, 3), axis=0), np.unique(picture.reshape(-1, 3), axis=0))
    assert np.array_equal(large[0, 0], picture[0, 0])
    assert np.array_equal(large[-1, -1], picture[-1, -1])


def test_boxes_are_outlined_in_their_own_colours():
    shown = outline_boxes(np.zeros((40, 50, 3), dtype=np.uint8), [(0, 0, 20, 20), (25, 10, 50, 40)], width=1)
    assert tuple(shown[0, 5]) == PALETTE[0]
    assert tuple(shown[39, 30]) == PALETTE[1]
    assert tuple(shown[20, 40]) == (0, 0, 0)


def test_sheets():
    black = np.zeros((10, 20, 3), dtype=np.uint8)
    sheet = tiled([[black, black], [black]], gap=4)
    assert sheet.shape == (24, 44, 3)
    assert (sheet[:10, 20:24] == 255).all()
    assert (sheet[14:, 24:] == 255).all()
    page = captioned(sheet, [(10, "left"), (34, "right")], height=20, margin=5)
    assert page.shape == (24 + 20 + 10, 54, 3)
    assert np.array_equal(page[25:49, 5:49], sheet)
    assert (page[5:25] < 255).any()


def test_data_uris_hold_the_picture():
    picture = np.random.default_rng(1).integers(0, 256, size=(7, 9, 3), dtype=np.uint8)
    kind, _, data = png_uri(picture).partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), picture)
    kind, _, data = jpeg_uri(resized_picture(picture, 14, 18)).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (18, 14)
