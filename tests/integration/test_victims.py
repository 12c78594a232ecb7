"""Every bad worker of the cast: what the supervisor says of it, and what it does about it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from tests.supervised import Supervised, children, group, is_alive, title, wait_until
from tests.victims import AT_IMPORT

QUICK: dict[str, Any] = {"max_restarts": 1000, "backoff": "1ms", "backoff_max": "1ms"}


# --- those that do not end when they are told to -------------------------------------------------


@pytest.mark.slow
def test_each_victim_of_a_stop_is_brought_down_and_explained(tmp_path):
    """One stop of the whole cast: who can drain does, who cannot is killed, each for its reason."""
    config = (
        group("good", "busy", {"seconds": 0.2})
        + group("deaf", "deaf")
        + group("holder", "lock_holder")
        + group("liar", "liar")
        + group("mute", "mute", {"seconds": 3.0})
        + group("forker", "forker")
        + group("daemons", "daemonizer")
        + group("late", "fails_at_the_end")
        + group("thread", "fails_in_a_thread")
    )
    with Supervised(
        tmp_path, config, supervisor='grace = "5s"\nabort_margin = "500ms"'
    ) as supervised:
        supervised.ready()
        supervised.event("victim.holding", count=2)
        asked = supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 1
        assert time.monotonic() >= asked + 5.0
        assert not supervised.processes()
    stop = {worker: supervised.life(worker)[2:] for worker in _workers(supervised)}
    killed = {line["worker"]: line for line in supervised.events("worker.killed")}
    exited = {line["worker"]: line for line in supervised.events("worker.exited")}
    drains = ["cancelled", "acknowledged", "drained", "exited"]
    assert stop == {
        "good-1": drains,
        "deaf-1": ["cancelled", "acknowledged", "killed", "exited"],
        "holder-1": ["cancelled", "killed", "exited"],
        "liar-1": ["cancelled", "acknowledged", "drained", "killed", "exited"],
        "mute-1": ["cancelled", "exited"],
        "forker-1": drains,
        "daemons-1": drains,
        "late-1": ["cancelled", "acknowledged", "failed", "drained", "exited"],
        "thread-1": ["cancelled", "acknowledged", "failed", "drained", "exited"],
    }
    assert "_spin_for_ever" in killed["deaf-1"]["stacks"]
    assert "_hold_the_lock" in killed["holder-1"]["stacks"]
    assert "_stay_for_ever" in killed["liar-1"]["stacks"]
    assert "did not drain by its deadline" in killed["deaf-1"]["why"]
    assert "did not acknowledge" in killed["holder-1"]["why"]
    assert "did not exit" in killed["liar-1"]["why"]
    assert all(line["seconds"] < 5.0 for line in supervised.events("worker.drained"))
    assert exited["mute-1"]["code"] == 0
    assert len(exited["forker-1"]["leftovers"]) == 2
    assert exited["late-1"]["code"] == exited["thread-1"]["code"] == 1
    (end,) = supervised.events("supervisor.stopped")
    assert sorted(end["killed"]) == ["deaf-1", "holder-1", "liar-1"]


def _workers(supervised: Supervised) -> list[str]:
    return [line["worker"] for line in supervised.events("worker.spawned")]


# --- those that end uninvited --------------------------------------------------------------------


RAISING = {
    "plain": ("crasher", "raise", "LookupError: no moon tonight"),
    "aio": ("crasher_async", "raise", "LookupError: no moon tonight"),
    "words": ("crasher", "words", "SystemExit: no disk, no work"),
    "note": ("crasher", "not in time", "TimeoutError: the database did not answer"),
    "bytes": ("crasher", "not utf-8", "FileNotFoundError: caf\\udce9.txt"),
    "long": ("crasher", "endless words", "ValueError: insert into t values (0), (0)"),
    "name": ("missing", "", "AttributeError: module 'tests.victims' has no attribute 'missing'"),
    "kind": ("not_a_function", "", "TypeError: tests.victims:not_a_function is a int"),
    "module": ("no_such_module:run", "", "ModuleNotFoundError: No module named 'no_such_module'"),
    "import": ("raises:run", "", "RuntimeError: no licence file"),
    "syntax": ("syntax:run", "", "SyntaxError: expected ':'"),
}


def test_what_a_worker_raises_reaches_the_parent(tmp_path):
    """`worker.failed` has the error and the traceback down to the line; then the worker exits."""
    config = "".join(
        group(name, run, {"how": how}, restart="never") for name, (run, how, _) in RAISING.items()
    )
    with Supervised(tmp_path, config, modules=AT_IMPORT) as supervised:
        supervised.event("group.failed", count=len(RAISING))
        assert supervised.stop() == 1
    for name, (_, _, error) in RAISING.items():
        (failed,) = supervised.events("worker.failed", group=name)
        assert failed["error"].startswith(error)
        assert failed["traceback"].startswith("Traceback (most recent call last):")
        assert f"\n{error}" in failed["traceback"]
        assert len(failed["error"]) < 10_000
        assert len(failed["traceback"]) < 200_000
        life = supervised.life(f"{name}-1")
        assert life[-3:] == ["failed", "drained", "exited"]
        assert supervised.events("worker.exited", group=name)[0]["code"] == 1
    for name, place in (("plain", "_reach_for_the_moon"), ("import", "in deep")):
        assert place in supervised.events("worker.failed", group=name)[0]["traceback"]


ENDING: dict[str, tuple[str, dict[str, int]]] = {
    "segfault": ("crasher", {"signal": signal.SIGSEGV}),
    "killed": ("crasher", {"signal": signal.SIGKILL}),
    "exit": ("crasher", {"code": 3}),
    "early": ("exits:run", {"code": 5}),
}


def test_a_worker_that_ends_without_words_is_counted_and_replaced(tmp_path):
    """Its end is told with its code or signal; a crash of C code with the stack it crashed in."""
    config = "".join(group(how, run, {"how": how}, **QUICK) for how, (run, _) in ENDING.items())
    config += group("good", "idle")
    with Supervised(tmp_path, config, modules=AT_IMPORT) as supervised:
        for how in ENDING:
            supervised.event("worker.exited", worker=f"{how}-2")
        assert is_alive(supervised.worker_pids()["good-1"])
        assert supervised.stop() == 0
    for how, (_, end) in ENDING.items():
        for exited in supervised.events("worker.exited", group=how)[:2]:
            assert {key: exited[key] for key in end} == end
            assert ("_touch_nothing" in exited.get("stacks", "")) == (how == "segfault")
    assert not supervised.events("worker.failed")
    assert len(supervised.events("worker.spawned", group="good")) == 1


def test_a_pool_that_cannot_be_made_is_the_workers_failure(tmp_path):
    """A driver that is missing is told like an exception of the worker's own code."""
    config = '[pools.main]\nurl = "postgresql://nobody@/nothing"\n'
    config += group("bad", "idle", max_restarts=0)
    broken = {"psycopg": "raise ImportError('libpq is not what it was')"}
    with Supervised(tmp_path, config, modules=broken) as supervised:
        supervised.event("group.failed")
        assert supervised.stop() == 1
    (failed,) = supervised.events("worker.failed")
    assert "psycopg" in failed["error"]
    assert "libpq is not what it was" in failed["traceback"]
    assert supervised.life("bad-1")[-2:] == ["drained", "exited"]


