"""The supervisor's own death: nothing is orphaned, nothing is lost, and the next one starts at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.supervised import Supervised, group, is_alive, wait_until


def test_idle_workers_notice_at_once(tmp_path):
    """They are gone long before the grace that they would have had: no time-out is waited for."""
    config = group("plain", "idle", count=3) + group("aio", "idle_async")
    with Supervised(tmp_path, config, supervisor='grace = "300s"') as supervised:
        supervised.ready()
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        wait_until(lambda: not supervised.processes(), "nothing is left, the template included")
    assert len(supervised.events("worker.orphaned", grace_seconds=300.0)) == 4


@pytest.mark.slow
def test_busy_workers_finish_and_the_rest_is_gone_by_the_grace(tmp_path):
    """Who can finish does; a loop, a lock holder and a stopped process are ended at the deadline."""
    config = (
        group("busy", "busy", {"seconds": 0.7}, count=2)
        + group("aio", "busy_async", {"seconds": 0.7})
        + group("endless", "endless")
        + group("deaf", "deaf")
        + group("holder", "lock_holder")
        + group("stopped", "busy", {"seconds": 60.0})
        + group("liar", "liar")
    )
    with Supervised(
        tmp_path, config, supervisor='grace = "2500ms"\nabort_margin = "1s"'
    ) as supervised:
        supervised.ready()
        pids = supervised.worker_pids()
        supervised.event("victim.holding")

        died = supervised.signal(signal.SIGKILL)
        supervised.wait()
        # Not before: the kernel continues what is stopped in a group that becomes an orphan.
        supervised.event("worker.orphaned", worker="stopped-1")
        os.kill(pids["stopped-1"], signal.SIGSTOP)
        gone: dict[str, float] = {}

        def all_gone() -> bool:
            now = time.monotonic()
            for worker, pid in pids.items():
                if worker not in gone and not is_alive(pid):
                    gone[worker] = now
            return len(gone) == len(pids)

        wait_until(all_gone, f"all are gone; {gone}")
        wait_until(lambda: not supervised.processes(), "nothing is left")
    # A process that outlives its supervisor does so for `grace`, and for a moment more at most.
    assert all(at <= died + 2.5 + 5.0 for at in gone.values())
    for worker in ("deaf-1", "holder-1", "stopped-1", "liar-1"):
        assert gone[worker] >= died + 2.5, worker
    finished = {line["worker"] for line in supervised.events("victim.finished")}
    assert finished == {"busy-1", "busy-2", "aio-1"}
    (aborted,) = supervised.events("victim.aborted")
    assert aborted["seen"] >= died + 1.5
    assert "supervisor has died" in aborted["cause"]
    # Who held the interpreter lock, or was stopped, has been ended by the template, which says so.
    text = supervised.text()
    for worker in ("holder-1", "stopped-1"):
        assert f"worker {worker} (pid {pids[worker]}) has outlived its supervisor" in text
    assert "_spin_for_ever" in text  # the watchdog leaves the stacks of the loop
    assert "deaf-1 (pid" not in text


@pytest.mark.slow
def test_it_works_without_anybody_who_reads_the_log(tmp_path):
    """Supervisor and the reader of its log die together: nobody stays because it can't say so."""
    reader, writer = os.pipe()
    config = group("idle", "idle") + group("deaf", "deaf") + group("holder", "lock_holder")
    supervised = Supervised(tmp_path, config, supervisor='grace = "1500ms"')
    try:
        with supervised.start(output=writer):
            supervised.status_once_ready()
            os.close(reader)
            died = supervised.signal(signal.SIGKILL)
            supervised.wait()
            wait_until(lambda: not supervised.processes(), "nothing is left")
            assert time.monotonic() >= died + 1.5
    finally:
        os.close(writer)


def test_grandchildren_go_with_their_worker(tmp_path):
    """What a worker has started in its group does not outlive it when the supervisor is dead."""
    with Supervised(tmp_path, group("forker", "forker"), supervisor='grace = "300s"') as supervised:
        supervised.ready()
        assert len(supervised.processes()) == 5
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        wait_until(lambda: not supervised.processes(), "nothing is left")


@pytest.mark.slow
def test_without_template_and_supervisor_workers_still_end(tmp_path):
    """Both killed at once: the workers' own deadline ends all that can run at all."""
    config = group("idle", "idle", count=2) + group("deaf", "deaf")
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        supervised.ready()
        (template,) = supervised.templates()
        os.kill(template, signal.SIGSTOP)
        died = supervised.signal(signal.SIGKILL)
        supervised.wait()
        os.kill(template, signal.SIGKILL)
        wait_until(lambda: not supervised.processes(), "nothing is left")
        assert time.monotonic() >= died + 1.0


def test_a_new_supervisor_serves_while_the_old_workers_finish(tmp_path):
    """It starts at once, beside stale sockets, and beside orphans that are still at work."""
    config = group("busy", "busy", {"seconds": 2.0}, count=2)
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        old = supervised.worker_pids()
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        supervised.start()
        supervised.event("supervisor.ready", count=2)
        assert any(map(is_alive, old.values())), "the orphans should have been at work still"
        assert supervised.status()["groups"]["busy"]["ready"] == 2
        supervised.event("victim.finished", count=2)
        wait_until(lambda: not any(map(is_alive, old.values())), "the orphans have gone")
        assert len(supervised.worker_pids()) == 2
        assert supervised.stop() == 0
    assert len(supervised.events("victim.finished")) == 4
    # Orphans bother the new one with nothing: their sockets are not its sockets.
    assert not supervised.events("control.dropped")


def test_killed_in_the_middle_of_a_stop(tmp_path):
    """Workers that were told to end go on doing that, by the deadline that they were told."""
    config = group("busy", "busy", {"seconds": 0.7}, count=2) + group("deaf", "deaf")
    with Supervised(tmp_path, config, supervisor='grace = "2s"') as supervised:
        supervised.ready()
        supervised.signal(signal.SIGTERM)
        supervised.event("worker.acknowledged", count=3)
        supervised.signal(signal.SIGKILL)
        supervised.wait()
        wait_until(lambda: not supervised.processes(), "nothing is left")
    assert len(supervised.events("victim.finished")) == 2


def test_killed_in_a_storm_of_restarts(tmp_path):
    """Workers that are being made when the supervisor dies do not stay either."""
    config = group(
        "crash",
        "crasher",
        {"how": "_exit", "after": 0.001},
        count=6,
        max_restarts=100_000,
        backoff="1ms",
        backoff_max="1ms",
    )
    config += group("idle", "idle", count=2)
    with Supervised(tmp_path, config, supervisor='grace = "1s"') as supervised:
        for storm in range(1, 4):
            supervised.event("worker.exited", count=20 * storm)
            supervised.signal(signal.SIGKILL)
            supervised.wait()
            wait_until(lambda: not supervised.processes(), "nothing is left")
            supervised.start()
        supervised.event("worker.exited", count=90)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
