"""From stored views' JPEG bytes to pixels. Every stored view is decoded here; users' images in ``decode.py``."""

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
from cae2pipe.runtime.exhaustion import reraise_exhaustion

VERIFY = "run `cae2pipe verify`"

MEMORY_ENDED = re.compile(r"out of memory|aten::empty|failed.*: 5$", re.MULTILINE | re.IGNORECASE)
"""How a device's decoder says that memory has ended. Neither library lets torch.OutOfMemoryError through: torchvision
quotes it, torchcodec has only its text or, before torch 2.13, the call's name; nvJPEG's own allocations end with its
status 5 (NVJPEG_STATUS_ALLOCATOR_FAILURE)."""


def open_jpeg(data: bytes) -> Image.Image:
    """A JPEG that a target set holds, decoded on the CPU: a stored view, or an image that views are cut from.

    Raises:
        ImageError: the bytes are not an RGB JPEG.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.load()
    except Exception as error:  # DecompressionBombError, struct.error and others have no base in common
        reraise_exhaustion(error)
        raise ImageError(f"a stored JPEG cannot be decoded: {describe_failure(error)}", fix=VERIFY) from None
    if image.mode != "RGB":
        raise ImageError(f"a stored JPEG is not RGB but {image.mode}", fix=VERIFY)
    return image


def decode_view(data: bytes, size: int | None = None) -> np.ndarray:
    """A stored view's pixels, uint8 (H, W, 3), decoded on the CPU.

    Args:
        data: the JPEG's bytes.
        size: pixels a side that the view must have.

    Raises:
        ImageError: the bytes are not an RGB JPEG, or not of this size.
    """
    image = open_jpeg(data)
    if size is not None and image.size != (size, size):
        raise ImageError(
            f"a stored view has {image.width} x {image.height} pixels instead of {size} x {size}", fix=VERIFY
        )
    return np.asarray(image)


def decode_jpegs(
    images: list[Tensor], keys: Sequence[str], device: torch.device, *, size: int | None = None
) -> list[Tensor]:
    """The pixels of JPEGs, uint8 (3, H, W) each on ``device``, decoded there: by nvJPEG on a CUDA device, whose pixels
    differ a little from ``open_jpeg``'s; by libjpeg on the CPU, with the same pixels.

    Waits for the current stream, and for the decoder.

    Args:
        images: n > 0 JPEGs, uint8 (bytes,) on the host. keys: what to call them in errors. size: pixels a side that
            stored views must have.

    Raises:
        ImageError: the CPU's decoder refuses one of them, which is named. SettingsError: nothing decodes on a device.
        torch.OutOfMemoryError: memory has ended. torch.AcceleratorError, Cae2pipeError: the device or its decoder
            failed.
    """
    decode = device_decoder()
    if device.type == "cuda":
        # The decoder's outputs may be memory that work on this stream still reads. torchvision decodes on a stream of
        # its own that does not wait for this one, and nvJPEG's hardware engine waits for none (torchcodec from 0.17 on
        # synchronises for that reason).
        torch.cuda.current_stream(device).synchronize()
    try:
        with warnings.catch_warnings():
            # torchvision's, from 0.29 on.
            warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
            pixels: list[Tensor] = list(decode(images, mode="RGB", device=device))
        others = [view.shape for view in pixels if size is not None and view.shape != (3, size, size)]
        if not others:
            return pixels
        said = f"a view has {others[0][2]} x {others[0][1]} pixels"
    except RuntimeError as error:
        reraise_exhaustion(error)
        said = str(error)
    # What a decoder says does not tell a damaged JPEG from a device that fails: the CPU's decoder does.
    for image, key in zip(images, keys, strict=True):
        try:
            decode_view(image.numpy().tobytes(), size)
        except ImageError as damage:
            raise ImageError(damage.what, where=f"key {key}", fix=damage.fix) from None
    raise device_failure(said, device)


def device_failure(said: str, device: torch.device) -> Exception:
    """The error to raise for what a device's decoder said of sound JPEGs."""
    first = next(iter(said.splitlines()), "")
    if MEMORY_ENDED.search(said):
        return torch.OutOfMemoryError(f"no memory left on {device} to decode JPEGs: {first}")
    return Cae2pipeError(
        f"{device} cannot decode JPEGs that the CPU can: {first}",
        where="data.decode",
        fix="--set data.decode=workers decodes them on the CPU",
    )


@functools.cache
def device_decoder() -> Callable[..., Iterable[Tensor]]:
    """torchcodec's ``decode_jpeg``, or torchvision's, deprecated since 0.29, where torchcodec cannot be loaded.

    Both take a list of JPEGs, uint8 (bytes,) on the host, a mode and a device, and give tensors (3, H, W) on it.

    Raises:
        SettingsError: torchvision has none any more, either.
    """
    try:
        from torchcodec.decoders import decode_jpeg as by_torchcodec

        return by_torchcodec
    # OSError: a wheel for another CUDA version than torch's does not find its libraries. Before 0.16 torchcodec had no
    # images, and its older versions wanted FFmpeg (RuntimeError).
    except (ImportError, OSError, RuntimeError) as error:
        reraise_exhaustion(error)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
    try:
        from torchvision.io import decode_jpeg as by_torchvision

        decoder: Callable[..., Iterable[Tensor]] = by_torchvision
        return decoder
    except ImportError:
        raise SettingsError(
            f"decoding JPEGs on a device needs torchcodec 0.16 or newer, and it cannot be loaded: {reason}",
            where="data.decode",
            fix="pip install 'cae2pipe[nvjpeg]', with a torchcodec for the CUDA version of torch; or "
            "--set data.decode=workers",
        ) from None
