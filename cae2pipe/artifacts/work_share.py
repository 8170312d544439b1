"""Splitting one job among processes and machines: part 3 of 8 owns every eighth unit, starting with the third."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cae2pipe.errors import SettingsError


@dataclass(frozen=True)
class WorkShare:
    """Part ``number`` (from 1) of ``count``."""

    number: int = 1
    count: int = 1

    def owns(self, index: int) -> bool:
        """Whether the unit at this index belongs to this part."""
        return index % self.count == self.number - 1

    def overlaps(self, other: WorkShare) -> bool:
        """Whether some unit, in a list long enough, is owned by both."""
        return (self.number - other.number) % math.gcd(self.count, other.count) == 0

    def split(self, rank: int, ranks: int) -> WorkShare:
        """One rank's share of this part: every ``ranks``-th of its units."""
        return WorkShare(self.number + self.count * rank, self.count * ranks)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = WorkShare()


def parse_part(text: str) -> WorkShare:
    """Parse ``3/8`` as a part.

    Raises:
        SettingsError: invalid format.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise SettingsError(
            f"invalid --part {text!r}, expected K/N",
            where="--part",
            fix="give K/N with K from 1 to N, e.g. --part 3/8 on the third of 8 machines",
        )
    return WorkShare(int(match[1]), int(match[2]))
