"""Progress of a long job: a live panel in a terminal, one updated output in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO, runtime_checkable

from cae2pipe.runtime.foreign_names import visible
from cae2pipe.runtime.signals import stopping
from cae2pipe.runtime.streams import forgiving
from cae2pipe.runtime.wording import singular

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from cae2pipe.runtime.terminal import Terminal

WINDOW = 60.0
"""Seconds over which the rate is measured."""
BYTES = "bytes"
"""The unit that is shown as kB, MB, ..."""
ADVANCES = 8
"""Number of the latest advances that the rate covers at least, where they are rarer."""


@runtime_checkable
class Report(Protocol):
    """What stages report to."""

    def phase(self, name: str) -> None:
        """The job turns to something else, of unknown length until ``total`` is called."""

    def total(self, n: int, unit: str, done: int = 0) -> None:
        """The phase is work of ``n`` units, of which an earlier run did ``done``."""

    def advance(self, n: int = 1, /, **fields: float) -> None:
        """``n`` more units are done.

        Fields are figures to show, such as ``loss``; ``data_wait`` is the share of the time that waits for data, and
        other names that end in ``_wait`` likewise.
        """

    def waits_for(self, what: str) -> None:
        """Until the next call of ``advance``, ``total`` or ``phase`` the job waits for ``what``."""

    def log(self, text: str) -> None:
        """Write a line."""


class Silent:
    """Shows nothing, and keeps the logged lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase(self, name: str) -> None:
        pass

    def total(self, n: int, unit: str, done: int = 0) -> None:
        pass

    def advance(self, n: int = 1, /, **fields: float) -> None:
        pass

    def waits_for(self, what: str) -> None:
        pass

    def log(self, text: str) -> None:
        self.lines.append(text)


class Within:
    """The report of a part of a job: its phases start with the part's name, such as ``run 2 of 6``."""

    def __init__(self, report: Report, part: str) -> None:
        self.part = part
        self.total, self.advance = report.total, report.advance
        self.waits_for, self.log = report.waits_for, report.log
        self._phase = report.phase

    def phase(self, name: str) -> None:
        self._phase(f"{self.part}, {name}")


