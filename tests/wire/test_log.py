"""The log's lines: what is for eyes cannot steer the terminal that shows it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.supervised import REPO

SAYS = r"""
from supervisor import log
log.configure({style!r}, "info")
log.get_logger().info("said", error="\x1b[2J\x07", traceback="first\x1b]0;owned\x07\n  second\n")
log.flush(5.0)
"""


@pytest.mark.parametrize("style", ["console", "json"])
def test_no_line_steers_the_terminal(style: str) -> None:
    """Escape sequences in what user code has said are made harmless; its lines stay lines."""
    done = subprocess.run(
        [sys.executable, "-c", SAYS.format(style=style)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPO,
    )
    assert "owned" in done.stderr
    assert not {"\x1b", "\x07"} & set(done.stderr)
    assert (style == "json") is ("\n  second" not in done.stderr)
