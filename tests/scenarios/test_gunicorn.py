"""gunicorn: tests/test_arbiter.py."""

from __future__ import annotations

import os
import signal

from tests.supervised import Supervised, children, group, wait_until

# Children that the supervisor has from its shell, and has never made: two end as gunicorn's own
# workers do when it must halt, one by a signal. A subshell that ends with another command stays
# the parent of the one before.
UNKNOWN = """
until_told() { while [ ! -e "$GATE" ]; do sleep 0.02; done; }
(until_told; exit 3) &
(until_told; exit 4) &
(until_told; sh -c 'kill -9 $PPID'; exit 1) &
exec "$@"
"""


def test_reap_mixed_worker_and_unknown_child(tmp_path):
    """test_reap_mixed_…, test_reap_unknown_child_…: it is reaped, counted as no worker, halts nothing."""
    supervised = Supervised(
        tmp_path,
        group("idle", "idle", count=2, backoff="1ms", backoff_max="1ms"),
        through=["sh", "-c", UNKNOWN, "sh"],
        env={"GATE": str(tmp_path / "gate")},
    )
    with supervised:
        supervised.ready()
        ours = {*supervised.worker_pids().values(), *supervised.templates()}
        wait_until(lambda: len(set(children(supervised.pid)) - ours) == 3, "three are unknown")
        (tmp_path / "gate").touch()
        for pid in supervised.worker_pids().values():
            os.kill(pid, signal.SIGKILL)
        supervised.event("worker.ready", count=4)
        wait_until(
            lambda: (
                set(children(supervised.pid))
                == {*supervised.worker_pids().values(), *supervised.templates()}
            ),
            "no zombie is left",
        )
        group_ = supervised.status()["groups"]["idle"]
        assert (group_["ready"], group_["restarts"]) == (2, 2)
        assert supervised.stop() == 0
        assert len(supervised.events("worker.exited")) == 4


def test_multiple_signals_queued(tmp_path):
    """TestSignalQueue: a burst of all signals that have a meaning or none costs no worker and no stop."""
    burst = ("USR1", "USR2", "HUP", "CHLD", "WINCH", "URG", "CONT")
    with Supervised(tmp_path, group("idle", "idle", count=2, min_ready_time=0)) as supervised:
        supervised.ready()
        for _ in range(30):
            for name in burst:
                supervised.signal(signal.Signals[f"SIG{name}"])
        supervised.event("reload.done")
        status = supervised.status_once_ready()
        assert status["groups"]["idle"]["ready"] == 2
        assert supervised.stop() == 0
        assert not supervised.events("worker.killed")
        ended_well = {line["worker"] for line in supervised.events("worker.exited", code=0)}
        assert {line["worker"] for line in supervised.events("worker.ready")} <= ended_well
    assert "Traceback" not in supervised.text()
