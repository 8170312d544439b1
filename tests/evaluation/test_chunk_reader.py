"""Chunks of random crops."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cae2pipe.config.evaluate import DrawSettings
from cae2pipe.errors import SourceError
from cae2pipe.evaluation.chunk_reader import ChunkReader
from cae2pipe.evaluation.crops import DrawnCrop
from cae2pipe.evaluation.datasets import open_split
from cae2pipe.supervised.schedule import full_batches
from tests.conftest import write_photos


@pytest.fixture
def reader(tmp_path):
    write_photos(tmp_path / "images", 2, 6)

    def make(own=(0, 1), start=0, **settings) -> ChunkReader:
        crop = DrawnCrop(24, DrawSettings(**settings), (0.5, 0.5, 0.5), seed=3)
        return ChunkReader(
            open_split(tmp_path / "images", 4), full_batches(12, 4, 2, epochs=2, seed=0), own, start=start, crop=crop
        )

    return make


@pytest.mark.parametrize("rand_augment", [0, 9])
def test_a_chunk_hangs_on_step_and_number_alone(reader, rand_augment):
    whole = reader(rand_augment=rand_augment)
    assert len(whole) == 12
    chunks = {(chunk.step, chunk.number): chunk for chunk in (whole[index] for index in range(len(whole)))}
    half, later = reader(own=(1,), rand_augment=rand_augment), reader(start=4, rand_augment=rand_augment)
    np.random.seed(77)  # global random state does not matter
    for part in (half, later):
        for index in range(len(part)):
            chunk = part[index]
            assert chunk.pixels.equal(chunks[chunk.step, chunk.number].pixels)
            assert chunk.labels.equal(chunks[chunk.step, chunk.number].labels)
    # The next epoch shows other crops.
    first, second = ([chunks[step, n].pixels for step in steps for n in (0, 1)] for steps in (range(3), range(3, 6)))
    assert not {p.numpy().tobytes() for part in first for p in part} & {
        p.numpy().tobytes() for part in second for p in part
    }


def test_generators_go_on_as_before(reader):
    import random

    import torch

    def drawn():
        return random.random(), np.random.rand(), float(torch.rand(()))

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    wanted = drawn()
    seed()
    reader(rand_augment=9)[0]
    assert drawn() == wanted


def test_what_cannot_be_decoded_is_replaced_within_its_chunk_and_named(reader, tmp_path):
    whole = reader()
    sizes = [whole[index].labels.shape for index in range(len(whole))]
    broken = tmp_path / "images" / "class0" / "image002.jpg"
    broken.write_bytes(b"nothing")
    chunks = [reader()[index] for index in range(len(whole))]
    assert [chunk.labels.shape for chunk in chunks] == sizes
    assert {reject["path"] for chunk in chunks for reject in chunk.rejected} == {"class0/image002.jpg"}
    chunk = next(chunk for chunk in chunks if chunk.rejected)
    assert chunk.pixels[0].equal(chunk.pixels[1])
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(SourceError, match="none of the 2 images"):
        reader()[0]


def test_labels_belong_to_their_pixels(tmp_path):
    for label, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        (tmp_path / f"c{label}").mkdir()
        for number in range(4):
            Image.new("RGB", (30, 30), colour).save(tmp_path / f"c{label}" / f"{number}.png")
    crop = DrawnCrop(8, DrawSettings(), (0.5, 0.5, 0.5), seed=0)
    reader = ChunkReader(open_split(tmp_path, 4), full_batches(12, 6, 3, epochs=1, seed=0), (0, 1), start=0, crop=crop)
    for index in range(len(reader)):
        chunk = reader[index]
        assert chunk.pixels.float().mean(dim=(2, 3)).argmax(dim=1).equal(chunk.labels)
