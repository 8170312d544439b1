"""Where a function reports its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cae2pipe.runtime.progress import Report, Silent, progress

Progress = bool | Report
"""True: a panel in a terminal, an updated output in a notebook, else lines. False: nothing. Or your own ``Report``."""


@contextmanager
def reporting(wanted: Progress, title: str) -> Iterator[Report]:
    """The report of a function that was called with ``progress=wanted``."""
    if wanted is True:
        with progress(title) as report:
            yield report
    else:
        yield Silent() if wanted is False else wanted
