"""Progress of a long job: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from cae2pipe.runtime.foreign_names import visible

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.progress import Progress, TaskID

    from cae2pipe.runtime.terminal import Terminal


class Report(Protocol):
    """What stages report to. Fields of ``advance`` are figures to show, such as ``loss`` or ``images_per_s``."""

    def total(self, n: int, unit: str, done: int = 0) -> None:
        """Work of ``n`` units begins, of which an earlier run did ``done``."""

    def advance(self, n: int = 1, /, **fields: float) -> None:
        """``n`` more units are done."""

    def log(self, text: str) -> None:
        """Write a line."""


class Silent:
    """Shows nothing, and keeps the logged lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def total(self, n: int, unit: str, done: int = 0) -> None:
        pass

    def advance(self, n: int = 1, /, **fields: float) -> None:
        pass

    def log(self, text: str) -> None:
        self.lines.append(text)


class Lines:
    """Plain lines, one every ``interval`` seconds at most, for logs and pipes.

    Args:
        title: the job's name.
        file: where lines go.
        clock: seconds, monotonic.
        interval: seconds between lines.
    """

    def __init__(
        self, title: str, file: TextIO, clock: Callable[[], float] = time.monotonic, *, interval: float = 10.0
    ) -> None:
        self.title = title
        self.file = file
        self.clock = clock
        self.interval = interval
        self._n = 0
        self._done = 0
        self._first = 0  # an earlier run's work does not count for the speed
        self._unit = ""
        self._began = self._shown = clock()

    def total(self, n: int, unit: str, done: int = 0) -> None:
        self._n, self._done, self._first, self._unit = n, done, done, unit
        self._began = self._shown = self.clock()

    def advance(self, n: int = 1, /, **fields: float) -> None:
        self._done += n
        now = self.clock()
        if now - self._shown >= self.interval or self._done == self._n:
            self._shown = now
            parts = [f"{self._done}/{self._n} {self._unit}", *(f"{k} {four_digits(v)}" for k, v in fields.items())]
            fresh = self._done - self._first
            if self._done < self._n:
                parts.append(f"left {duration((now - self._began) / fresh * (self._n - self._done))}")
            self._write("  ".join(parts))

    def log(self, text: str) -> None:
        self._write(text)

    def _write(self, text: str) -> None:
        self.file.write(visible(f"{self.title}: {text}") + "\n")
        self.file.flush()


def four_digits(value: float) -> str:
    """A figure with four significant digits."""
    return f"{value:.4g}"


def gigabytes(count: float) -> str:
    """Bytes in the largest unit in which the value is at least 1: ``1500000000`` as ``1.5 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``3675`` as ``1:01:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """A report on stderr: a bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield Lines(title, sys.stderr)
        return
    from rich.console import Group
    from rich.live import Live

    from cae2pipe.runtime.terminal import Terminal

    console = Terminal(stderr=True)
    bars = _bars(console)
    panel = _Panel(bars, title)
    with Live(get_renderable=lambda: Group(bars, panel.figures()), console=console, refresh_per_second=4):
        yield panel


def _bars(console: Terminal) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class _Panel:
    """The protocol as a rich bar with the latest figures below it."""

    def __init__(self, bars: Progress, title: str) -> None:
        self.bars = bars
        self.title = title
        self.task: TaskID | None = None
        self._fields: dict[str, float] = {}

    def figures(self) -> Columns:
        from rich.columns import Columns
        from rich.text import Text

        cells = [
            Text.assemble((visible(name), "dim"), f" {four_digits(value)}") for name, value in self._fields.items()
        ]
        return Columns(cells, padding=(0, 3), equal=True)

    def total(self, n: int, unit: str, done: int = 0) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(visible(self.title), total=n, completed=done, unit=visible(unit))

    def advance(self, n: int = 1, /, **fields: float) -> None:
        if self.task is None:
            return
        self._fields = fields or self._fields
        self.bars.advance(self.task, n)

    def log(self, text: str) -> None:
        self.bars.console.print(visible(f"{self.title}: {text}"), soft_wrap=True)
