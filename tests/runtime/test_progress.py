import io
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer

from cae2pipe.commands.shared import exits
from cae2pipe.runtime.progress import Lines, Notebook, Panel, Report, Silent, Within, duration, progress, speed
from cae2pipe.runtime.signals import deferred_stop
from cae2pipe.runtime.terminal import Terminal


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(*, done: int = 0) -> tuple[Lines, io.StringIO, Clock]:
    file, clock = io.StringIO(), Clock()
    lines = Lines("job", file, clock, interval=10)
    lines.total(100, "images", done=done)
    return lines, file, clock


def panel_of(width: int = 80) -> tuple[Panel, Clock]:
    clock = Clock()
    return Panel("job", Terminal(file=io.StringIO(), width=width, force_terminal=True, no_color=True), clock), clock


def rendered(panel: Panel) -> list[str]:
    """The lines that a panel shows, without escape sequences."""
    with panel.console.capture() as capture:
        panel.console.print(panel.render())
    return [line.rstrip() for line in visible_text(capture.get()).splitlines()]


def visible_text(text: str) -> str:
    from rich.text import Text

    return Text.from_ansi(text).plain


def test_lines_come_at_most_once_an_interval():
    lines, file, clock = lines_of()
    for _ in range(25):
        clock.now += 1
        lines.advance(1)
    assert file.getvalue().count("\n") == 2


def test_a_line_has_phase_amount_rate_times_figures():
    lines, file, clock = lines_of()
    lines.phase("training")
    lines.total(1000, "steps", done=400)
    clock.now += 10
    lines.advance(30, loss=0.123456, data_wait=0.256)
    assert file.getvalue().splitlines() == [
        "job: training",
        "job: training: 430/1000 steps  3 steps/s  elapsed 0:10  left 3:10  loss 0.1235  waits for data 26%",
    ]


def test_the_last_unit_is_always_told_with_its_figures():
    lines, file, _ = lines_of(done=99)
    lines.advance(1, loss=0.123456)
    assert file.getvalue() == "job: 100/100 images  elapsed 0:00  loss 0.1235\n"


def test_time_left_comes_from_this_run_alone():
    lines, file, clock = lines_of(done=80)
    clock.now += 10
    lines.advance(10)
    assert "90/100 images  1 images/s  elapsed 0:10  left 0:10" in file.getvalue()


def test_the_rate_is_that_of_the_last_minute():
    panel, clock = panel_of()
    panel.total(10_000, "images")
    for _ in range(300):  # five slow minutes
        clock.now += 1
        panel.advance(1)
    assert panel.rate() == pytest.approx(1, rel=0.01)
    for _ in range(60):
        clock.now += 1
        panel.advance(50)
    assert panel.rate() == pytest.approx(50, rel=0.05)
    clock.now += 60  # nothing comes any more
    assert panel.rate() == pytest.approx(25, rel=0.05)


def test_rare_units_have_a_rate_from_several_of_them():
    panel, clock = panel_of()
    panel.total(100, "epochs")
    for _ in range(20):
        clock.now += 600
        panel.advance(1)
    assert panel.amounts() == ["20/100 epochs", "6 epochs/h", "elapsed 3:20:00", "left 13:20:00"]


def test_many_units_need_little_memory():
    panel, clock = panel_of()
    panel.total(10**6, "images")
    for _ in range(10_000):
        clock.now += 0.01
        panel.advance(1)
    assert len(panel._earlier) < 100


def test_a_phase_of_unknown_length_has_no_bar():
    panel, clock = panel_of()
    panel.phase("loading the teacher")
    clock.now += 75
    (line,) = rendered(panel)
    assert line.endswith("job: loading the teacher elapsed 1:15")
    assert not line.startswith("job")  # a spinner
    panel.total(8, "views")
    panel.advance(4)
    heading, bar = rendered(panel)
    assert heading == "job: loading the teacher"
    assert bar.endswith(" 4/8 views  elapsed 0:00")
    assert "━" in bar
    panel.phase("writing")
    assert "━" not in "".join(rendered(panel))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_panel_fits_its_terminal(width):
    panel, clock = panel_of(width)
    panel.phase("run 12 of 24, CAE v2 with a rather long name, training")
    panel.total(1_234_567, "steps")
    clock.now += 10
    panel.advance(100, loss=0.5, lr=1e-3, images_per_s=123.4, data_wait=0.5)
    panel.waits_for("another process to calibrate")
    lines = rendered(panel)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "100/1234567 steps 10 steps/s elapsed 0:10 left 34:17:27" in text
    assert "waiting for another process to calibrate 0:00" in text
    assert lines[0].startswith("job: run 12 of 24, CAE v2 with")


def test_what_is_waited_for_is_shown_until_work_goes_on():
    panel, clock = panel_of()
    panel.total(3, "steps")
    panel.waits_for("the first step to compile")
    clock.now += 61
    assert "waiting for the first step to compile 1:01" in rendered(panel)
    panel.advance(1)
    assert "waiting" not in "".join(rendered(panel))
    lines, file, _ = lines_of()
    lines.waits_for("another process")
    assert file.getvalue() == "job: waiting for another process\n"


