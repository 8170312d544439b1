"""From stored views' JPEG bytes to pixels. Every stored view is decoded here; users' images are decoded in
``decode.py``."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cae2pipe.errors import Cae2pipeError, ImageError, SettingsError
from cae2pipe.images.decode import describe_failure
from cae2pipe.images.stored_view import decode_written, written_sides
from cae2pipe.runtime.exhaustion import reraise_exhaustion

VERIFY = "run `cae2pipe verify`"

MEMORY_ENDED = re.compile(r"out of memory|aten::empty|failed.*: 5$", re.MULTILINE | re.IGNORECASE)
"""How a device's decoder reports that memory has run out. Neither library raises torch.OutOfMemoryError: torchvision
quotes it, torchcodec has only its text or, before torch 2.13, the call's name; nvJPEG's own allocations fail with
status 5 (NVJPEG_STATUS_ALLOCATOR_FAILURE)."""


def open_jpeg(data: bytes) -> Image.Image:
    """A JPEG that a target set holds, decoded on the CPU: a stored view, or an image that views are cropped from.

    Raises:
        ImageError: the bytes are not an RGB JPEG.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.load()
    except Exception as error:  # DecompressionBombError, struct.error and others have no common base
        reraise_exhaustion(error)
        raise ImageError(f"a stored JPEG cannot be decoded: {describe_failure(error)}", fix=VERIFY) from None
    if image.mode != "RGB":
        raise ImageError(f"a stored JPEG is not RGB but {image.mode}", fix=VERIFY)
    return image


def decode_view(data: bytes, size: int | None = None) -> np.ndarray:
    """A stored view's pixels, uint8 (H, W, 3), decoded on the CPU.

    Args:
        data: the JPEG's bytes.
        size: required side of the view in pixels.

    Raises:
        ImageError: the bytes are not an RGB JPEG, or not of this size.
    """
    sides = written_sides(data) if size is None else (size, size)
    if sides is None:
        return np.asarray(open_jpeg(data))
    out = np.empty((*sides, 3), dtype=np.uint8)
    decode_into(data, out)
    return out


def decode_into(data: bytes, out: np.ndarray) -> None:
    """Decode a stored view into ``out``, uint8 (H, W, 3) and C-contiguous, such as a row of a batch.

    The pixels and errors are Pillow's. ``out`` is undefined after an error.

    Raises:
        ImageError: the bytes are not an RGB JPEG, or not of this size.
    """
    if decode_written(data, out):
        return
    image = open_jpeg(data)
    height, width = out.shape[:2]
    if image.size != (width, height):
        raise ImageError(
            f"a stored view has {image.width} x {image.height} pixels instead of {width} x {height}", fix=VERIFY
        )
    out[...] = np.asarray(image)


def decode_jpegs(
    images: list[Tensor], keys: Sequence[str], device: torch.device, *, size: int | None = None
) -> list[Tensor]:
    """The pixels of JPEGs, uint8 (3, H, W) each on ``device``, decoded there: by nvJPEG on a CUDA device, whose pixels
    differ slightly from ``open_jpeg``'s; by libjpeg on the CPU, with the same pixels.

    Waits for the current stream, and for the decoder.

    Args:
        images: n > 0 JPEGs, uint8 (bytes,) on the host. keys: their names for errors. size: required side of
            stored views in pixels.

    Raises:
        ImageError: the CPU's decoder rejects one of them, which is named. SettingsError: there is no device decoder.
        torch.OutOfMemoryError: memory has run out. torch.AcceleratorError, Cae2pipeError: the device or its decoder
            failed.
    """
    decode = device_decoder()
    if device.type == "cuda":
        # The decoder's outputs may use memory that work on this stream still reads. torchvision decodes on its own
        # stream, which does not wait for this one, and nvJPEG's hardware engine waits for none (torchcodec 0.17 and
        # newer synchronise for that reason).
        torch.cuda.current_stream(device).synchronize()
    try:
        with warnings.catch_warnings():
            # From torchvision 0.29 on.
            warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
            pixels: list[Tensor] = list(decode(images, mode="RGB", device=device))
        others = [view.shape for view in pixels if size is not None and view.shape != (3, size, size)]
        if not others:
            return pixels
        said = f"a view has {others[0][2]} x {others[0][1]} pixels"
    except RuntimeError as error:
        reraise_exhaustion(error)
        said = str(error)
    # The decoder's error does not distinguish a damaged JPEG from a failing device; the CPU's decoder does.
    for image, key in zip(images, keys, strict=True):
        try:
            decode_view(image.numpy().tobytes(), size)
        except ImageError as damage:
            raise ImageError(damage.what, where=f"key {key}", fix=damage.fix) from None
    raise device_failure(said, device)


def device_failure(said: str, device: torch.device) -> Exception:
    """The error to raise if a device's decoder failed on valid JPEGs."""
    first = next(iter(said.splitlines()), "")
    if MEMORY_ENDED.search(said):
        return torch.OutOfMemoryError(f"no memory left on {device} to decode JPEGs: {first}")
    return Cae2pipeError(
        f"{device} cannot decode JPEGs that the CPU can: {first}",
        where="data.decode",
        fix="decode them on the CPU: --set data.decode=workers",
    )


@functools.cache
def device_decoder() -> Callable[..., Iterable[Tensor]]:
    """torchcodec's ``decode_jpeg``, or torchvision's, deprecated since 0.29, if torchcodec cannot be loaded.

    Both take a list of JPEGs, uint8 (bytes,) on the host, a mode and a device, and give tensors (3, H, W) on it.

    Raises:
        SettingsError: torchvision no longer has one either.
    """
    try:
        from torchcodec.decoders import decode_jpeg as by_torchcodec

        return by_torchcodec
    # OSError: a wheel for another CUDA version than torch's does not find its libraries. Before 0.16 torchcodec did
    # not decode images, and older versions needed FFmpeg (RuntimeError).
    except (ImportError, OSError, RuntimeError) as error:
        reraise_exhaustion(error)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    try:
        from torchvision.io import decode_jpeg as by_torchvision

        decoder: Callable[..., Iterable[Tensor]] = by_torchvision
        return decoder
    except ImportError:
        raise SettingsError(
            f"decoding JPEGs on a device needs torchcodec 0.16 or newer, which cannot be loaded: {reason}",
            where="data.decode",
            fix="pip install 'cae2pipe[nvjpeg]', with a torchcodec for the CUDA version of torch; or "
            "--set data.decode=workers",
        ) from None
