"""The order of supervised training, and the chunks that are read in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cae2pipe.config.evaluate import DrawSettings
from cae2pipe.errors import SourceError
from cae2pipe.evaluation.course import ChunkReader, all_images, full_batches
from cae2pipe.evaluation.crops import DrawnCrop
from cae2pipe.evaluation.datasets import open_split
from cae2pipe.evaluation.linear import batch_and_steps
from tests.conftest import write_photos


@given(images=st.integers(2, 500), batch=st.integers(2, 64), chunk=st.integers(2, 40), epochs=st.integers(1, 3))
def test_every_image_comes_once_an_epoch(images, batch, chunk, epochs):
    size, steps = batch_and_steps(images, batch)
    course = all_images(images, size, steps, chunk, epochs, seed=1)
    for epoch in range(epochs):
        own = range(epoch * course.steps, (epoch + 1) * course.steps)
        cut = [[course.chunk(step, number) for number in range(course.chunks)] for step in own]
        assert sorted(np.concatenate([part for step in cut for part in step]).tolist()) == list(range(images))
        assert [sum(map(len, step)) for step in cut] == [course.size(step) for step in own]
        assert max(len(part) for step in cut for part in step) <= chunk + 1


@given(chunks=st.integers(1, 6), chunk=st.integers(2, 16), more=st.integers(0, 200), seed=st.integers(0, 9))
def test_full_batches_are_full_and_hold_no_image_twice(chunks, chunk, more, seed):
    batch = chunks * chunk
    course = full_batches(batch + more, batch, chunk, 2, seed)
    seen = [course.chunk(step, number) for step in range(course.steps) for number in range(chunks)]
    assert {len(part) for part in seen} == {chunk}
    assert len(np.unique(np.concatenate(seen))) == course.steps * batch == course.used
    assert course.used + batch > batch + more


def test_epochs_and_seeds_have_orders_of_their_own():
    course, other = (all_images(50, 50, 1, 50, 2, seed) for seed in (0, 1))
    orders = [course.chunk(0, 0), course.chunk(1, 0), other.chunk(0, 0)]
    assert len({order.tobytes() for order in orders}) == 3
    assert np.array_equal(course.chunk(1, 0), all_images(50, 50, 1, 50, 9, 0).chunk(1, 0))


def test_fewer_images_than_a_batch():
    with pytest.raises(SourceError, match="7 training images are fewer than one batch of 8") as caught:
        full_batches(7, 8, 4, 1, 0)
    assert "batch=6" in caught.value.fix


@pytest.fixture
def reader(tmp_path):
    write_photos(tmp_path / "images", 2, 6)

    def make(own=(0, 1), start=0, **settings) -> ChunkReader:
        crop = DrawnCrop(24, DrawSettings(**settings), (0.5, 0.5, 0.5), seed=3)
        return ChunkReader(open_split(tmp_path / "images", 4), full_batches(12, 4, 2, 2, 0), own, start, crop)

    return make


@pytest.mark.parametrize("rand_augment", [0, 9])
def test_a_chunk_hangs_on_step_and_number_alone(reader, rand_augment):
    whole = reader(rand_augment=rand_augment)
    assert len(whole) == 12
    chunks = {(chunk.step, chunk.number): chunk for chunk in (whole[index] for index in range(len(whole)))}
    half, later = reader(own=(1,), rand_augment=rand_augment), reader(start=4, rand_augment=rand_augment)
    np.random.seed(77)  # what others have drawn does not matter
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
    found = [reader()[index] for index in range(len(whole))]
    assert [chunk.labels.shape for chunk in found] == sizes
    assert {reject["path"] for chunk in found for reject in chunk.rejected} == {"class0/image002.jpg"}
    chunk = next(chunk for chunk in found if chunk.rejected)
    assert chunk.pixels[0].equal(chunk.pixels[1])
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(SourceError, match="not one of 2 images"):
        reader()[0]


def test_labels_belong_to_their_pixels(tmp_path):
    for label, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        (tmp_path / f"c{label}").mkdir()
        for number in range(4):
            Image.new("RGB", (30, 30), colour).save(tmp_path / f"c{label}" / f"{number}.png")
    crop = DrawnCrop(8, DrawSettings(), (0.5, 0.5, 0.5), seed=0)
    reader = ChunkReader(open_split(tmp_path, 4), full_batches(12, 6, 3, 1, 0), (0, 1), 0, crop)
    for index in range(len(reader)):
        chunk = reader[index]
        assert chunk.pixels.float().mean(dim=(2, 3)).argmax(dim=1).equal(chunk.labels)
