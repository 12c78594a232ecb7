"""A stop with real processes: who answers, who finishes, who is killed, when, and why."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import time

import pytest

from tests.supervised import Supervised, group, is_alive, state, wait_until

STOP = ["cancelled", "acknowledged", "drained", "exited"]


def test_every_worker_finishes_what_it_has_in_flight(tmp_path):
    """Eight workers with work in flight: each is cancelled, acknowledges, drains and exits, once."""
    config = group("plain", "busy", {"seconds": 0.3}, count=4)
    config += group("aio", "busy_async", {"seconds": 0.3}, count=4)
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        in_flight = {worker["id"]: worker["in_flight"] for worker in supervised.status()["workers"]}
        pids = supervised.worker_pids()

        assert supervised.stop() == 0

        assert not any(map(is_alive, pids.values()))
        assert not supervised.processes()
    assert in_flight == dict.fromkeys(pids, 1)
    assert len(pids) == 8
    for worker in pids:
        assert supervised.life(worker) == ["spawned", "ready", *STOP]
        assert len(supervised.events("victim.finished", worker=worker)) == 1
        assert supervised.events("worker.exited", worker=worker)[0]["code"] == 0
    names = [line["event"] for line in supervised.lines()]
    # Every cancel is sent before anything is waited for.
    assert names.index("worker.acknowledged") > max(
        at for at, name in enumerate(names) if name == "worker.cancelled"
    )
    (stopped,) = supervised.events("supervisor.stopped")
    assert (stopped["exit_code"], stopped["drained"], stopped["killed"]) == (0, 8, [])


def test_work_in_flight_is_cancelled_only_when_its_time_is_up(tmp_path):
    """A job's context ends `abort_margin` before the deadline, with "stop" as its cause."""
    config = group("plain", "endless") + group("aio", "endless_async")
    with Supervised(
        tmp_path, config, supervisor='grace = "2s"\nabort_margin = "800ms"'
    ) as supervised:
        supervised.ready()
        asked = supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
    aborted = supervised.events("victim.aborted")
    assert [line["cause"] for line in aborted] == ["stop", "stop"]
    assert min(line["seen"] for line in aborted) >= asked + 1.2
    assert supervised.events("supervisor.stopped")[0]["drained"] == 2


def test_threads_of_the_wait_group_are_waited_for(tmp_path):
    """A worker has drained when the threads that it counts have ended, not when `run` returns."""
    config = group("threads", "in_a_thread", {"seconds": 0.5})
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    names = [line["event"] for line in supervised.lines()]
    assert names.index("victim.finished") < names.index("worker.drained")


def test_who_does_not_end_is_killed_at_the_deadline_and_explained(tmp_path):
    """An endless loop and a stopped process: killed at the deadline, with reason and stacks."""
    config = group("good", "busy", {"seconds": 0.1}, count=2)
    config += group("deaf", "deaf") + group("stopped", "idle")
    with Supervised(tmp_path, config, supervisor='grace = "2s"') as supervised:
        supervised.ready()
        pids = supervised.worker_pids()
        os.kill(pids["stopped-1"], signal.SIGSTOP)
        wait_until(lambda: state(pids["stopped-1"]) == "T", "it is stopped")

        asked = supervised.signal(signal.SIGTERM)
        # The two kills come last, and the supervisor ends with them: seen gone is then late at most.
        gone: dict[str, float] = {}
        while is_alive(supervised.pid):
            for worker, pid in pids.items():
                if not is_alive(pid):
                    gone.setdefault(worker, time.monotonic())
            time.sleep(0.005)
        for worker in pids:
            gone.setdefault(worker, time.monotonic())

        assert supervised.wait() == 1
        assert not supervised.processes()
    assert gone["deaf-1"] >= asked + 2.0
    assert gone["stopped-1"] >= asked + 2.0
    (deaf,) = supervised.events("worker.killed", worker="deaf-1")
    assert "_spin_for_ever" in deaf["stacks"]
    assert "acknowledged the cancel but did not drain" in deaf["why"]
    (stopped,) = supervised.events("worker.killed", worker="stopped-1")
    assert "did not acknowledge" in stopped["why"]
    assert [step for step, _ in stopped["ladder"]] == ["cancel", "SIGTERM", "stacks", "SIGKILL"]
    assert stopped["stacks"] == ""
    assert "SIGSTOP" in stopped["stacks_missing"]
    for worker in ("good-1", "good-2"):
        assert supervised.life(worker)[-4:] == STOP
    assert supervised.life("deaf-1")[-4:] == ["cancelled", "acknowledged", "killed", "exited"]
    assert supervised.life("stopped-1")[-3:] == ["cancelled", "killed", "exited"]
    assert supervised.events("worker.exited", worker="deaf-1")[0]["signal"] == signal.SIGKILL
    (end,) = supervised.events("supervisor.stopped")
    assert sorted(end["killed"]) == ["deaf-1", "stopped-1"]
    assert end["drained"] == 2


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGQUIT,)],
    ids=["SIGTERM twice", "SIGINT twice", "SIGQUIT"],
)
def test_stop_now(tmp_path, signals):
    """The same signal again, or SIGQUIT, kills what is left within a second."""
    config = group("deaf", "deaf") + group("busy", "endless")
    with Supervised(tmp_path, config, supervisor='grace = "120s"') as supervised:
        supervised.ready()
        for number in signals:
            supervised.signal(number)
            supervised.event("supervisor.stopping", count=signals.index(number) + 1)
        asked = time.monotonic()
        assert supervised.wait(30.0) == 1  # far below the grace
        assert time.monotonic() - asked < 30.0
        assert not supervised.processes()
    assert supervised.events("supervisor.stopped")[0]["killed"] == ["deaf-1"]
    assert supervised.life("busy-1")[-2:] == ["drained", "exited"]
    ladder = dict(supervised.events("worker.killed")[0]["ladder"])
    assert ladder["stacks"] < 20.0


