"""Any image to RGB: results for every kind of file, and only ImageError for bad ones."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from cae2pipe.errors import ImageError
from cae2pipe.images import decode
from cae2pipe.images.decode import check_decodes, decode_rgb


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_rgb(data, where="test.jpg")
    assert image.mode == "RGB"
    return np.asarray(image)


def picture(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3), smooth enough for JPEG to keep."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_their_pixels_whatever_the_name(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(save(Image.fromarray(picture()), kind, **options)), picture())


def test_jpeg_agrees_with_pillow_bit_for_bit():
    data = save(Image.fromarray(picture()), "JPEG", quality=90)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_greyscale_has_three_equal_channels(kind):
    result = pixels(save(Image.fromarray(picture()).convert("L"), kind))
    assert result.shape == (24, 32, 3)
    assert (result == result[..., :1]).all()
    assert result.std() > 10


def test_sixteen_bit_grey_is_scaled_and_not_cut_off():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for data in (
        save(Image.fromarray(levels * 257), "PNG"),
        save(Image.fromarray(levels * 257), "TIFF"),
        save(Image.fromarray((levels * 257).astype(np.int32)), "TIFF"),
        b"P5 16 16 65535\n" + (levels * 257).astype(">u2").tobytes(),
    ):
        np.testing.assert_array_equal(pixels(data)[..., 1], levels)


def test_values_between_levels_are_rounded():
    grey = np.array([[0, 128, 129, 65406, 65407, 65535]], dtype=np.uint16)
    assert pixels(save(Image.fromarray(grey), "PNG"))[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


def test_alpha_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 51, 255)
    result = pixels(save(Image.fromarray(rgba), "PNG"))[0]
    # 200 at a fifth over 255, 0 at a fifth over 255
    assert result.tolist() == [[255, 255, 255], [244, 204, 204], [200, 0, 0]]


def test_transparency_of_every_other_kind_is_laid_over_white():
    grey_alpha = np.array([[[10, 0], [10, 255]]], dtype=np.uint8)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 10, 10, 20, 20, 20])
    palette.putdata([0, 1])
    rgb = Image.fromarray(np.array([[[7, 8, 9], [20, 20, 20]]], dtype=np.uint8))
    cases = {
        "grey with alpha": (save(Image.fromarray(grey_alpha), "PNG"), 10),
        "palette with alphas": (save(palette, "PNG", transparency=bytes([0, 255])), 20),
        "palette with one clear entry": (save(palette, "GIF", transparency=0), 20),
        "one clear colour": (save(rgb, "PNG", transparency=(7, 8, 9)), 20),
        "grey with one clear level": (save(rgb.convert("L"), "PNG", transparency=8), 20),
    }
    for name, (data, opaque) in cases.items():
        assert pixels(data)[0].tolist() == [[255] * 3, [opaque] * 3], name


def test_palette_and_bilevel():
    quantized = Image.fromarray(picture()).quantize(16)
    np.testing.assert_array_equal(pixels(save(quantized, "GIF")), np.asarray(quantized.convert("RGB")))
    checks = np.indices((8, 8)).sum(0) % 2 == 0
    np.testing.assert_array_equal(pixels(save(Image.fromarray(checks), "PNG"))[..., 0], np.where(checks, 255, 0))


def test_cmyk():
    inks = np.zeros((1, 4, 4), dtype=np.uint8)
    inks[0] = [[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]
    expected = [[255, 255, 255], [0, 255, 255], [255, 0, 0], [0, 0, 0]]
    assert pixels(save(_cmyk(inks), "TIFF"))[0].tolist() == expected
    blocks = np.kron(inks, np.ones((16, 16, 1), dtype=np.uint8))
    data = save(_cmyk(blocks), "JPEG", quality=95)
    centres = pixels(data)[8, 8::16].astype(int)
    assert np.abs(centres - np.array(expected)).max() <= 6


def test_ycck():
    # Flat grey-blue in YCCK: Pillow writes CMYK only, so its file's colour transform is relabelled as 2.
    inks = np.full((16, 16, 4), 255, dtype=np.uint8)
    inks[..., :3] = 128
    data = save(_cmyk(inks), "JPEG", quality=95)
    position = data.index(b"Adobe") + 11
    assert data[position] == 0
    ycck = data[:position] + b"\x02" + data[position + 1 :]
    assert Image.open(io.BytesIO(ycck)).mode == "CMYK"
    result = pixels(ycck)
    assert result.shape == (16, 16, 3)
    assert result.std(axis=(0, 1)).max() == 0


def _cmyk(inks: np.ndarray) -> Image.Image:
    return Image.frombytes("CMYK", (inks.shape[1], inks.shape[0]), inks.tobytes())


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(picture()), "PNG", exif=exif.tobytes())
    np.testing.assert_array_equal(pixels(data), UPRIGHT[orientation](picture()))


def test_a_broken_exif_block_is_no_obstacle():
    data = save(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert pixels(data).shape == (24, 32, 3)


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(picture(seed=seed)).quantize(64) for seed in (0, 1)]
    data = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0].convert("RGB")))


JPEG = save(Image.fromarray(picture()), "JPEG", quality=90)
PNG = save(Image.fromarray(picture()), "PNG")


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_truncated_file_is_an_error(kind, kept):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = save(Image.fromarray(picture(96, 128)), kind)
    with pytest.raises(ImageError, match="cannot be decoded") as caught:
        decode_rgb(data[: int(len(data) * kept)], where="a/b.jpg")
    assert caught.value.where == "a/b.jpg"
    assert caught.value.fix


@pytest.mark.parametrize("data", [b"", b"text\n", b"\xff\xd8\xff", b"GIF89a", b"\0" * 1000, b"<svg/>"], ids=repr)
def test_what_is_no_image_is_an_error_that_is_the_same_every_time(data):
    reasons = set()
    for _ in range(3):
        with pytest.raises(ImageError) as caught:
            decode_rgb(data, where="x")
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


def test_formats_that_other_programs_decode_are_refused(monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(ImageError):
        decode_rgb(data, where="x.jpg")


def test_decompression_bombs_are_errors_and_large_pictures_are_not(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(PNG))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert pixels(PNG).shape == (24, 32, 3)
    assert caught == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(ImageError, match=r"too large.*decompression bomb") as caught:
        decode_rgb(PNG, where="x")
    assert "scale it down" in caught.value.fix


def test_a_bomb_in_a_text_chunk_is_left_out(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 100)
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 10_000, zip=True)
    data = save(Image.fromarray(picture()), "PNG", pnginfo=info)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(pixels(data), picture())


SEEDS = [JPEG, PNG, *(save(Image.fromarray(picture()), kind) for kind in ("WEBP", "GIF", "TIFF", "BMP", "AVIF"))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    kept=st.floats(0, 1),
)
def test_damaged_bytes_give_an_rgb_image_or_an_image_error(data, changes, kept):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    if not changes:
        damaged = damaged[: int(len(damaged) * kept)]
    try:
        image = decode_rgb(bytes(damaged), where="x")
    except ImageError:
        return
    assert image.mode == "RGB"
    assert len(image.tobytes()) == 3 * image.width * image.height


def refusal(check, data: bytes) -> str | None:
    try:
        check(data, "test.jpg")
    except ImageError as error:
        return str(error)
    return None


def jpeg_kinds() -> dict[str, bytes]:
    image = Image.fromarray(picture(45, 61))
    kinds = {
        "4:4:4": save(image, "JPEG", subsampling="4:4:4"),
        "4:2:2": save(image, "JPEG", subsampling="4:2:2"),
        "4:2:0": save(image, "JPEG", subsampling="4:2:0"),
        "progressive": save(image, "JPEG", progressive=True),
        "restarts": save(image, "JPEG", restart_marker_blocks=2),
        "RGB": save(image, "JPEG", keep_rgb=True),
        "small": save(image.crop((0, 0, 3, 1)), "JPEG"),
    }
    # 4:4:0 and 4:1:1, which Pillow does not write: the sampling factors of luma, exchanged.
    frame = kinds["4:2:2"].index(b"\xff\xc0") + 11
    for name, factors in (("4:4:0", 0x12), ("4:1:1", 0x41)):
        kinds[name] = kinds["4:2:2"][:frame] + bytes((factors,)) + kinds["4:2:2"][frame + 1 :]
    return kinds


@pytest.mark.parametrize("kind", list(jpeg_kinds()))
def test_jpegs_are_checked_without_being_decoded_at_full_size(monkeypatch, kind):
    data = jpeg_kinds()[kind]
    decode_rgb(data, "test.jpg")
    monkeypatch.setattr(decode, "decode_rgb", None)
    check_decodes(data, "test.jpg")


@pytest.mark.parametrize("kind", ["L", "CMYK", "fractions", "PNG"])
def test_other_images_are_checked_at_full_size(monkeypatch, kind):
    image = Image.fromarray(picture())
    if kind == "PNG":
        data = save(image, "PNG")
    else:
        data = save(image.convert("RGB" if kind == "fractions" else kind), "JPEG", subsampling="4:4:4")
    if kind == "fractions":  # chroma of 3 x 1 to luma's 1 x 1
        frame = data.index(b"\xff\xc0")
        data = data[: frame + 14] + b"\x31" + data[frame + 15 :]
    seen = []
    monkeypatch.setattr(decode, "decode_rgb", lambda data, where: seen.append(data))
    check_decodes(data, "test.jpg")
    assert seen == [data]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.sampled_from([save(Image.fromarray(picture()), "PNG"), *jpeg_kinds().values()]),
    changes=st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), max_size=4),
    kept=st.floats(0, 1),
)
def test_the_check_refuses_what_cannot_be_decoded_in_the_same_words(data, changes, kept):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    # Half of the files are whole.
    damaged = bytes(damaged[: int(min(1, 2 * kept) * len(damaged))])
    assert refusal(check_decodes, damaged) == refusal(decode_rgb, damaged)


def test_real_photographs_all_decode(real):
    paths = sorted((real / "imagenet-samples").rglob("*.JPEG"))[:40]
    assert len(paths) == 40
    for path in paths:
        assert min(decode_rgb(path.read_bytes(), path).size) > 50
