import pytest

from cae2pipe.demo.measures import MEASURES, rows

GOOD = {
    "images": 384,
    "views": 4,
    "bytes_per_view_fp16": 44296,
    "bytes_per_view": 5339.2,
    "fidelity_mean": 0.9714,
    "fidelity_p1": 0.9606,
    "loss_first": 1.99,
    "loss_last": 1.1,
    "loss_mean_token": 1.52,
    "centred_cosine_masked": 0.3,
    "knn_random": 0.41,
    "knn_pretrained": 0.8,
    "knn_teacher": 0.76,
    "seconds": 164.0,
}


def missed(result):
    return {measure.key for measure in MEASURES if measure.met(result) is False}


def test_the_keys_of_the_result():
    assert [measure.key for measure in MEASURES] == list(GOOD)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bytes_per_view", 0.16 * 44296),
        ("fidelity_mean", 0.9699),
        ("loss_last", 1.52),
        ("centred_cosine_masked", 0.149),
        ("knn_pretrained", 0.45),
    ],
)
def test_each_goal_can_be_missed(key, value):
    assert missed(GOOD) == set()
    assert missed({**GOOD, key: value}) == {key}


def test_the_table_shows_every_measure():
    table = rows(GOOD)
    assert len(table) == len(GOOD)
    assert {"measure": "bytes per view, stored", "value": "5,339", "goal": "≤ 6,644", "": "reached"} in table
    assert sum(row[""] == "reached" for row in table) == 5