def test_another_signal_does_not_hurry_a_stop(tmp_path):
    """SIGINT after SIGTERM is not the same signal again: who is busy may finish."""
    config = group("busy", "busy", {"seconds": 1.5})
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        supervised.signal(signal.SIGTERM)
        supervised.event("worker.acknowledged")
        supervised.signal(signal.SIGINT)
        supervised.signal(signal.SIGHUP)
        assert supervised.wait() == 0
    assert supervised.events("victim.finished")


def test_ctrl_c_in_a_terminal_stops_the_supervisor_and_hurts_no_worker(tmp_path):
    """Ctrl-C reaches the terminal's whole foreground group; workers finish all the same."""
    terminal, its_end = pty.openpty()
    take_terminal = (
        "import fcntl,os,sys,termios;"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    config = group("busy", "busy", {"seconds": 0.5}, count=2)
    supervised = Supervised(
        tmp_path, config, supervisor='grace = "20s"', through=["python3", "-c", take_terminal]
    )
    try:
        with supervised.start(stdin=its_end):
            supervised.ready()
            os.write(terminal, b"\x03")
            assert supervised.wait() == 0
            assert supervised.events("supervisor.stopping")[0]["cause"] == "SIGINT"
            assert len(supervised.events("victim.finished")) == 2
    finally:
        os.close(its_end)
        os.close(terminal)


def test_workers_ignore_what_a_terminal_sends(tmp_path):
    """SIGINT and SIGHUP change nothing for a worker and for the template."""
    with Supervised(tmp_path, group("idle", "idle", count=2)) as supervised:
        supervised.ready()
        for pid in (*supervised.worker_pids().values(), *supervised.templates()):
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGHUP)
        assert supervised.status()["groups"]["idle"]["ready"] == 2
        assert supervised.stop() == 0
    assert len(supervised.events("worker.spawned")) == 2
    assert not supervised.events("template.died")


def test_a_receipt_is_due_within_a_second_whatever_the_worker_does(tmp_path):
    """A worker in a C call that cannot be woken acknowledges within a second all the same."""
    config = group("calls", "in_a_call", {"seconds": 3}, count=2)
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        supervised.event("victim.calling", count=2)
        assert supervised.stop() == 0
    receipts = supervised.events("worker.acknowledged")
    assert len(receipts) == 2
    assert all(line["seconds"] < 1.0 for line in receipts)
    names = [line["event"] for line in supervised.lines()]
    assert names.index("victim.returned") > names.index("worker.acknowledged")


def test_a_sigterm_from_somebody_else_drains_a_worker_under_the_parents_deadline(tmp_path):
    """It finishes its work, and another one takes its place; the supervisor goes on."""
    config = group("busy", "busy", {"seconds": 0.2}, count=2)
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.ready()
        os.kill(supervised.worker_pids()["busy-1"], signal.SIGTERM)
        supervised.event("worker.ready", worker="busy-3")
        assert supervised.stop() == 0
    assert supervised.life("busy-1") == ["spawned", "ready", *STOP]
    (cancelled,) = supervised.events("worker.cancelled", worker="busy-1")
    assert "SIGTERM" in cancelled["cause"]
    assert cancelled["grace_seconds"] == 20.0
    assert len(supervised.events("victim.finished")) == 3
    assert len(supervised.events("worker.spawned")) == 3


