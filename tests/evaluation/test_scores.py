"""Accuracies, per class and in total; files of predictions."""

import numpy as np
import pytest
import torch

from cae2pipe.evaluation.scores import (
    Predictions,
    accuracy,
    confusion,
    from_scores,
    joined_predictions,
    per_class,
    write_predictions,
)
from cae2pipe.reporting.confusion import draw_confusion


@pytest.fixture
def predictions() -> Predictions:
    ranked = np.array([[0, 1, 2], [1, 0, 2], [2, 1, -1], [0, -1, -1]])
    return Predictions(ranked, np.zeros((4, 3), np.float32), np.array([0, 0, 1, 2]), list("abcd"))


def test_by_hand(predictions):
    assert accuracy(predictions) == {"top1": 0.25, "top5": 0.75}
    assert per_class(predictions, ["x", "y", "z", "none of these"]) == {"x": 0.5, "y": 0.0, "z": 0.0}
    assert confusion(predictions, 3).tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_logits_become_ranks_and_shares():
    logits = torch.tensor([[0.0, 2.0, 1.0]]).log_softmax(1)
    predictions = from_scores(logits, torch.tensor([2]), ["k"])
    assert predictions.ranked.tolist() == [[1, 2, 0]]
    assert predictions.confidence[0].tolist() == pytest.approx(sorted(logits.exp()[0].tolist(), reverse=True))


def test_parts_are_put_together_in_order(predictions):
    both = joined_predictions([predictions, predictions])
    assert both.keys == list("abcdabcd")
    assert accuracy(both) == accuracy(predictions)


def test_files_hold_predictions_and_equal_predictions_give_equal_bytes(predictions, tmp_path):
    names = ["x", "y", "ä b"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        files = write_predictions(tmp_path / folder, predictions, names)
        assert set(files) == {"predictions.npz", "confusion.png"}
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with np.load(tmp_path / "one" / "predictions.npz", allow_pickle=False) as stored:
        assert stored["keys"].tolist() == predictions.keys
        assert stored["classes"].tolist() == names
        assert np.array_equal(stored["ranked"], predictions.ranked)


@pytest.mark.parametrize("classes", [2, 40, 41, 1000])
def test_a_confusion_picture_of_any_size(classes):
    counts = np.eye(classes, dtype=np.int64) * 5
    picture = draw_confusion(counts, [f"class {n}" for n in range(classes)])
    assert picture.shape[0] == picture.shape[1] <= 2000
    # A perfect diagonal: dark in two corners of the square, white in the others.
    side = 44 * classes if classes <= 40 else 880
    square = picture[-20 - side : -20, -20 - side : -20]
    assert square[1, 1].sum() < square[1, -2].sum() == 3 * 255
