import io

from cae2pipe.runtime.progress import Lines, Silent, duration, progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(*, done: int = 0) -> tuple[Lines, io.StringIO, Clock]:
    file, clock = io.StringIO(), Clock()
    lines = Lines("job", file, clock, interval=10)
    lines.total(100, "images", done=done)
    return lines, file, clock


def test_lines_come_at_most_once_an_interval():
    lines, file, clock = lines_of()
    for _ in range(25):
        clock.now += 1
        lines.advance(1)
    assert file.getvalue().count("\n") == 2


def test_the_last_unit_is_always_told_with_its_figures():
    lines, file, _ = lines_of(done=99)
    lines.advance(1, loss=0.123456)
    assert file.getvalue() == "job: 100/100 images  loss 0.1235\n"


def test_time_left_comes_from_this_run_alone():
    lines, file, clock = lines_of(done=80)
    clock.now += 10
    lines.advance(10)
    assert "90/100 images  left 0:10" in file.getvalue()


def test_logs_bear_the_job():
    lines, file, _ = lines_of()
    lines.log("something")
    assert file.getvalue() == "job: something\n"


def test_duration():
    assert [duration(s) for s in (5, 75, 3675)] == ["0:05", "1:15", "1:01:15"]


def test_without_a_terminal_plain_lines_go_to_stderr(capsys):
    with progress("job") as report:
        report.total(2, "images")
        report.advance(2)
    assert capsys.readouterr().err == "job: 2/2 images\n"


def test_silent_keeps_the_log():
    silent = Silent()
    silent.log("a")
    assert silent.lines == ["a"]