class Tracked:
    """What is known of a job's present phase: what has been reported, rate, and time left.

    Args:
        title: the job's name.
        clock: seconds, monotonic.
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.title = title
        self.clock = clock
        self.name = self.unit = self.waiting = ""
        self.n: int | None = None
        self.done = 0
        self.fields: dict[str, float] = {}
        self.began = self._waits_since = clock()
        self._earlier: deque[tuple[float, int]] = deque()

    def phase(self, name: str) -> None:
        self.name, self.n, self.waiting, self.fields = name, None, "", {}
        self.began = self.clock()

    def total(self, n: int, unit: str, done: int = 0) -> None:
        self.began = self.clock()
        # An earlier run's work does not count for the rate.
        self._earlier = deque([(self.began, done)])
        self.done, self.unit, self.waiting, self.fields = done, unit, "", {}
        self.n = n

    def advance(self, n: int = 1, /, **fields: float) -> None:
        self.waiting = ""
        self.fields = fields or self.fields
        if self.n is None:
            return
        self.done += n
        now, earlier = self.clock(), self._earlier
        if now - earlier[-1][0] >= WINDOW / 60:
            earlier.append((now, self.done))
            while len(earlier) > ADVANCES and earlier[1][0] <= now - WINDOW:
                earlier.popleft()

    def waits_for(self, what: str) -> None:
        self.waiting, self._waits_since = what, self.clock()

    def rate(self) -> float | None:
        """Units per second, lately; None in the first second, and before the first unit."""
        if self.n is None:
            return None
        began, first = self._earlier[0]
        seconds = self.clock() - began
        return (self.done - first) / seconds if seconds >= 1 and self.done > first else None

    def heading(self) -> str:
        """Job and phase."""
        return f"{self.title}: {self.name}" if self.name else self.title

    def amounts(self) -> list[str]:
        """Done of all, rate, time since the phase began, time left; of these what is known."""
        parts = [] if self.n is None else [done_of(self.done, self.n, self.unit)]
        rate = self.rate()
        if rate is not None:
            parts.append(speed(rate, self.unit))
        parts.append(f"elapsed {duration(self.clock() - self.began)}")
        if self.n is not None and rate is not None and self.done < self.n:
            parts.append(f"left {duration((self.n - self.done) / rate)}")
        return parts

    def figures(self) -> list[tuple[str, str]]:
        """Names and values of the latest figures."""
        return [
            (f"waits for {name.removesuffix('_wait')}", f"{value:.0%}")
            if name.endswith("_wait")
            else (name, four_digits(value))
            for name, value in self.fields.items()
        ]

    def wait(self) -> str:
        """What the job waits for, and since when."""
        return f"waiting for {self.waiting} {duration(self.clock() - self._waits_since)}"

    def line(self) -> str:
        """All of it in a line."""
        parts = [*self.amounts(), *(f"{name} {value}" for name, value in self.figures())]
        if self.waiting:
            parts.append(self.wait())
        return f"{self.heading()}: {'  '.join(parts)}"


class Lines(Tracked):
    """Plain lines, one every ``interval`` seconds at most, for logs and pipes. Phases and waits have a line each.

    Args:
        title: the job's name.
        file: where lines go.
        clock: seconds, monotonic.
        interval: seconds between lines.
    """

    def __init__(
        self, title: str, file: TextIO, clock: Callable[[], float] = time.monotonic, *, interval: float = 10.0
    ) -> None:
        super().__init__(title, clock)
        self.file = file
        self.interval = interval
        self._shown = clock()

    def phase(self, name: str) -> None:
        super().phase(name)
        self._write(self.heading())

    def total(self, n: int, unit: str, done: int = 0) -> None:
        super().total(n, unit, done)
        self._shown = self.clock()

    def advance(self, n: int = 1, /, **fields: float) -> None:
        super().advance(n, **fields)
        now = self.clock()
        if self.n is not None and (now - self._shown >= self.interval or self.done == self.n):
            self._shown = now
            self._write(self.line())

    def waits_for(self, what: str) -> None:
        super().waits_for(what)
        self._write(f"{self.heading()}: waiting for {what}")

    def log(self, text: str) -> None:
        self._write(f"{self.title}: {text}")

    def _write(self, text: str) -> None:
        # A log that cannot be written must not end the work that it is about.
        with suppress(OSError, ValueError):
            self.file.write(visible(text) + "\n")
            self.file.flush()


class Notebook(Tracked):
    """A notebook's output: logged lines and the latest state, updated every ``interval`` seconds at most.

    Args:
        title: the job's name.
        update: replaces what is shown.
        clock: seconds, monotonic.
        interval: seconds between updates.
    """

    KEPT = 100
    """Number of logged lines that are shown."""

    def __init__(
        self,
        title: str,
        update: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        interval: float = 1.0,
    ) -> None:
        super().__init__(title, clock)
        self.update = update
        self.interval = interval
        self._lines: deque[str] = deque(maxlen=self.KEPT)
        self._shown = -float("inf")

    def phase(self, name: str) -> None:
        super().phase(name)
        self.show()

    def total(self, n: int, unit: str, done: int = 0) -> None:
        super().total(n, unit, done)
        self._show_later()

    def advance(self, n: int = 1, /, **fields: float) -> None:
        super().advance(n, **fields)
        self._show_later()

    def waits_for(self, what: str) -> None:
        super().waits_for(what)
        self._show_later()

    def log(self, text: str) -> None:
        self._lines.append(visible(f"{self.title}: {text}"))
        self._show_later()

    def show(self) -> None:
        """Update now."""
        self._shown = self.clock()
        self.update("\n".join([*self._lines, visible(self.line())]))

    def _show_later(self) -> None:
        if self.clock() - self._shown >= self.interval:
            self.show()


def four_digits(value: float) -> str:
    """A figure with four significant digits."""
    return f"{value:.4g}"


def done_of(done: int, n: int, unit: str) -> str:
    """How much is done: ``3/8 files``; ``1.5 GB/12 GB``."""
    if unit == BYTES:
        return f"{gigabytes(done)}/{gigabytes(n)}"
    return f"{done}/{n} {singular(unit) if n == 1 else unit}"


def speed(rate: float, unit: str) -> str:
    """Units per second, or per minute or hour where these are less than one. Of bytes, those in larger units."""
    if unit == BYTES:
        return f"{gigabytes(rate)}/s"
    for period, seconds in (("s", 1), ("min", 60), ("h", 3600)):
        if rate * seconds >= 1 or period == "h":
            break
    value = rate * seconds
    return f"{value:.0f} {unit}/{period}" if value >= 100 else f"{value:.3g} {unit}/{period}"


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
def progress(title: str, *, brief: bool = False) -> Iterator[Report]:
    """A report: a panel on stderr if that is a terminal, an output in a notebook, lines on stderr elsewhere.

    ``brief``: for what usually takes less than a second. The panel is removed at the end, and there are no lines.
    """
    if in_notebook():
        from IPython.display import display

        handle = display({"text/plain": ""}, raw=True, display_id=True)
        notebook = Notebook(title, lambda text: handle.update({"text/plain": text}, raw=True))
        try:
            yield notebook
        finally:
            notebook.show()
        return
    if sys.stderr is None:  # closed when Python was started
        yield Silent()
        return
    from cae2pipe.runtime.terminal import Terminal

    # rich would end the process, or raise, where the terminal has gone.
    console = Terminal(file=forgiving(sys.stderr))
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield Silent() if brief else Lines(title, sys.stderr)
        return
    from rich.live import Live

    panel = Panel(title, console)
    with Live(get_renderable=panel.render, console=console, refresh_per_second=4, transient=brief):
        try:
            yield panel
        finally:
            panel.ended = True


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class Panel(Tracked):
    """A terminal's panel: the phase, a bar where the phase's length is known, the latest figures."""

    def __init__(self, title: str, console: Terminal, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.spinner import Spinner

        super().__init__(title, clock)
        self.console = console
        self.ended = False
        self._spinner = Spinner("dots")

    def render(self) -> Group:
        from rich.columns import Columns
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        n = self.n
        heading = Text(visible(self.heading()), "bold", overflow="ellipsis", no_wrap=True)
        amounts = Text(visible("  ".join(self.amounts())))
        top = Table.grid(padding=(0, 1))
        top.add_row(
            *([] if self.ended or n is not None else [self._spinner]), heading, *([amounts] if n is None else [])
        )
        rows: list[RenderableType] = [top]
        if n is not None:
            bar = ProgressBar(total=max(1, n), completed=self.done if n else 1)
            beside = self.console.width >= len(amounts) + 12
            line = Table.grid(padding=(0, 1), expand=True)
            line.add_column(ratio=1)
            if beside:
                line.add_column(no_wrap=True)
            line.add_row(bar, *([amounts] if beside else []))
            rows += [line] if beside else [line, amounts]
        if not self.ended and (stop := stopping()):
            rows.append(Text(stop, "bold yellow"))
        if self.waiting and not self.ended:
            rows.append(Text(visible(self.wait()), "yellow"))
        figures = [Text.assemble((visible(name), "dim"), f" {value}") for name, value in self.figures()]
        if figures:
            rows.append(Columns(figures, padding=(0, 3), equal=True))
        return Group(*rows)

    def log(self, text: str) -> None:
        self.console.print(visible(f"{self.title}: {text}"), soft_wrap=True)
