"""Lists of names in words."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 10
"""Number of names of a list that are shown; the others are counted."""


def listed(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
