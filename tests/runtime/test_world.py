from __future__ import annotations

import pytest
import torch

from cae2pipe.errors import SettingsError
from cae2pipe.runtime.ranks import Rank
from cae2pipe.runtime.world import joined


def test_streams_that_cannot_be_shared_out_are_refused():
    with (
        pytest.raises(SettingsError, match="among 3 processes"),
        joined(Rank(0, 3, 0, 3), torch.device("cpu"), "ddp", 64),
    ):
        pass
