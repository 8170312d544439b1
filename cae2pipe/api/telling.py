"""Where a function reports its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cae2pipe.runtime.processes import refuse_import_of_main
from cae2pipe.runtime.progress import Report, Silent, progress

Progress = bool | Report | None
"""True: a panel in a terminal, an updated output in a notebook, else lines. False or None: nothing. Or your own
``Report``."""


@contextmanager
def reporting(wanted: Progress, title: str) -> Iterator[Report]:
    """The report of a function that was called with ``progress=wanted``."""
    # Before the work begins: the main process may hold its locks.
    refuse_import_of_main()
    if wanted is True:
        with progress(title) as report:
            yield report
    else:
        yield wanted or Silent()