def test_an_import_that_kills_the_template_is_the_groups_failure(tmp_path):
    """An application that ends the process while it is imported fails its group, not the others."""
    config = group("bad", "dies:run", count=4, max_restarts=2, backoff="1ms") + group(
        "good", "good:run", env={"OTHER": "1"}
    ).replace('{"OTHER": "1"}', '{ OTHER = "1" }')
    with Supervised(tmp_path, config, modules=AT_IMPORT) as supervised:
        failed = supervised.event("group.failed")
        supervised.event("worker.ready", group="good")
        assert supervised.stop() == 1
    assert failed["group"] == "bad"
    # One death is one failure, however many workers waited for that template.
    assert len(supervised.events("template.died")) == 3
    assert "code 5" in supervised.events("worker.not_spawned")[0]["error"]


# --- restart policy ------------------------------------------------------------------------------


def test_restart_policies(tmp_path):
    """always and on-failure replace a failure; only always replaces an end; never does neither."""
    crash = {"how": "_exit", "after": 0.05}
    config = (
        group("always", "once", restart="always", backoff="50ms", backoff_max="50ms")
        + group("crash", "crasher", crash, restart="on-failure", **QUICK)
        + group("done", "once", restart="on-failure", count=2)
        + group("never", "once", restart="never")
        + group("lost", "crasher", crash, restart="never")
    )
    with Supervised(tmp_path, config) as supervised:
        supervised.event("worker.ready", worker="always-6")
        supervised.event("worker.ready", worker="crash-4")
        lost = supervised.event("group.failed")
        status = supervised.status()
        assert supervised.stop() == 1  # for `lost` has failed for good
    spawned = _workers(supervised)
    for group_name, count in (("done", 2), ("never", 1), ("lost", 1)):
        assert sum(worker.startswith(group_name) for worker in spawned) == count
    assert lost["group"] == "lost"
    assert [line["group"] for line in supervised.events("group.failed")] == ["lost"]
    assert status["groups"]["lost"]["state"] == "failed"
    assert status["groups"]["crash"]["restarts"] >= 3
    ends = supervised.events("worker.exited", worker="done-1")
    assert ends[0]["code"] == 0


