"""The log's lines: what is for eyes steers no terminal, and what is repeated is summed up in time."""

from __future__ import annotations

import json
import os
import re
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


REPEATS = r"""
import time
from supervisor import log
log.configure("json", "info")
asked = []
log.correlate(dict, lambda when, action: asked.append(when - time.monotonic()))
for number in range(25):
    log.get_logger().warning("again")
    log.get_logger().warning("an event", time="has its own")
assert len(asked) == 1 and 0 < asked[0] <= 10, asked
log.sum_up(time.monotonic())  # too early
log.get_logger().info("between")
log.sum_up(time.monotonic() + 10)
log.get_logger().warning("again")
log.flush(5.0)
"""


def test_what_was_held_back_is_told_when_its_time_is_over_though_nothing_is_logged() -> None:
    """A timer is asked for once; then lines are written again."""
    done = subprocess.run(
        [sys.executable, "-c", REPEATS], capture_output=True, text=True, check=True, cwd=REPO
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    names = [line["event"] for line in lines]
    assert names.count("an event") == 25
    assert [name for name in names if name != "an event"] == [
        *["again"] * 10,
        "between",
        "log.repeated",
        "again",
    ]
    (told,) = (line for line in lines if line["event"] == "log.repeated")
    assert (told["line"], told["times"], told["level"]) == ("again", 15, "warning")


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
    assert (re.search(rb"\x1b\[[\d;]*m", written) is not None) is coloured
