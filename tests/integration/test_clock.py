"""A wall clock that is set by days: shown in the log, and in nothing that is decided."""

from __future__ import annotations

import signal
from datetime import datetime, timedelta

from tests.chaos.surroundings import Clock, Unavailable
from tests.servers import unavailable
from tests.supervised import Supervised, group

DAYS = 3


def test_a_clock_that_is_set_changes_nothing(tmp_path):
    """Nobody is too old, hangs or is late by it; and a stop has its whole time."""
    try:
        clock = Clock(tmp_path / "clock")
    except Unavailable as why:
        unavailable(str(why))
        raise
    config = group("idle", "idle", count=2, max_age="24h") + group("deaf", "deaf")
    supervised = Supervised(tmp_path, config, supervisor='grace = "600ms"', through=clock.through)
    with clock, supervised:
        clock.pids.add(supervised.pid)
        supervised.ready()
        before = len(supervised.events("worker.spawned"))
        times = []
        for number, days in enumerate((0, DAYS, -DAYS), start=1):
            clock.set(days * 86400)
            supervised.signal(signal.SIGUSR1)
            times.append(supervised.event("supervisor.status", count=number)["time"])
        there, forth, back = map(datetime.fromisoformat, times)
        assert abs(forth - there - timedelta(days=DAYS)) < timedelta(hours=1)
        assert abs(there - back - timedelta(days=DAYS)) < timedelta(hours=1)
        assert len(supervised.events("worker.spawned")) == before
        assert not supervised.events("worker.cancelled")

        supervised.signal(signal.SIGTERM)
        supervised.event("worker.cancelled", worker="deaf-1")
        clock.set(DAYS * 86400)
        killed = supervised.event("worker.killed", worker="deaf-1")
        assert dict(killed["ladder"])["SIGKILL"] >= 0.6 - 1e-4
        assert supervised.wait() == 1
        assert [line["worker"] for line in supervised.events("worker.killed")] == ["deaf-1"]
