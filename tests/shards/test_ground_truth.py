"""Kaggle's table of labels, read correctly or refused."""

from __future__ import annotations

import pytest

from cae2pipe.errors import SourceError
from cae2pipe.shards.ground_truth import read_ground_truth


def test_an_image_may_be_listed_twice_with_one_class(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("ImageId,PredictionString\nb,n2 1 2 3 4 n2 5 6 7 8\na,n1 1\nb.JPEG,n2 3\n")
    assert read_ground_truth(path).by_name == {"a": "n1", "b": "n2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,n1 3\na.JPEG,n2 3\n", "image 'a' has two classes, n1 and n2"),
        (f"a,{'x' * 200_000}\n", "this is not a CSV table: field larger"),
        ("a\n", r"this line has no class: \['a'\]"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(rows, message, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("ImageId,PredictionString\n" + rows)
    with pytest.raises(SourceError, match=message):
        read_ground_truth(path)
