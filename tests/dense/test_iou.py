"""Intersection over union compared with scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.dense.iou import pixel_confusion, segmentation_scores


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), void=st.floats(0, 0.6))
def test_agrees_with_scikit_learn(seed, classes, void):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score

    rng = np.random.default_rng(seed)
    truth, found = rng.integers(0, classes, (2, 3, 20, 20)).astype(np.uint8)
    found[rng.random(found.shape) < 0.5] = truth[rng.random(found.shape) < 0.5][0]
    counted = rng.random(truth.shape) >= void
    labels = np.where(counted, truth, 255)
    confusion = sum(
        pixel_confusion(torch.from_numpy(f), torch.from_numpy(t), classes) for f, t in zip(found, labels, strict=True)
    )
    names = [f"c{n}" for n in range(classes)]
    scores = segmentation_scores(confusion, names)
    t, f = truth[counted], found[counted]
    there = sorted(set(t) | set(f))
    wanted = jaccard_score(t, f, average=None, labels=there)
    assert scores["miou"] == pytest.approx(wanted.mean())
    assert scores["per_class"] == pytest.approx({f"c{n}": value for n, value in zip(there, wanted, strict=True)})
    assert scores["pixel_accuracy"] == pytest.approx(accuracy_score(t, f))
    if set(f) <= set(t):  # scikit-learn warns otherwise
        assert scores["mean_accuracy"] == pytest.approx(balanced_accuracy_score(t, f))
