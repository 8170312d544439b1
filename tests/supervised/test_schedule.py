"""The order of supervised training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.errors import SourceError
from cae2pipe.evaluation.linear import batch_and_steps
from cae2pipe.supervised.schedule import all_images, full_batches


@given(images=st.integers(2, 500), batch=st.integers(2, 64), chunk=st.integers(2, 40), epochs=st.integers(1, 3))
def test_every_image_comes_once_an_epoch(images, batch, chunk, epochs):
    size, steps = batch_and_steps(images, batch)
    schedule = all_images(images, size, steps, chunk=chunk, epochs=epochs, seed=1)
    for epoch in range(epochs):
        own = range(epoch * schedule.steps, (epoch + 1) * schedule.steps)
        cut = [[schedule.chunk(step, number) for number in range(schedule.chunks)] for step in own]
        assert sorted(np.concatenate([part for step in cut for part in step]).tolist()) == list(range(images))
        assert [sum(map(len, step)) for step in cut] == [schedule.size(step) for step in own]
        assert max(len(part) for step in cut for part in step) <= chunk + 1


@given(chunks=st.integers(1, 6), chunk=st.integers(2, 16), more=st.integers(0, 200), seed=st.integers(0, 9))
def test_full_batches_are_full_and_hold_no_image_twice(chunks, chunk, more, seed):
    batch = chunks * chunk
    schedule = full_batches(batch + more, batch, chunk, epochs=2, seed=seed)
    seen = [schedule.chunk(step, number) for step in range(schedule.steps) for number in range(chunks)]
    assert {len(part) for part in seen} == {chunk}
    assert len(np.unique(np.concatenate(seen))) == schedule.steps * batch == schedule.used
    assert schedule.used + batch > batch + more


def test_epochs_and_seeds_have_orders_of_their_own():
    schedule, other = (all_images(50, 50, 1, chunk=50, epochs=2, seed=seed) for seed in (0, 1))
    orders = [schedule.chunk(0, 0), schedule.chunk(1, 0), other.chunk(0, 0)]
    assert len({order.tobytes() for order in orders}) == 3
    assert np.array_equal(schedule.chunk(1, 0), all_images(50, 50, 1, chunk=50, epochs=9, seed=0).chunk(1, 0))


def test_fewer_images_than_a_batch():
    with pytest.raises(SourceError, match="7 training images are fewer than one batch of 8") as caught:
        full_batches(7, 8, 4, epochs=1, seed=0)
    assert "batch=6" in caught.value.fix
