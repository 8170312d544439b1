"""From the workers' parts to whole batches on the device, copied while the previous step is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace

import torch

from cae2pipe.errors import DamageError, ImageError
from cae2pipe.images.device_views import render_views
from cae2pipe.images.jpeg import VERIFY, decode_jpegs
from cae2pipe.images.reduced import reduced_views
from cae2pipe.loading.batches import Batch, join
from cae2pipe.runtime.threads import in_threads
from cae2pipe.runtime.upload import upload_ahead


def on_device(
    steps: Iterator[list[Batch]],
    axes: Mapping[str, int],
    device: torch.device,
    *,
    backend: str | None = None,
    view_size: int | None = None,
) -> Iterator[Batch]:
    """Whole, decoded batches on ``device``. ``axes``: which axis of each array runs over samples. ``backend``: compiler
    for the cutting of replayed views on the device; None: eager. ``view_size``: as in ``decoded``.

    The workers' parts are adjacent in memory. For a CUDA device threads copy them into pinned memory, a separate
    CUDA stream copies them to the device, and the copy of the next batch starts before the current one is returned.
    """
    if device.type != "cuda":
        for parts in steps:
            batch = decoded(join(parts, axes).to(device), device, backend, view_size=view_size)
            # Otherwise they would keep their memory while the batch is in use.
            del parts
            yield batch
        return
    stream = torch.cuda.Stream(device)

    def pin(parts: list[Batch]) -> Batch:
        return join(parts, axes).map(lambda tensor: tensor.pin_memory())

    def move(batch: Batch) -> Batch:
        return decoded(batch.to(device), device, backend, view_size=view_size)

    with closing(in_threads(pin, ((parts,) for parts in steps), 2, most=3)) as pinned:
        yield from upload_ahead(pinned, move, device, stream=stream)


def decoded(batch: Batch, device: torch.device, backend: str | None = None, *, view_size: int | None = None) -> Batch:
    """The batch with its JPEGs decoded on the device and replayed views cut from them, if workers left this to the
    device. ``view_size``: side of stored views in pixels, which are reduced to the batch's; None: the batch's.

    Raises:
        DamageError: one is not a JPEG of a view, or not of the image that a view was drawn for. Others as
        ``decode_jpegs``.
    """
    if len(batch.pixels) == len(batch.weights):
        return batch
    sizes = batch.sizes.tolist()
    jpegs = {row: jpeg for row, jpeg in enumerate(batch.jpegs.split(sizes)) if len(jpeg)}
    whole = batch.pixels.new_zeros(len(sizes), *batch.pixels.shape[1:])
    if not jpegs:
        return replace(batch, pixels=whole)
    keys, size, replayed = [batch.keys[row] for row in jpegs], whole.shape[-1], batch.draws.shape[1] > 0
    try:
        images = decode_jpegs(list(jpegs.values()), keys, device, size=None if replayed else view_size or size)
        if replayed:
            names = [f"key {key}" for key in keys]
            pixels = render_views(images, batch.draws[list(jpegs)], size, backend=backend, names=names)
        else:
            pixels = reduced_views(torch.stack(images), size)
    except ImageError as error:
        raise DamageError(error.what, where=f"step {batch.step}, {error.where}", fix=VERIFY) from None
    if len(jpegs) == len(whole):
        return replace(batch, pixels=pixels)
    return replace(batch, pixels=whole.index_copy_(0, torch.tensor(list(jpegs), device=device), pixels))
