"""Nearest neighbours: by hand, compared with a plain loop, and in numerically critical cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cae2pipe.evaluation.knn import knn_predictions
from cae2pipe.evaluation.scores import Predictions, accuracy


def knn_scores(train, labels, test, truth, **options) -> dict[int, dict[str, float]]:
    rankings = knn_predictions(train, labels, test, **options)
    return {
        k: accuracy(Predictions(best.numpy(), share.numpy(), truth.numpy(), []))
        for k, (best, share) in rankings.items()
    }


def at_angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_weights_decide_by_hand():
    # One neighbour of class 0 at 10 degrees against two of class 1 at 40: e^(.985/T) against 2 e^(.766/T).
    train, labels = at_angles(10, 40, -40), torch.tensor([0, 1, 1])
    test, truth = at_angles(0), torch.tensor([0])

    def top1(temperature: float, k: int = 3) -> float:
        scores = knn_scores(train, labels, test, truth, classes=2, k=[k], temperature=temperature)
        return scores[k]["top1"]

    assert top1(0.07) == 1  # e^(.219/.07) = 22.8 > 2
    assert top1(1.0) == 0  # e^.219 = 1.24 < 2
    assert top1(1.0, k=1) == 1


def test_length_of_features_does_not_matter():
    train, labels = at_angles(0, 90) * torch.tensor([[100.0], [0.01]]), torch.tensor([0, 1])
    scores = knn_scores(train, labels, at_angles(80, 10) * 7, torch.tensor([1, 0]), classes=2, k=[1], temperature=0.07)
    assert scores[1]["top1"] == 1


def plain_loop(train, labels, test, truth, classes, k, temperature):
    top1 = top5 = 0
    for features, label in zip(test, truth.tolist(), strict=True):
        cosines = [float(features @ t / features.norm() / t.norm()) for t in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * classes
        for index in nearest:
            votes[int(labels[index])] += math.exp(cosines[index] / temperature)
        ranked = [c for c in sorted(range(classes), key=lambda c: -votes[c]) if votes[c] > 0]
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
    return top1 / len(test), top5 / len(test)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    m=st.integers(1, 12),
    classes=st.integers(1, 8),
    k=st.integers(1, 40),
    chunk=st.integers(1, 13),
)
def test_agrees_with_a_plain_loop(seed, n, m, classes, k, chunk):
    generator = torch.Generator().manual_seed(seed)
    train, test = (torch.randn(count, 6, generator=generator, dtype=torch.float64) for count in (n, m))
    labels, truth = (torch.randint(classes, (count,), generator=generator) for count in (n, m))
    scores = knn_scores(train, labels, test, truth, classes=classes, k=[k], temperature=0.1, chunk=chunk)[k]
    assert (scores["top1"], scores["top5"]) == pytest.approx(plain_loop(train, labels, test, truth, classes, k, 0.1))


def test_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(0)
    labels, truth = torch.arange(90) % 3, torch.arange(60) % 3
    centres = torch.randn(3, 8, generator=generator)
    train = centres[labels] + torch.randn(90, 8, generator=generator)
    test = centres[truth] + torch.randn(60, 8, generator=generator)
    judge = neighbors.KNeighborsClassifier(7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = judge.fit(train.numpy(), labels.numpy()).score(test.numpy(), truth.numpy())
    scores = knn_scores(train, labels, test, truth, classes=3, k=[7], temperature=0.07)
    assert scores[7]["top1"] == pytest.approx(expected)
    assert 0.4 < expected < 1


def test_a_class_without_votes_is_no_prediction():
    scores = knn_scores(
        at_angles(0, 1, 90),
        torch.tensor([0, 0, 1]),
        at_angles(0),
        torch.tensor([1]),
        classes=4,
        k=[2],
        temperature=0.07,
    )
    assert scores[2] == {"top1": 0, "top5": 0}


@pytest.mark.parametrize("nearest", [0, 1])
def test_tiny_temperatures_do_not_overflow(nearest):
    # Overflowing votes would tie, and the tie would go to the same class both times.
    labels, truth = torch.tensor([nearest, 1 - nearest, 1 - nearest]), torch.tensor([nearest])
    scores = knn_scores(at_angles(0, 30, 31), labels, at_angles(2), truth, classes=2, k=[3], temperature=1e-4)
    assert scores[3]["top1"] == 1
