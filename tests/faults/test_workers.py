"""Workers that the kernel kills."""

from __future__ import annotations

import os
import signal

import pytest
from torch.utils.data import Dataset

from cae2pipe.errors import WorkerError
from cae2pipe.loading.workers import in_order


class Deadly(Dataset):
    """Its third item costs the worker its life."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker_is_an_error_with_a_remedy() -> None:
    with pytest.raises(WorkerError, match="worker process was killed") as caught:
        list(in_order(Deadly(), 1))
    assert "fewer --workers" in caught.value.fix
