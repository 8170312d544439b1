"""Where the time of a test run goes: seconds by folder, and which folders take more than their share."""

from __future__ import annotations

from collections import Counter

import pytest

SHARES = {"benchmarks": 40, "cuda": 60, "teachers": 45}
"""Seconds that a folder's tests may take on a core of their own, added up over all processes. All that is not named
here shares ``OTHERS``: two cores are to be done within ten minutes."""
OTHERS = 800


def by_folder(reports: list[pytest.TestReport]) -> Counter[str]:
    """Seconds of the tests in each folder of tests/, and of each file that lies in none."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[report.nodeid.split("::")[0].removeprefix("tests/").split("/")[0]] += report.duration
    return seconds


def over(seconds: Counter[str]) -> list[str]:
    """What to say of folders that take more than their share. A busy machine makes them slow too: it fails nothing."""
    others = sum(took for folder, took in seconds.items() if folder not in SHARES)
    known = {folder: (seconds[folder], share) for folder, share in SHARES.items()} | {"others": (others, OTHERS)}
    return [f"{folder} took {took:.0f} s of {share}" for folder, (took, share) in known.items() if took > share]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        each for group in terminalreporter.stats.values() for each in group if isinstance(each, pytest.TestReport)
    ]
    seconds = by_folder(reports)
    if len(seconds) > 1:
        terminalreporter.section("seconds by folder")
        terminalreporter.write_line(", ".join(f"{folder} {took:.0f}" for folder, took in seconds.most_common()))
        for line in over(seconds):
            terminalreporter.write_line(f"MORE THAN ITS SHARE: {line}")
