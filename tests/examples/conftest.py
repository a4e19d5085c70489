"""Shows, at the end, what each example predicted and how long it took."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        text
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, text in report.user_properties
        if name == "example"
    ]
    if lines:
        terminalreporter.section("examples")
        for line in sorted(lines):
            terminalreporter.write_line(line)
