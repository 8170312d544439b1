"""Refusals before training; other refusals of stages are tested in tests/stages."""

from __future__ import annotations

import pytest

from cae2pipe.errors import SettingsError
from cae2pipe.training.fit import check_fit


def test_streams_that_cannot_be_shared_out_are_refused(targets, pretrain_settings):
    check_fit(targets, pretrain_settings(), 2)
    words = r"data\.streams \(4\) is not divisible by the number of processes \(3\)"
    with pytest.raises(SettingsError, match=words) as caught:
        check_fit(targets, pretrain_settings(), 3)
    assert caught.value.where == "data.streams"
