from __future__ import annotations

import pytest

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.ranks import Rank, torchrun_rank


def test_ranks_come_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_rank() == Rank(0, 1, 0, 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun_rank() == Rank(3, 4, 1, 2)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"RANK": ""}, "RANK=''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"WORLD_SIZE": "0"}, "RANK=1 is not below WORLD_SIZE=0"),
        ({"RANK": "5"}, "RANK=5 is not below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "9" * 5000}, "LOCAL_WORLD_SIZE='999"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 is more than WORLD_SIZE"),
    ],
)
def test_variables_that_torchrun_cannot_have_set_are_refused_by_name(changed, named, monkeypatch) -> None:
    right = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (right | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        torchrun_rank()
    assert named in caught.value.what
