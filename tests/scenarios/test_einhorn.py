"""einhorn: test/integration/upgrading.rb."""

from __future__ import annotations

import contextlib
import os
import signal

from tests.supervised import Supervised, children, group, wait_until


def test_cleans_up_if_a_child_dies_during_the_upgrade(tmp_path):
    """ "cleans up if a child dies during the reexec": old ones die in a roll, and it ends as it should."""
    config = group("web", "idle", count=5, min_ready_time="50ms", backoff="1ms", backoff_max="1ms")
    with Supervised(tmp_path, config) as supervised:
        supervised.ready()
        old = supervised.worker_pids()
        supervised.signal(signal.SIGHUP)
        supervised.event("reload.started")
        os.kill(old["web-5"], signal.SIGKILL)  # its turn is last
        supervised.event("worker.ready", count=6)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(old["web-4"], signal.SIGKILL)
        supervised.event("reload.done")
        assert len(supervised.worker_pids()) == 5
        assert {worker["generation"] for worker in supervised.status()["workers"]} == {2}
        wait_until(
            lambda: (
                set(children(supervised.pid))
                == {*supervised.worker_pids().values(), *supervised.templates()}
            ),
            "nobody is left of the old ones",
        )
        assert len(supervised.templates()) == 1
        assert supervised.stop() == 0
