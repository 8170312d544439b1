"""Seconds of a test run by folder, and the folders that exceed their budget."""

from __future__ import annotations

from collections import Counter

import pytest

SHARES = {"benchmarks": 70, "cuda": 85, "teachers": 60}
"""Time budget of each folder's tests: seconds on one free core, summed over all processes. All other folders share
``OTHERS``. Two cores should finish within ten minutes."""
OTHERS = 800


def by_folder(reports: list[pytest.TestReport]) -> Counter[str]:
    """Seconds of the tests in each folder of tests/, and of each file directly in it."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[report.nodeid.split("::")[0].removeprefix("tests/").split("/")[0]] += report.duration
    return seconds


def over(seconds: Counter[str]) -> list[str]:
    """Messages about folders that exceed their budget. They are not failures, since a busy machine also makes tests
    slow."""
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
