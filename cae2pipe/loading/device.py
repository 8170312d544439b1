"""From the workers' parts to whole batches on the device, copied while the step before is computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from cae2pipe.errors import DamageError, SettingsError
from cae2pipe.loading.batches import Batch, join
from cae2pipe.threads import in_threads


def on_device(steps: Iterator[list[Batch]], axes: Mapping[str, int], device: torch.device) -> Iterator[Batch]:
    """Whole, decoded batches on ``device``. ``axes``: which axis of each array runs over samples.

    To a CUDA device parts are copied as they come from the workers and joined there: joining hundreds of megabytes a
    step on the host would hold up the loop. Threads bring them into pinned memory, a stream of its own carries them
    over, and the next batch is on its way before the last one is given out.
    """
    if device.type != "cuda":
        for parts in steps:
            yield decoded(join(parts, axes).to(device), device)
        return
    stream = torch.cuda.Stream(device)

    def upload(parts: list[Batch]) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            batch = decoded(join([part.to(device) for part in parts], axes), device)
            done = torch.cuda.Event()
            done.record()
        return batch, done

    def ready(batch: Batch, done: torch.cuda.Event) -> Batch:
        current = torch.cuda.current_stream(device)
        current.wait_event(done)

        def used_here(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)
            return tensor

        return batch.map(used_here)

    with closing(in_threads(_pin, ((parts,) for parts in steps), 2, 3)) as pinned:
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        for parts in pinned:
            following = upload(parts)
            if waiting:
                yield ready(*waiting)
            waiting = following
        if waiting:
            yield ready(*waiting)


def _pin(parts: list[Batch]) -> list[Batch]:
    return [part.map(lambda tensor: tensor.pin_memory()) for part in parts]


def decoded(batch: Batch, device: torch.device) -> Batch:
    """The batch with its JPEGs decoded on the device, where they have come this far.

    Raises:
        DamageError: one is not a JPEG.
    """
    if len(batch.pixels) == len(batch.weights):
        return batch
    real = batch.sizes > 0
    whole = batch.pixels.new_zeros(len(real), *batch.pixels.shape[1:])
    if not real.any():
        return replace(batch, pixels=whole)
    decode_jpeg = torchvision_decoder()
    images = [data for data, some in zip(batch.jpegs.split(batch.sizes.tolist()), real.tolist(), strict=True) if some]
    try:
        pixels = torch.stack(decode_jpeg(images, device))
    except RuntimeError as error:
        keys = ", ".join(key for key in batch.keys[:3] if key)
        raise DamageError(
            f"a stored view cannot be decoded on {device}: {error}",
            where=f"step {batch.step}, keys {keys}, ...",
            fix="`cae2pipe verify` checks the set; data.decode=workers names the view",
        ) from None
    whole[real.to(device)] = pixels
    return replace(batch, pixels=whole)


def torchvision_decoder() -> Callable[[list[Tensor], torch.device], list[Tensor]]:
    """A function from JPEGs, uint8 (n,) on the host, to RGB pixels (3, H, W) on a device.

    Raises:
        SettingsError: this torchvision has none any more.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        raise SettingsError(
            "this torchvision does not decode JPEGs", where="data.decode", fix="--set data.decode=workers"
        ) from None

    def decode(images: list[Tensor], device: torch.device) -> list[Tensor]:
        with warnings.catch_warnings():
            # Announced to leave torchvision, from 0.29 on: until then it is the one that everybody has.
            warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
            found: list[Tensor] = decode_jpeg(images, mode=ImageReadMode.RGB, device=device)
        return found

    return decode
