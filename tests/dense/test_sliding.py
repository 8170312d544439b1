"""Sliding windows over an image, compared with one pass over the whole image."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.dense.sliding import sliding_logits, window_starts


@given(length=st.integers(1, 3000), window=st.integers(1, 600), share=st.floats(0.05, 1))
def test_windows_cover_a_side_and_stay_within(length, window, share):
    stride = max(1, int(window * share))
    starts = window_starts(length, window, stride)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert all(after - before <= stride for before, after in pairwise(starts))
    if length > window:
        assert starts[-1] + window == length


def test_the_published_windows():
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]


def per_pixel(images: torch.Tensor) -> torch.Tensor:
    return torch.stack([images.sum(dim=1), images[:, 0] - images[:, 2]], dim=1)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (37, 23), (10, 30), (5, 7)])
def test_a_function_of_pixels_is_stitched_as_a_whole_pass_gives_it(shape):
    image = torch.randn(3, *shape)
    found = sliding_logits(per_pixel, image, 16, stride=9, batch=3, fill=torch.zeros(3))
    torch.testing.assert_close(found, per_pixel(image[None])[0])


def test_overlaps_are_averaged_and_what_is_added_is_the_fill():
    seen = []

    def position(images):
        seen.append(images)
        return torch.arange(16.0).expand(len(images), 1, 16, 16)

    found = sliding_logits(position, torch.randn(3, 10, 20), 16, stride=4, batch=8, fill=torch.tensor([7.0, 8.0, 9.0]))
    assert found.shape == (1, 10, 20)
    assert found[0, 0].tolist() == [*map(float, range(4)), *[x - 2.0 for x in range(4, 16)], *map(float, range(12, 16))]
    assert all((images[:, :, 10:] == torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1)).all() for images in seen)
