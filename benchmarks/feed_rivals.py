"""Other ways to feed a student, as a user would write them: the rivals in ``benchmarks.feed``.

Both give uint8 pixels (B, 3, S, S) in random order, endlessly, without masks. Their batches are smaller than ours:
DataLoader holds two per worker in shared memory.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Compose, InterpolationMode, PILToTensor, RandomHorizontalFlip, RandomResizedCrop


def originals(root: Path, workers: int, batch: int) -> Generator[Tensor, None, None]:
    """Random crops of full-size photographs, which a shard set below ``root`` holds, with WebDataset and
    torchvision."""
    import webdataset

    size = 224
    crop = Compose(
        [
            RandomResizedCrop(size, scale=(0.4, 1), interpolation=InterpolationMode.BICUBIC, antialias=True),
            RandomHorizontalFlip(),
            PILToTensor(),
        ]
    )
    # As often as there are workers, since each takes whole tars.
    tars = [str(path) for path in sorted(root.rglob("shards/tars/*.tar"))] * max(1, workers)
    views = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(256).decode("pil").to_tuple("jpg")
    views = views.map_tuple(crop).repeat()
    for (pixels,) in DataLoader(views, batch, num_workers=workers):
        yield pixels


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Views, as a folder of JPEGs, with their latents, as an fp16 memmap (n, T, D)."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.jpg"))
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = np.array(Image.open(self.files[index]).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(np.array(self.latents[index]))


def write_views(root: Path, folder: Path, tokens: int, dim: int, views: int) -> None:
    """The first stored views of the target set ``root``, repeated where there are fewer, with random latents: their
    content does not change what reading them costs."""
    folder.mkdir()
    written = 0
    tars = sorted(root.glob("views/v00/*.tar"))
    while written < views:
        for path in tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg") and written < views:
                        data = tar.extractfile(member)
                        assert data is not None
                        (folder / f"{written:06d}.jpg").write_bytes(data.read())
                        written += 1
    shape = (views, tokens, dim)
    latents = np.lib.format.open_memmap(folder / "latents.npy", mode="w+", dtype=np.float16, shape=shape)
    drawn = np.random.default_rng(0).standard_normal((64, tokens, dim), dtype=np.float32).astype(np.float16)
    for first in range(0, views, 64):
        latents[first : first + 64] = drawn[: views - first]
    latents.flush()


def memmap(folder: Path, workers: int, batch: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Stored views and latents of ``write_views``."""
    loader = DataLoader(
        Views(folder), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from loader


RIVALS: dict[str, Callable[[Path, int, int], Generator[object, None, None]]] = {
    "originals": originals,
    "memmap": memmap,
}
