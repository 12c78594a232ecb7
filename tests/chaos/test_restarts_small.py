"""Crash after crash, few enough for every run of the suite; `tests.chaos.restarts` is the full size."""

from __future__ import annotations

from tests.chaos.restarts import measure


def test_crash_restarts_leave_nothing_behind(tmp_path):
    """No descriptor, no child, no zombie, and no more memory than a few events."""
    figures = measure(tmp_path, restarts=50, count=2)
    print(figures)
    figures.check()