def test_back_off_grows_and_too_many_failures_fail_the_group(tmp_path):
    """Each restart waits twice as long, give or take 20 %; the last failure allowed is the last."""
    config = group(
        "bad", "crasher", {"how": "_exit", "after": 0.01}, max_restarts=4, backoff="60ms"
    )
    config += group("good", "idle")
    with Supervised(tmp_path, config) as supervised:
        failed = supervised.event("group.failed")
        good = supervised.worker_pids()["good-1"]
        assert is_alive(good)
        status = supervised.status()
        assert supervised.stop() == 1
    assert len(supervised.events("worker.spawned", group="bad")) == 5
    assert "5 failures" in failed["reason"]
    assert status["state"] in {"starting", "ready"}
    assert status["groups"]["bad"]["state"] == "failed"
    assert status["groups"]["good"]["state"] == "ready"
    waits = [
        _moment(spawned) - _moment(exited)
        for exited, spawned in zip(
            supervised.events("worker.exited", group="bad"),
            supervised.events("worker.spawned", group="bad")[1:],
            strict=False,
        )
    ]
    # A line has its time when it is written, which on a busy machine is later than the end was.
    assert len(waits) == 4
    assert sum(waits) >= 0.060 * (1 + 2 + 4 + 8) * 0.8 - 0.2
    assert supervised.events("supervisor.stopped")[0]["failed_groups"] == ["bad"]


def _moment(line: dict) -> float:
    clock, _, fraction = line["time"].rstrip("Z").partition(".")
    return time.mktime(time.strptime(clock, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction}")


def test_a_failed_group_can_end_the_supervisor(tmp_path):
    """With on_failed = "exit" the rest is stopped gracefully, and the exit code is 1."""
    config = group(
        "bad", "crasher", {"how": "raise"}, max_restarts=1, backoff="1ms", on_failed="exit"
    )
    config += group("busy", "busy", {"seconds": 0.3})
    with Supervised(tmp_path, config, supervisor='grace = "20s"') as supervised:
        assert supervised.wait() == 1
        assert not supervised.processes()
    assert supervised.events("victim.finished")
    assert supervised.life("busy-1")[-4:] == ["cancelled", "acknowledged", "drained", "exited"]
    assert "bad has failed" in supervised.events("supervisor.stopping")[0]["cause"]


@pytest.mark.slow
def test_who_is_not_ready_in_time_is_ended(tmp_path):
    """ready_timeout ends a worker that does not say so, and its group has one failure more."""
    config = group("slow", "never_ready", ready_timeout="2s", max_restarts=0)
    config += group("stuck", "stuck_before_ready", ready_timeout="2s", max_restarts=0)
    with Supervised(tmp_path, config, supervisor='grace = "500ms"') as supervised:
        supervised.event("group.failed", count=2)
        assert supervised.stop() == 1
    assert supervised.life("slow-1")[-3:] == ["acknowledged", "drained", "exited"]
    (killed,) = supervised.events("worker.killed")
    assert killed["worker"] == "stuck-1"
    assert "_stay_for_ever" in killed["stacks"]
    for exited in supervised.events("worker.exited"):
        assert "not ready within 2 s" in exited["reason"]
        assert exited["uptime_seconds"] >= 2.0
    assert not supervised.events("worker.ready")


# --- what is left behind -------------------------------------------------------------------------


def test_orphans_of_workers_are_reaped(tmp_path):
    """The supervisor inherits what its workers leave behind, and keeps no zombie of it."""
    with Supervised(tmp_path, group("daemons", "daemonizer", count=3)) as supervised:
        supervised.ready()
        expected = {*supervised.worker_pids().values(), *supervised.templates()}
        wait_until(lambda: set(children(supervised.pid)) == expected, "no zombie is left")
        assert supervised.stop() == 0


def test_what_a_crashed_worker_leaves_is_gone_before_its_successor_comes(tmp_path):
    """The group of a killed worker is emptied and named; only then has it exited."""
    with Supervised(tmp_path, group("forker", "forker", backoff="1ms")) as supervised:
        supervised.ready()
        first = supervised.worker_pids()["forker-1"]
        left = [pid for pid in supervised.processes() if os.getpgid(pid) == first != pid]
        names = [title(pid) for pid in left]
        assert len(left) == 2
        os.kill(first, signal.SIGKILL)
        exited = supervised.event("worker.exited", worker="forker-1")
        assert not any(map(is_alive, left)), names
        assert all(any(f"(pid {pid})" in told for told in exited["leftovers"]) for pid in left)
        supervised.event("worker.ready", worker="forker-2")
        assert supervised.stop() == 0