def test_the_deadline_holds_for_a_worker_that_somebody_else_terminated(tmp_path):
    """A deaf worker that gets a SIGTERM is killed at the parent's deadline, and replaced."""
    with Supervised(tmp_path, group("deaf", "deaf"), supervisor='grace = "1s"') as supervised:
        supervised.ready()
        asked = time.monotonic()
        pid = supervised.worker_pids()["deaf-1"]
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "it is gone")
        assert time.monotonic() >= asked + 1.0
        supervised.event("worker.ready", worker="deaf-2")
        supervised.signal(signal.SIGQUIT)
        supervised.wait()
    (killed,) = supervised.events("worker.killed", worker="deaf-1")
    assert "_spin_for_ever" in killed["stacks"]


def test_a_stop_is_complete_when_the_process_groups_are_empty(tmp_path):
    """What a worker leaves behind in its group is killed and named, before the stop is complete."""
    with Supervised(tmp_path, group("forker", "forker")) as supervised:
        supervised.ready()
        (worker,) = supervised.worker_pids().values()
        left = [pid for pid in supervised.processes() if os.getpgid(pid) == worker != pid]
        assert len(left) == 2
        assert supervised.stop() == 0
        assert not any(map(is_alive, left))
        assert not supervised.processes()
    (exited,) = supervised.events("worker.exited")
    assert exited["code"] == 0
    assert sorted(exited["leftovers"]) == sorted(
        f"{name} (pid {pid})" for name, pid in zip(["python"] * 2, left, strict=True)
    ) or all(any(str(pid) in entry for entry in exited["leftovers"]) for pid in left)


def test_a_stop_during_the_start_ends_the_workers_that_are_not_ready_yet(tmp_path):
    """Who has said hello and is not ready is told to end like everybody else."""
    config = group("idle", "idle") + group("slow", "never_ready")
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        supervised.event("worker.ready", worker="idle-1")
        supervised.event("worker.spawned", worker="slow-1")
        wait_until(
            lambda: any(
                worker["id"] == "slow-1" and worker["pools"] == {}
                for worker in supervised.status()["workers"]
            ),
            "it answers",
        )
        assert supervised.stop() == 0
    assert supervised.events("worker.exited", worker="slow-1")[0]["code"] in {0, None}
    assert not supervised.events("worker.killed")


def test_a_stop_in_the_middle_of_the_births_kills_nobody(tmp_path):
    """A SIGTERM that finds a worker between its first instruction and its hello drains it, too."""
    with Supervised(
        tmp_path, group("idle", "idle", count=24), supervisor='grace = "10s"'
    ) as supervised:
        for round_ in range(1, 6):
            supervised.event("worker.spawned", count=len(supervised.events("worker.exited")) + 1)
            supervised.signal(signal.SIGTERM)
            assert supervised.wait() == 0
            assert not supervised.processes()
            assert len(supervised.events("supervisor.stopped", killed=[])) == round_
            supervised.start()
        assert supervised.stop() in {0, -signal.SIGTERM}
    assert "Traceback" not in supervised.text()


@pytest.mark.slow
def test_a_supervisor_that_stood_still_kills_nobody_for_it(tmp_path):
    """Stopped until after the deadline, it judges nobody by what it could not hear."""
    config = group("busy", "busy", {"seconds": 1.3}, count=2)
    with Supervised(
        tmp_path, config, supervisor='grace = "1500ms"\nabort_margin = "100ms"'
    ) as supervised:
        supervised.ready()
        asked = supervised.signal(signal.SIGTERM)
        supervised.event("worker.acknowledged", count=2)
        supervised.signal(signal.SIGSTOP)
        supervised.event("victim.finished", count=2)
        # A worker that has drained waits a second for the receipt of that, then goes.
        wait_until(lambda: time.monotonic() > asked + 2.6, "the deadline has long passed")
        supervised.signal(signal.SIGCONT)
        assert supervised.wait() == 0
    assert supervised.events("supervisor.stopped")[0]["killed"] == []
    assert not supervised.events("worker.killed")


def test_an_empty_fleet_stops_at_once(tmp_path):
    """A supervisor without a single worker is ready, and stops with 0."""
    with Supervised(tmp_path, group("none", "idle", count=0)) as supervised:
        supervised.ready()
        assert supervised.stop() == 0
    assert [line["event"] for line in supervised.lines()] == [
        "supervisor.ready",
        "supervisor.stopping",
        "supervisor.stopped",
    ]


def test_a_person_reads_who_acknowledged_when_and_what_was_closed(tmp_path):
    """With the console format the stop ends in a table and a sentence."""
    config = '[pools.main]\nurl = "sqlite:///a.db"\n' + group("idle", "idle", count=2)
    with Supervised(tmp_path, config, log_format="console") as supervised:
        wait_until(lambda: "is ready" in supervised.text(), "the greeting")
        assert supervised.stop() == 0
    text = supervised.text()
    summary = text[text.index("acknowledged  ") :] if "acknowledged  " in text else text
    assert "idle-1" in summary
    assert "stopped: 2 workers, 2 drained, 0 killed; exit code 0" in text
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "a.db").unlink()
