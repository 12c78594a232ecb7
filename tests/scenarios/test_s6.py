"""s6: the contract of a service directory, its lock."""

from __future__ import annotations

import subprocess

from tests.supervised import Supervised, group, wait_until

STARTS = 4


def started_by(supervised: Supervised) -> subprocess.Popen[bytes]:
    """Return the process that was started last."""
    assert supervised.process is not None
    return supervised.process


def test_second_instance_exits(tmp_path):
    """lock: of many starts on one configuration at one moment one serves, the others are refused at once."""
    with Supervised(tmp_path, group("idle", "idle", count=2)) as supervised:
        started = [started_by(supervised)]
        started += [started_by(supervised.start()) for _ in range(STARTS - 1)]
        wait_until(
            lambda: sum(process.poll() is None for process in started) == 1, "all but one are gone"
        )
        for process in started:
            if process.poll() is None:
                supervised.process = process
            else:
                assert process.returncode == 69
        supervised.ready()
        assert supervised.status()["pid"] == supervised.pid
        wait_until(lambda: len(supervised.processes()) == 4, "itself, a template, two workers")
        assert supervised.stop() == 0
    assert len(supervised.events("worker.spawned")) == 2
    assert supervised.text().count("already runs") == STARTS - 1, supervised.text()
