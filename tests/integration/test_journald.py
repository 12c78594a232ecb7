"""Lines for the journal: with their priority where standard error is the journal's own stream."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.supervised import Supervised, group, wait_until

FAILS = """
import logging
def run(worker):
    worker.log.warning("a.warning")
    logging.getLogger("library").critical("a library's\\nsecond line")
    raise RuntimeError("broken\\nin two lines")
"""


def stream_of(path: Path) -> str:
    """Return what JOURNAL_STREAM would say if this file were the journal."""
    path.touch()
    found = path.stat()
    return f"{found.st_dev}:{found.st_ino}"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_every_line_for_the_journal_has_its_priority(tmp_path: Path, log_format: str) -> None:
    """Of the supervisor and of its workers, each line of a traceback, and none has a colour."""
    supervised = Supervised(
        tmp_path,
        group("web", "fails:run", restart="never", on_failed="exit"),
        env={"JOURNAL_STREAM": stream_of(tmp_path / "log.jsonl"), "FORCE_COLOR": "1"},
        modules={"fails": FAILS},
        log_format=log_format,
    )
    with supervised.start():
        assert supervised.wait() == 1

    lines = supervised.text().splitlines()
    assert [line for line in lines if not re.match("<[0-7]>", line)] == []
    levels = {
        level: [line for line in lines if word in line]
        for word, level in {
            "a.warning": "<4>",
            "a library's": "<2>",
            "worker.failed": "<3>",
            "worker.spawned": "<6>",
        }.items()
    }
    assert all(found for found in levels.values())
    assert all(line.startswith(level) for level, found in levels.items() for line in found)
    assert not any("\x1b" in line for line in lines)
    if log_format == "console":
        traceback = [line for line in lines if 'File "' in line]
        assert traceback
        assert all(line.startswith("<3>") for line in traceback)
        assert not any("In another terminal" in line for line in lines)


def test_a_log_that_is_not_the_journal_is_plain(tmp_path: Path) -> None:
    """A variable that is left over from whoever was started by systemd does not count."""
    other = stream_of(tmp_path / "other")
    with Supervised(tmp_path, group("web", "idle"), env={"JOURNAL_STREAM": other}) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    assert all(line.startswith("{") for line in supervised.text().splitlines())


def test_what_is_wrong_is_an_error_in_the_journal(tmp_path: Path) -> None:
    """So that `journalctl -p err` finds why a start was refused."""
    supervised = Supervised(
        tmp_path,
        group("web", "idle", nonsense=1),
        env={"JOURNAL_STREAM": stream_of(tmp_path / "log.jsonl")},
    )
    with supervised.start():
        assert supervised.wait() == 78
        wait_until(lambda: not supervised.processes(), "its template has gone as well")
    assert supervised.text().startswith(f"<3>supervisor: {os.fspath(supervised.config)}: line ")
