"""Parts: every unit has exactly one owner, and overlap is detected correctly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.artifacts.work_share import WHOLE, WorkShare, parse_part
from cae2pipe.errors import SettingsError

parts = st.integers(1, 12).flatmap(lambda count: st.builds(WorkShare, st.integers(1, count), st.just(count)))


@given(st.integers(1, 9), st.integers(0, 200))
def test_every_unit_has_one_owner(count: int, index: int) -> None:
    assert sum(WorkShare(number, count).owns(index) for number in range(1, count + 1)) == 1


@given(parts, st.integers(1, 5))
def test_ranks_share_a_part_without_overlap(part: WorkShare, ranks: int) -> None:
    shares = [part.split(rank, ranks) for rank in range(ranks)]
    for index in range(300):
        assert sum(share.owns(index) for share in shares) == part.owns(index)


@given(parts, parts)
def test_parts_overlap_where_they_share_a_unit(one: WorkShare, other: WorkShare) -> None:
    shared = any(one.owns(index) and other.owns(index) for index in range(one.count * other.count))
    assert one.overlaps(other) == shared


def test_parts_are_read_as_written() -> None:
    assert parse_part("3/8") == WorkShare(3, 8)
    assert str(parse_part("1/1")) == str(WHOLE)


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "a/b", "1/0", "-1/2", "1/" + "9" * 5000])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="expected K/N"):
        parse_part(text)
