"""Stored views by simplejpeg: Pillow's pixels and errors, for whatever bytes."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import ImageError
from cae2pipe.images import stored_view
from cae2pipe.images.jpeg import decode_into, decode_view
from cae2pipe.images.stored_view import decode_written, simplejpeg_decoder, written_sides
from cae2pipe.images.views import encode_jpeg

SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]


@pytest.fixture(autouse=True)
def fresh_decoder():
    simplejpeg_decoder.cache_clear()
    yield
    simplejpeg_decoder.cache_clear()


@pytest.fixture
def simplejpeg():
    return pytest.importorskip("simplejpeg")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Slopes and noise, so that neither luma nor chroma is flat."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = generator.integers(-30, 31, size=(height, width, 3))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def written(height: int, width: int, **values) -> bytes:
    return encode_jpeg(picture(height, width), ViewSettings(**values))


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def result(data: bytes, shape: tuple[int, ...]) -> bytes | tuple[str, str]:
    """Pixels, or what the error says."""
    out = np.empty(shape, dtype=np.uint8)
    try:
        decode_into(data, out)
    except ImageError as error:
        return error.what, str(error.fix)
    return out.tobytes()


def pillows(data: bytes, shape: tuple[int, ...]) -> bytes | tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_view, "simplejpeg_decoder", lambda: None)
        return result(data, shape)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("quality", [1, 50, 90, 100])
def test_every_view_as_written_is_taken(simplejpeg, subsampling, quality):
    for height, width in ((1, 1), (7, 9), (16, 33), (224, 224), (320, 427)):
        data = written(height, width, quality=quality, subsampling=subsampling)
        assert written_sides(data) == (height, width)
        out = np.empty((height, width, 3), dtype=np.uint8)
        assert decode_written(data, out)
        np.testing.assert_array_equal(out, np.asarray(Image.open(io.BytesIO(data))))


def test_real_photographs_bit_for_bit(simplejpeg, real):
    files = sorted((real / "imagenet-samples").rglob("*.JPEG"))
    for number, path in enumerate(files[::3]):
        with Image.open(path) as image:
            chosen = ViewSettings(quality=80 + number % 21, subsampling=SUBSAMPLINGS[number % 3])
            data = encode_jpeg(image.convert("RGB"), chosen)
        out = np.empty((*written_sides(data), 3), dtype=np.uint8)
        assert decode_written(data, out)
        np.testing.assert_array_equal(out, np.asarray(Image.open(io.BytesIO(data))))


CUT, FLIP, INSERT, DELETE, REPEAT = range(5)
changes = st.lists(
    st.tuples(st.integers(0, 4), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3)), max_size=3
)


def damaged(data: bytes, kind: int, place: float, bytes_: bytes) -> bytes:
    at, count = int(place * len(data)), len(bytes_)
    if kind == CUT:
        return data[:at]
    if kind == FLIP:
        return data[:at] + bytes((data[at] ^ (1 << bytes_[0] % 8),)) + data[at + 1 :] if data else data
    if kind == INSERT:
        return data[:at] + bytes_ + data[at:]
    if kind == DELETE:
        return data[:at] + data[at + count :]
    return data[:at] + data[at : at + 20 * count] + data[at:]


@settings(max_examples=300, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from(SUBSAMPLINGS),
    changes=changes,
)
def test_damage_gives_pillows_pixels_or_pillows_error(sides, quality, subsampling, changes):
    data = written(*sides, quality=quality, subsampling=subsampling)
    for change in changes:
        data = damaged(data, *change)
    assert result(data, (*sides, 3)) == pillows(data, (*sides, 3))


def test_flipped_bits_among_the_coefficients_give_pillows_pixels(simplejpeg):
    # libjpeg notices few of them, so that simplejpeg decodes most of these.
    data, taken = written(48, 48), 0
    start = data.index(b"\xff\xda")
    for at in range(start, len(data), 17):
        changed = damaged(data, FLIP, (at + 0.5) / len(data), bytes((at % 8,)))
        assert result(changed, (48, 48, 3)) == pillows(changed, (48, 48, 3))
        taken += decode_written(changed, np.empty((48, 48, 3), dtype=np.uint8))
    assert taken > 20


def test_a_view_that_ends_early_is_an_error(simplejpeg):
    data = written(32, 32)
    for end in (len(data) - 40, 700, 600, 100):
        assert not decode_written(data[:end], np.empty((32, 32, 3), dtype=np.uint8))
        with pytest.raises(ImageError, match="cannot be decoded"):
            decode_into(data[:end], np.empty((32, 32, 3), dtype=np.uint8))
    # Nothing but the last marker is missing: Pillow decodes it.
    assert not decode_written(data[:-2], np.empty((32, 32, 3), dtype=np.uint8))
    assert result(data[:-2], (32, 32, 3)) == result(data, (32, 32, 3))


def other_jpegs() -> dict[str, bytes]:
    """What Pillow decodes."""
    image = picture(33, 47)
    with_exif = Image.Exif()
    with_exif[274] = 6
    return {
        "progressive": encoded(image, progressive=True),
        "own Huffman tables": encoded(image, optimize=True),
        "restart markers": encoded(image, restart_marker_blocks=3),
        "EXIF": encoded(image, exif=with_exif),
        "ICC": encoded(image, icc_profile=b"profile"),
        "comment": encoded(image, comment=b"comment"),
        "RGB, with an Adobe marker": encoded(image, keep_rgb=True),
        "grey": encoded(image.convert("L")),
        "CMYK": encoded(image.convert("CMYK")),
        "progressive CMYK": encoded(image.convert("CMYK"), progressive=True),
    }


@pytest.mark.parametrize("name", list(other_jpegs()))
def test_other_jpegs_are_left_to_pillow(name):
    data = other_jpegs()[name]
    assert written_sides(data) is None
    assert not decode_written(data, np.empty((33, 47, 3), dtype=np.uint8))
    assert result(data, (33, 47, 3)) == pillows(data, (33, 47, 3))


@pytest.mark.parametrize("sampling", ["440", "411"])
def test_other_samplings_are_left_to_pillow(simplejpeg, sampling):
    data = simplejpeg.encode_jpeg(np.asarray(picture(33, 47)), colorsubsampling=sampling)
    assert written_sides(data) is None
    assert result(data, (33, 47, 3)) == np.asarray(Image.open(io.BytesIO(data))).tobytes()


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    data = written(20, 30)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert simplejpeg_decoder() is None
    assert not decode_written(data, np.empty((20, 30, 3), dtype=np.uint8))
    wanted = np.asarray(Image.open(io.BytesIO(data)))
    assert result(data, (20, 30, 3)) == wanted.tobytes()
    np.testing.assert_array_equal(decode_view(data), wanted)


def test_a_pillow_with_another_libjpeg_decodes_itself(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "libjpeg_turbo")
    assert simplejpeg_decoder() is None


def test_a_row_of_a_batch_is_written_and_no_other(simplejpeg):
    batch = np.full((3, 20, 30, 3), 7, dtype=np.uint8)
    data = written(20, 30)
    decode_into(data, batch[1])
    np.testing.assert_array_equal(batch[1], np.asarray(Image.open(io.BytesIO(data))))
    assert (batch[::2] == 7).all()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((20, 30, 3), dtype=np.float32),
        np.zeros((20, 60, 3), dtype=np.uint8)[:, ::2],
        np.zeros((3, 20, 30), dtype=np.uint8).transpose(1, 2, 0),
    ],
    ids=["another type", "strides", "planes"],
)
def test_pillow_decodes_into_what_simplejpeg_cannot_write(out):
    data = written(20, 30)
    decode_into(data, out)
    np.testing.assert_array_equal(out, np.asarray(Image.open(io.BytesIO(data))))


def test_a_view_of_another_size_is_an_error():
    with pytest.raises(ImageError, match="a stored view has 30 x 20 pixels instead of 20 x 30"):
        decode_into(written(20, 30), np.empty((30, 20, 3), dtype=np.uint8))


def test_pillow_judges_images_that_are_too_large(monkeypatch):
    data = written(20, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    assert not decode_written(data, np.empty((20, 30, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match="decompression bomb"):
        decode_view(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_view(data).shape == (20, 30, 3)
