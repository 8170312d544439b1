"""Stored views to pixels, on the CPU and with a device's decoder, and the cause that errors name."""

from __future__ import annotations

import io
import sys
from importlib.abc import MetaPathFinder

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cae2pipe.config.extract import ViewSettings
from cae2pipe.errors import Cae2pipeError, ImageError, SettingsError
from cae2pipe.images import jpeg
from cae2pipe.images.jpeg import decode_jpegs, decode_view, device_decoder
from cae2pipe.images.views import encode_jpeg

CPU = torch.device("cpu")
LIBRARIES = {"torchcodec": "torchcodec.decoders", "torchvision": "torchvision.io"}


def noise(size: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size=(size, size, 3), dtype=np.uint8))


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def tensors(*jpegs: bytes) -> list[Tensor]:
    return [torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()) for data in jpegs]


def without(monkeypatch, *libraries: str) -> None:
    """Continue as if some of the libraries that decode on a device were not installed."""
    for library in libraries:
        monkeypatch.setitem(sys.modules, LIBRARIES[library], None)


@pytest.fixture(autouse=True)
def fresh_decoder():
    device_decoder.cache_clear()
    yield
    device_decoder.cache_clear()


@pytest.fixture(params=list(LIBRARIES))
def library(request, monkeypatch) -> str:
    """Only one of the two."""
    pytest.importorskip(LIBRARIES[request.param], exc_type=(ImportError, OSError))
    without(monkeypatch, *LIBRARIES.keys() - {request.param})
    return request.param


jpegs = st.builds(
    lambda size, seed, quality, subsampling, progressive: encoded(
        noise(size, seed), quality=quality, subsampling=subsampling, progressive=progressive
    ),
    st.integers(1, 70),
    st.integers(0, 99),
    st.integers(1, 100),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(data=jpegs)
def test_a_view_has_pillows_pixels(data):
    wanted = np.asarray(Image.open(io.BytesIO(data)))
    got = decode_view(data)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(decode_view(data, len(wanted)), wanted)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 224])
def test_on_the_cpu_a_devices_decoder_gives_the_same_pixels(library, size, subsampling):
    assert device_decoder().__module__.startswith(library)
    views = [encoded(noise(size, seed), quality=50 + 10 * seed, subsampling=subsampling) for seed in range(4)]
    got = torch.stack(decode_jpegs(tensors(*views), list("abcd"), CPU, size=size))
    assert (got.dtype, got.shape) == (torch.uint8, (4, 3, size, size))
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1).numpy(), np.stack([decode_view(view) for view in views]))


def test_torchcodec_comes_first_and_then_torchvision(monkeypatch):
    pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, OSError))
    assert device_decoder().__module__.startswith("torchcodec")
    device_decoder.cache_clear()
    without(monkeypatch, "torchcodec")
    assert device_decoder().__module__.startswith("torchvision")


def test_without_either_the_error_names_the_extra(monkeypatch):
    without(monkeypatch, *LIBRARIES)
    with pytest.raises(SettingsError, match=r"torchcodec 0\.16") as caught:
        decode_jpegs(tensors(encoded(noise(8))), ["a"], CPU, size=8)
    assert caught.value.where == "data.decode"
    assert "pip install 'cae2pipe[nvjpeg]'" in str(caught.value.fix)
    assert "data.decode=workers" in str(caught.value.fix)


class Unloadable(MetaPathFinder):
    """Makes torchcodec fail like a wheel built for another CUDA version than torch's."""

    def find_spec(self, name, path, target=None):
        if name.startswith("torchcodec"):
            raise OSError("libcudart.so.13: cannot open shared object file: No such file or directory")


def test_a_torchcodec_that_cannot_be_loaded_is_passed_over_and_named_where_nothing_else_decodes(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Unloadable(), *sys.meta_path])
    assert device_decoder().__module__.startswith("torchvision")
    device_decoder.cache_clear()
    without(monkeypatch, "torchvision")
    with pytest.raises(SettingsError, match=r"libcudart\.so\.13"):
        device_decoder()


def broken_views() -> dict[str, bytes]:
    data = encode_jpeg(noise(32), ViewSettings())
    frame = data.index(b"\xff\xc0")
    png = io.BytesIO()
    noise(32).save(png, "PNG")
    return {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "text": b"view",
        "png": png.getvalue(),
        "grey": encoded(noise(32).convert("L")),
        "cmyk": encoded(noise(32).convert("CMYK")),
        "bomb": data[: frame + 5] + b"\xff\xff\xff\xff" + data[frame + 9 :],
        "large": data[: frame + 5] + b"\x28\x00\x28\x00" + data[frame + 9 :],
        "small": encoded(noise(16)),
        "oblong": encoded(noise(32).crop((0, 0, 32, 31))),
    }


