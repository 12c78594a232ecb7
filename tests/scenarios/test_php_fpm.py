"""PHP-FPM: sapi/fpm/tests, bug76601-reload-child-signals and those like it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests.supervised import DUE, Supervised, children, group, wait_until

QUICK = {"max_restarts": 100_000, "backoff": "1ms", "backoff_max": "1ms"}
FORKS = 12


def just_forked(supervised: Supervised, template: int, known: set[int]) -> int:
    """Return a new worker as soon as it is there: first it is the child of a child of the template."""
    deadline = time.monotonic() + DUE
    while time.monotonic() < deadline:
        for parent in (*children(template), supervised.pid):
            for pid in children(parent):
                if pid not in known and pid != template:
                    known.add(pid)
                    return pid
    raise AssertionError("no worker has been forked")


def ended(supervised: Supervised) -> int:
    """Return how many have ended, also before they could say that they are born."""
    names = ("worker.exited", "worker.not_spawned")
    return sum(len(supervised.events(name)) for name in names)


@pytest.mark.parametrize(
    ("numbers", "ends"),
    [((signal.SIGTERM,), True), ((signal.SIGHUP, signal.SIGINT), False)],
    ids=["SIGTERM", "SIGHUP and SIGINT"],
)
def test_bug76601_reload_child_signals(tmp_path, numbers, ends):
    """bug76601, bug77185, bug68442: a signal just after the fork ends a worker that it should end, once."""
    with Supervised(tmp_path, group("web", "idle", count=2, **QUICK)) as supervised:
        supervised.ready()
        (template,) = supervised.templates()
        known = set(supervised.worker_pids().values())
        newest = "web-1"
        for fork in range(FORKS):
            if fork == 0 or not ends:
                os.kill(supervised.worker_pids()[newest], signal.SIGKILL)
            pid = just_forked(supervised, template, known)
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if not ends:
                newest = supervised.event("worker.ready", pid=pid)["worker"]
        wait_until(lambda: ended(supervised) == FORKS + ends, "each has ended that should, once")
        wait_until(lambda: supervised.status()["groups"]["web"]["ready"] == 2, "both serve")
        assert ended(supervised) == FORKS + ends
        assert len(supervised.worker_pids()) == 2
        if not ends:
            assert len(supervised.events("worker.exited", signal=signal.SIGKILL)) == FORKS
        assert supervised.stop() == 0
        assert not supervised.events("worker.killed")
