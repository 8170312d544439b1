"""Coding, matching and sampling of boxes, by hand and compared with torchvision."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.dense.boxes import decode_boxes, encode_boxes, match_boxes, sample_proposals


def test_coding_by_hand():
    boxes, truth = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 10, 25, 20]])
    # Centres (5, 10) and (15, 15), sizes 10 x 20 and 20 x 10.
    wanted = torch.tensor([[10 * 1.0, 10 * 0.25, 5 * math.log(2), -5 * math.log(2)]])
    torch.testing.assert_close(encode_boxes(truth, boxes, (10, 10, 5, 5)), wanted)
    torch.testing.assert_close(encode_boxes(truth, boxes, (30, 30, 15, 15)), 3 * wanted)
    torch.testing.assert_close(decode_boxes(wanted, boxes, (10, 10, 5, 5)), truth)


@given(seed=st.integers(0, 10**6), weight=st.sampled_from([1.0, 10.0, 30.0]))
def test_decoding_undoes_coding_and_agrees_with_torchvision(seed, weight):
    from torchvision.models.detection._utils import BoxCoder

    generator = torch.Generator().manual_seed(seed)
    boxes, truth = (torch.rand(9, 4, generator=generator) * 50 for _ in range(2))
    boxes[:, 2:] += boxes[:, :2] + 1
    truth[:, 2:] += truth[:, :2] + 1
    weights = (weight, weight, weight / 2, weight / 2)
    coded = encode_boxes(truth, boxes, weights)
    torch.testing.assert_close(decode_boxes(coded, boxes, weights), truth, rtol=1e-4, atol=1e-3)
    theirs = BoxCoder(weights).encode([truth], [boxes])[0]
    torch.testing.assert_close(coded, theirs, rtol=1e-4, atol=1e-4)


def test_what_grows_without_bounds_is_held():
    found = decode_boxes(torch.tensor([[0.0, 0, 1e6, 1e6]]), torch.tensor([[0.0, 0, 16, 16]]), (1, 1, 1, 1))
    assert float((found[:, 2:] - found[:, :2]).max()) == pytest.approx(1000, rel=1e-4)


def test_matching_by_hand():
    truth = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])
    proposals = torch.tensor([[0.0, 0, 10, 6], [21.0, 0, 31, 10], [50.0, 0, 60, 10], [0.0, 0, 10, 5]])
    index, positive = match_boxes(proposals, truth, 0.6)  # IoU 0.6, 9/11, 0, 0.5
    assert index[:2].tolist() == [0, 1]
    assert positive.tolist() == [True, True, False, False]
    assert match_boxes(proposals, truth, 0.7)[1].tolist() == [False, True, False, False]
    index, positive = match_boxes(proposals, truth[:0], 0.5)
    assert not positive.any()
    assert index.tolist() == [0, 0, 0, 0]


@given(total=st.integers(1, 60), positives=st.integers(0, 60), count=st.integers(4, 40))
def test_samples_have_no_proposal_twice_and_not_too_many_positives(total, positives, count):
    positive = torch.zeros(total, dtype=torch.bool)
    positive[:positives] = True
    chosen = sample_proposals(positive, count, 0.25)
    assert len(chosen.unique()) == len(chosen) <= count
    own = int(positive[chosen].sum())
    assert own == min(int(count * 0.25), int(positive.sum()))
    assert len(chosen) - own == min(count - own, int((~positive).sum()))