@pytest.mark.parametrize("name", [name for name in broken_views() if name not in ("small", "oblong")])
def test_a_broken_view_is_an_image_error(name):
    with pytest.raises(ImageError, match=r"stored (JPEG|view)") as caught:
        decode_view(broken_views()[name])
    assert caught.value.fix == "run `cae2pipe verify`"


@pytest.mark.parametrize("name", ["small", "oblong"])
def test_a_view_of_another_size_is_an_image_error_where_the_size_is_known(name):
    data = broken_views()[name]
    assert decode_view(data).shape == ((16, 16, 3) if name == "small" else (31, 32, 3))
    with pytest.raises(ImageError, match="instead of 32 x 32"):
        decode_view(data, 32)


# A grey JPEG becomes RGB on a device. Before it is stored, a view's bytes are RGB, and a checksum guards them.
@pytest.mark.parametrize("name", [name for name in broken_views() if name not in ("empty", "grey", "cmyk")])
def test_a_broken_view_is_named_where_a_device_decodes(library, name):
    good = encode_jpeg(noise(32), ViewSettings(size=32))
    with pytest.raises(ImageError) as caught:
        decode_jpegs(tensors(good, broken_views()[name], good), ["one", "two", "three"], CPU, size=32)
    with pytest.raises(ImageError) as alone:
        decode_view(broken_views()[name], 32)
    assert caught.value.where == "key two"
    assert (caught.value.what, caught.value.fix) == (alone.value.what, alone.value.fix)


def test_views_that_all_have_another_size_are_not_taken(library):
    with pytest.raises(ImageError, match="16 x 16 pixels instead of 32 x 32"):
        decode_jpegs(tensors(encoded(noise(16)), encoded(noise(16))), ["one", "two"], CPU, size=32)


def failing(monkeypatch, error: Exception) -> None:
    """Make the device's decoder fail, as it cannot here."""

    def decode(images: list[Tensor], mode: str, device: torch.device) -> list[Tensor]:
        raise error

    monkeypatch.setattr(jpeg, "device_decoder", lambda: decode)


SHIM = 'torch_call_dispatcher( "aten::{}", "", stack.data(), TORCH_ABI_VERSION) API call failed at ops.h, line 57'


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has"),
        RuntimeError(f"CUDA out of memory. Tried to allocate 20.00 MiB. (originally from {SHIM.format('empty')})"),
        RuntimeError(SHIM.format("empty")),
        RuntimeError("decode_software, DecodeJpegCuda.cpp:455, nvjpegDecode failed: 5"),
        RuntimeError(
            "Error while decoding JPEG images: Failed to decode batch: 5\nException raised from decode_images"
        ),
    ],
    ids=["torch", "torchvision", "torchcodec", "torchcodec, torch 2.11", "nvJPEG", "nvJPEG by torchvision"],
)
def test_the_end_of_a_devices_memory_is_never_damage(monkeypatch, error):
    failing(monkeypatch, error)
    with pytest.raises(torch.OutOfMemoryError):
        decode_jpegs(tensors(encoded(noise(8))), ["a"], CPU, size=8)


def test_an_error_of_the_device_is_never_damage(monkeypatch):
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    failing(monkeypatch, error)
    with pytest.raises(torch.AcceleratorError) as caught:
        # Not even with a broken view in the batch, since the error may come from work queued earlier.
        decode_jpegs(tensors(b"view"), ["a"], CPU, size=8)
    assert caught.value is error


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: an illegal memory access was encountered (originally from aoti_torch_create_device_guard)",
        "decode_jpegs_cuda, DecodeJpegCuda.cpp:20, decode_jpeg: torchcodec was not compiled with nvJPEG support",
        "Failed to decode batch: 6",
        SHIM.format("permute"),
        "",
    ],
)
def test_a_decoder_that_fails_on_sound_views_is_not_damage_either(monkeypatch, said):
    failing(monkeypatch, RuntimeError(said))
    with pytest.raises(Cae2pipeError, match="cannot decode JPEGs that the CPU can") as caught:
        decode_jpegs(tensors(encoded(noise(8))), ["a"], CPU, size=8)
    assert type(caught.value) is Cae2pipeError
    assert said in caught.value.what
    assert "data.decode=workers" in str(caught.value.fix)


def test_a_broken_header_that_asks_for_too_much_memory_is_damage(monkeypatch):
    failing(monkeypatch, RuntimeError("CUDA out of memory. Tried to allocate 12.00 GiB."))
    with pytest.raises(ImageError, match=r"stored (JPEG|view)") as caught:
        decode_jpegs(tensors(encoded(noise(32)), broken_views()["bomb"]), ["one", "two"], CPU, size=32)
    assert caught.value.where == "key two"