def test_work_before_its_total_is_known_has_figures_only():
    panel, _ = panel_of()
    panel.phase("reading")
    panel.advance(5, found=5)
    assert rendered(panel)[1] == "found 5"
    lines = Lines("job", io.StringIO(), Clock())
    lines.advance(5)
    assert lines.file.getvalue() == ""


def test_parts_bear_their_name():
    lines, file, _ = lines_of()
    part: Report = Within(lines, "run 2 of 3")
    part.phase("training")
    part.total(1, "steps")
    part.advance(1, loss=1.0)
    part.log("done")
    assert file.getvalue().splitlines() == [
        "job: run 2 of 3, training",
        "job: run 2 of 3, training: 1/1 step  elapsed 0:00  loss 1",
        "job: done",
    ]


def test_a_notebook_has_one_output_that_changes_at_most_once_a_second():
    shown: list[str] = []
    clock = Clock()
    notebook = Notebook("job", shown.append, clock)
    notebook.phase("training")
    notebook.total(1000, "steps")
    for _ in range(1000):
        clock.now += 0.01
        notebook.advance(1, loss=0.5)
    notebook.log("wrote encoder")
    notebook.show()
    assert 10 <= len(shown) <= 13
    assert shown[-1] == "job: wrote encoder\njob: training: 1000/1000 steps  100 steps/s  elapsed 0:10  loss 0.5"
    for number in range(1000):
        notebook.log(f"line {number}")
    notebook.show()
    assert len(shown[-1].splitlines()) == Notebook.KEPT + 1


def test_a_kernel_gets_an_updated_output(monkeypatch, capsys):
    updates: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            updates.append(data["text/plain"])

    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=lambda *args, **options: Handle()))
    with progress("job") as report:
        report.total(2, "images")
        report.advance(2)
    assert updates[-1] == "job: 2/2 images  elapsed 0:00"
    assert capsys.readouterr().err == ""
    kernel.get_ipython = lambda: None  # IPython was imported, but runs nothing
    with progress("job") as report:
        report.log("a line")
    assert capsys.readouterr().err == "job: a line\n"


def test_logs_bear_the_job():
    lines, file, _ = lines_of()
    lines.log("something")
    assert file.getvalue() == "job: something\n"


def test_duration():
    assert [duration(s) for s in (5, 75, 3675)] == ["0:05", "1:15", "1:01:15"]


def test_speed():
    rates = [speed(rate, "views") for rate in (12345.6, 12.34, 1, 0.5, 0.001)]
    assert rates == ["12346 views/s", "12.3 views/s", "1 views/s", "30 views/min", "3.6 views/h"]


def test_without_a_terminal_plain_lines_go_to_stderr(capsys):
    with progress("job") as report:
        report.total(2, "images")
        report.advance(2)
    assert capsys.readouterr().err == "job: 2/2 images  elapsed 0:00\n"


def test_silent_keeps_the_log():
    silent = Silent()
    silent.phase("b")
    silent.log("a")
    assert silent.lines == ["a"]


LOSING_THE_TERMINAL = """
import sys
from cae2pipe.runtime.progress import Panel, progress

with progress("job") as report:
    assert isinstance(report, Panel)
    report.total(3, "steps")
    report.log("begun")
    sys.stdin.readline()
    for _ in range(3):
        report.advance()
        report.log("a line")
        print("to stderr", file=sys.stderr)
"""


def test_a_terminal_that_goes_does_not_end_the_work():
    """As of a script that outlives its window."""
    master, slave = os.openpty()
    command = [sys.executable, "-c", LOSING_THE_TERMINAL]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=slave, env={**os.environ, "TERM": "xterm"}
    )
    os.close(slave)
    while b"begun" not in os.read(master, 2**16):
        pass
    os.close(master)
    out, _ = child.communicate(b"\n")
    assert (out, child.returncode) == (b"", 0)


def test_one_of_one_is_not_a_plural():
    file = io.StringIO()
    report = Lines("job", file, Clock())
    for unit in ("shards", "batches", "classes"):
        report.total(1, unit)
        report.advance()
    assert [line.split()[2] for line in file.getvalue().splitlines()] == ["shard", "batch", "class"]


def test_a_panel_says_at_once_that_the_work_stops():
    panel, _ = panel_of()
    panel.total(100, "steps")

    def said() -> list[str]:
        return [line for line in rendered(panel) if "stopping" in line]

    with deferred_stop():
        assert said() == []
        signal.raise_signal(signal.SIGINT)
        assert said() == ["stopping after this step; Ctrl-C again stops at once"]
    assert said() == []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:  # workers are ended
            assert said() == ["stopping"]

    with pytest.raises(typer.Exit), exits():
        work()
    assert said() == []


@pytest.mark.parametrize("brief", [False, True])
def test_what_is_brief_has_a_panel_but_no_lines(brief, monkeypatch, capsys):
    with progress("job", brief=brief) as report:
        report.phase("reading")
    assert capsys.readouterr().err == ("" if brief else "job: reading\n")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("job", brief=brief) as report:
        report.phase("reading")
    assert "job: reading" in terminal.getvalue()
    erased = "\x1b[2K" in terminal.getvalue().split("job: reading")[-1]
    assert erased == brief
