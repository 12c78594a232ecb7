"""The log's lines: what is for eyes cannot steer the terminal that shows it."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize(
    ("env", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_has_colours_unless_it_or_somebody_refuses_them(env, coloured):
    """As https://no-color.org has it: NO_COLOR counts where it is not empty."""
    ours, theirs = os.openpty()
    try:
        code = "from supervisor import log; log.configure('console', 'info'); "
        code += "log.get_logger().info('hello'); log.flush(5.0)"
        subprocess.run(
            [sys.executable, "-c", code],
            stderr=theirs,
            check=True,
            cwd=REPO,
            env={"PATH": os.environ["PATH"], **env},
            timeout=30.0,
        )
        written = os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"hello" in written
    assert (b"\x1b[" in written) is coloured
