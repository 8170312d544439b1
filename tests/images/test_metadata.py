"""Broken EXIF, XMP and texts in files with intact pixels: the image is never lost, at most its orientation."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from cae2pipe.images import decode
from cae2pipe.images.decode import decode_rgb
from cae2pipe.images.metadata import read_orientation, without_metadata

PICTURE = np.stack([*np.indices((24, 32)) * 7, np.indices((24, 32)).sum(0)], -1).astype(np.uint8)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description dc:title='caf\xe9'/></x:xmpmeta>"
SIX = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


def save(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(data, "x"))


def directory(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of one directory: tag, type, count and four bytes of value or place each."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def with_app1(payload: bytes) -> bytes:
    data = save("JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]


def exif() -> Image.Exif:
    block = Image.Exif()
    block[0x010F], block[0x0112], block[0x011A], block[0x0132] = "Maker", 6, 72.0, "2020:01:01 00:00:00"
    block.get_ifd(0x8769)[0x829A] = TiffImagePlugin.IFDRational(1, 60)
    return block


def texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 100)
    info.add_text("packed", "y" * 2000, zip=True)
    return info


@pytest.mark.parametrize(
    "broken",
    [
        (0x0100, 9, 1, struct.pack("<i", -5)),  # a value that cannot be written again
        (0x011A, 2, 3, b"72\0\0"),  # a resolution that is text
        (0x8769, 4, 1, struct.pack("<I", 90000)),
        (0x010F, 2, 9000, struct.pack("<I", 70000)),
        (0x010F, 99, 1, b"0210"),
    ],
)
def test_orientation_is_read_beside_what_is_broken(broken):
    expected = np.rot90(pixels(save("JPEG")), -1)
    for entries in ([SIX, broken], [broken, SIX]):
        np.testing.assert_array_equal(pixels(with_app1(directory(*entries))), expected)


@pytest.mark.parametrize("value", [0, 1, 9, 99])
def test_an_orientation_that_is_none_turns_nothing(value):
    entry = (0x0112, 3, 1, struct.pack("<HH", value, 0))
    np.testing.assert_array_equal(pixels(with_app1(directory(entry))), pixels(save("JPEG")))


@pytest.mark.parametrize("entry", [(0x0112, 2, 2, b"6\0\0\0"), (0x0112, 3, 2, struct.pack("<HH", 6, 6))])
def test_an_orientation_of_another_type_is_no_error(entry):
    assert sorted(pixels(with_app1(directory(entry))).shape) == [3, 24, 32]


def test_an_image_is_turned_once_and_upright_ones_are_not_copied():
    with Image.open(io.BytesIO(save("TIFF", exif=exif()))) as image:
        image.load()
        assert read_orientation(image) == 1  # Pillow turns TIFFs itself
    np.testing.assert_array_equal(pixels(save("TIFF", exif=exif())), np.rot90(PICTURE, -1))
    np.testing.assert_array_equal(pixels(save("PNG", exif=exif())), np.rot90(PICTURE, -1))


def bad_checksum() -> bytes:
    data = bytearray(save("PNG", pnginfo=texts()))
    data[data.index(b"tEXt") + 20] ^= 1
    return bytes(data)


def raw_profile() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n   10\nzznothex\n")
    return save("PNG", pnginfo=info)


def garbage_chunk() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"garbage!")
    return save("PNG", pnginfo=info)


def broken_avif() -> bytes:
    data = save("AVIF", exif=exif())
    block = data.rindex(b"MM\0*") if b"MM\0*" in data else data.rindex(b"II*\0")
    return data[:block] + b"garb" + data[block + 4 :]


def broken_tiff() -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = "a description"
    data = bytearray(save("TIFF", tiffinfo=info))
    struct.pack_into("<I", data, data.index(struct.pack("<HH", 270, 2)) + 8, 0xFFFFFFF0)  # beyond the end of the file
    return bytes(data)


WHOLE = {
    "a text that is too large": save("PNG", pnginfo=(texts())),
    "a text's checksum": bad_checksum(),
    "a raw profile": raw_profile(),
    "a PNG's EXIF": garbage_chunk(),
    "a WebP's EXIF": save("WEBP", exif=b"Exif\0\0garbage", lossless=True),
    "an AVIF's EXIF": broken_avif(),
    "a TIFF's description": broken_tiff(),
    "a JPEG's XMP": with_app1(XMP),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_pixels_are_taken(case, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 500)
    kind = "AVIF" if "AVIF" in case else "JPEG" if "JPEG" in case else "PNG"
    expected = pixels(save(kind))
    got = pixels(WHOLE[case])
    # Pillow writes an AVIF's orientation into the image's own properties.
    np.testing.assert_array_equal(np.rot90(got) if kind == "AVIF" else got, expected)


def test_transparency_stays_where_texts_are_left_out(monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert("L").save(buffer, "PNG", transparency=7, pnginfo=texts())
    expected = pixels(buffer.getvalue())
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 500)
    assert (expected == 255).any()
    np.testing.assert_array_equal(pixels(buffer.getvalue()), expected)


def jpeg_metadata(data: bytes) -> range:
    start = data.index(b"Exif\0\0")
    return range(start, start + struct.unpack_from(">H", data, start - 2)[0] - 2)


def png_metadata(data: bytes) -> range:
    return range(data.index(b"eXIf") + 4, data.index(b"IDAT") - 4)


SEEDS = {
    "JPEG": (save("JPEG", exif=exif(), xmp=XMP), jpeg_metadata),
    "PNG": (save("PNG", exif=exif()), png_metadata),
    "WEBP": (
        save("WEBP", exif=exif(), lossless=True),
        lambda data: range(data.index(b"EXIF") + 8, len(data) - 1),
    ),
}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_metadata_never_cost_an_image(kind, changes):
    seed, places = SEEDS[kind]
    damaged = bytearray(seed)
    own = places(seed)
    for position, value in changes:
        damaged[own[position % len(own)]] = value
    got, stored = pixels(bytes(damaged)), np.asarray(decode_rgb(seed, "x", upright=False))
    views = [stored, stored[:, ::-1], stored[::-1], stored[::-1, ::-1]]
    views += [view.swapaxes(0, 1) for view in views]
    assert any(np.array_equal(got, view) for view in views)


@settings(max_examples=100)
@given(data=st.binary(max_size=60), start=st.sampled_from([b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b""]))
def test_any_bytes_can_be_asked_to_go_without_metadata(data, start):
    assert len(without_metadata(start + data)) <= len(start + data) + 6


def test_what_is_left_of_a_png_is_its_pixels():
    bare = without_metadata(save("PNG", pnginfo=texts(), dpi=(72, 72)))
    kinds, offset = [], 8
    while offset < len(bare):
        size, name = struct.unpack_from(">I4s", bare, offset)
        body = bare[offset + 4 : offset + 8 + size]
        assert bare[offset + 8 + size : offset + 12 + size] == struct.pack(">I", zlib.crc32(body))
        kinds.append(name)
        offset += 12 + size
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_large_images_are_converted_in_strips_to_the_same_pixels(mode, monkeypatch):
    if mode in ("I", "I;16", "F"):
        kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        image = Image.fromarray((PICTURE[..., 0].astype(np.int64) * 255).astype(kind))
    else:
        image = Image.fromarray(PICTURE).convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    if mode == "RGBA":
        image.putalpha(Image.fromarray(PICTURE[..., 1]))
    expected = np.asarray(decode.to_rgb(image))
    monkeypatch.setattr(decode, "STRIP", 100)
    np.testing.assert_array_equal(np.asarray(decode.to_rgb(image)), expected)
