"""The machine's promises, one test each: events with their times go in, what is to be done comes out."""

from __future__ import annotations

import pytest

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import STOOD_STILL, GroupSpec, Phase
from supervisor.core.jobs import JobSeen
from supervisor.core.policy import Restart
from tests.core.script import Script, brief, cancels, fields_of, group

CLOSED = {"main": {"closed": 2, "leaked": ["where it was taken"]}}
LIFE = {
    "jobs": {"done": 30, "failed": 1, "cancelled": 1, "abandoned": 0},
    "in_stop": {"finished": 3, "aborted": 1},
    "pools": {"main": {"acquires": 40}},
}
ALL = [Restart.ALWAYS, Restart.ON_FAILURE, Restart.NEVER]


def running(*workers: str, **settings: float) -> Script:
    """Return a script in which these workers of the group `jobs` serve at time 10."""
    script = Script(group(count=len(workers)), **settings)  # type: ignore[arg-type]
    script.ready(10, *workers)
    return script


# --- the start ----------------------------------------------------------------------------------


def test_a_start_asks_for_every_worker_of_every_group() -> None:
    """Numbers count up within a group."""
    script = Script(group("jobs", 2), group("web", 1))

    assert script.started == [
        ac.Spawn("jobs-1", "jobs", 1),
        ac.Spawn("jobs-2", "jobs", 1),
        ac.Spawn("web-1", "web", 1),
    ]


def test_workers_are_counted_before_they_are_spawned() -> None:
    """Whoever can end is in the WaitGroup."""
    assert Script(group(count=2)).snapshot().outstanding == ("jobs-1", "jobs-2")


def test_birth_and_readiness_are_announced_with_who_it_is() -> None:
    """Every event of a worker names worker, group, pid and generation."""
    actions = Script(group(count=2)).ready(1.5, "jobs-1")
    who = {"worker": "jobs-1", "group": "jobs", "pid": 1001, "generation": 1}

    assert fields_of("worker.spawned", actions) == who
    assert fields_of("worker.ready", actions) == {**who, "seconds": 1.5}


def test_the_fleet_is_ready_when_every_group_is_complete() -> None:
    """Once, with the last worker's ready, and never again."""
    script = Script(group("jobs", 2), group("web", 1))
    first = script.ready(1, "jobs-1", "web-1")
    last = script.ready(2, "jobs-2")
    script.crashed(3, "jobs-2")
    again = script.tick(4) + script.ready(5, "jobs-3")

    assert "supervisor.ready" not in brief(first)
    assert brief(last)[-1] == "supervisor.ready"
    assert fields_of("supervisor.ready", last) == {
        "generation": 1,
        "workers": 3,
        "seconds": 2.0,
    }
    assert "supervisor.ready" not in brief(again)


def test_a_group_that_is_never_complete_at_one_moment_is_not_ready() -> None:
    """That each of its workers has been ready once is not enough."""
    script = Script(group(count=2))
    script.ready(1, "jobs-1")
    script.crashed(2, "jobs-1")

    assert "supervisor.ready" not in brief(script.ready(2, "jobs-2"))
    assert script.snapshot().state == "starting"
    script.tick(3)
    assert brief(script.ready(3, "jobs-3"))[-1] == "supervisor.ready"


def test_a_fleet_of_nobody_is_ready_at_once() -> None:
    """`count = 0` is a group that is scaled later."""
    script = Script(group(count=0))

    assert brief(script.started) == ["supervisor.ready"]
    assert (script.group().state, script.fleet.next_deadline()) == ("ready", None)


def test_a_job_that_has_done_what_it_was_for_does_not_hold_up_the_start() -> None:
    """A one-shot that ends well, with or without having called ready, is complete."""
    script = Script(group("once", restart=Restart.NEVER), group("jobs"))
    script.registered(1, "once-1")
    script.left(2, "once-1")

    assert brief(script.ready(3, "jobs-1"))[-1] == "supervisor.ready"


def test_a_group_that_failed_before_it_was_complete_holds_up_the_start_for_good() -> None:
    """A service that never served is not announced as ready."""
    script = Script(group("once", restart=Restart.NEVER), group("jobs"))
    script.registered(1, "once-1")
    script.crashed(2, "once-1")

    assert "supervisor.ready" not in brief(script.ready(3, "jobs-1"))
    assert script.fleet.phase is Phase.STARTING


# --- restarts -----------------------------------------------------------------------------------


def test_a_worker_that_dies_is_replaced_after_the_back_off_under_a_new_name() -> None:
    """Not before it, and its number is never used again."""
    script = running("jobs-1")
    died = script.crashed(20, "jobs-1")

    assert brief(died) == ["worker.exited jobs-1"]
    assert script.fleet.next_deadline() == pytest.approx(20.1)
    assert script.tick_just_before(20.1) == []
    assert brief(script.tick(20.1)) == ["Spawn jobs-2"]


def test_without_a_back_off_the_successor_comes_at_once() -> None:
    """`backoff = 0` is taken at its word."""
    script = Script(group(backoff=0.0))
    script.ready(1, "jobs-1")

    assert brief(script.crashed(2, "jobs-1")) == ["worker.exited jobs-1", "Spawn jobs-2"]


def test_the_back_off_doubles_while_workers_keep_ending() -> None:
    """Whether they fail or return at once: what returns at once must not spin either."""
    script = Script(group())
    delays = []
    for number in range(1, 6):
        script.left(script.now, f"jobs-{number}")  # not even born: ignored
        script.registered(script.now, f"jobs-{number}")
        script.left(script.now, f"jobs-{number}")
        due = script.fleet.next_deadline()
        assert due is not None
        delays.append(round(due - script.now, 6))
        script.tick(due)

    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6]


def test_after_a_quiet_window_the_back_off_is_short_again() -> None:
    """Quiet is to have served for a whole window."""
    script = Script(group(max_restarts=100))
    for number, lived in enumerate([0.0, 0.0, 59.9, 60.0], start=1):
        script.ready(script.now, f"jobs-{number}")
        script.crashed(script.now + lived, f"jobs-{number}")
        died, due = script.now, script.fleet.next_deadline()
        assert due is not None
        script.tick(due)
        assert due - died == pytest.approx([0.1, 0.2, 0.4, 0.1][number - 1])


def test_waiting_for_a_restart_is_not_quiet() -> None:
    """Else a back-off could never grow beyond the window."""
    script = Script(group(max_restarts=100, window=1.0, backoff_max=300.0))
    delays = []
    for number in range(1, 9):
        script.ready(script.now, f"jobs-{number}")
        script.crashed(script.now, f"jobs-{number}")
        due = script.fleet.next_deadline()
        assert due is not None
        delays.append(round(due - script.now, 6))
        script.tick(due)

    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8]


def test_a_slow_start_is_not_quiet() -> None:
    """A worker that is never ready has not served, however long it took."""
    script = Script(group(max_restarts=100, window=1.0))
    script.registered(0, "jobs-1")
    script.crashed(20, "jobs-1")
    script.tick(20.5)
    script.registered(20.5, "jobs-2")
    script.crashed(45, "jobs-2")

    assert script.fleet.next_deadline() == pytest.approx(46.0)


def test_on_failure_does_not_replace_who_ended_well() -> None:
    """It has finished; the supervisor goes on."""
    script = Script(group(restart=Restart.ON_FAILURE))
    script.ready(1, "jobs-1")

    assert brief(script.left(2, "jobs-1")) == ["worker.drained jobs-1", "worker.exited jobs-1"]
    assert script.fleet.next_deadline() is None
    assert (script.group().state, script.group().finished) == ("finished", 1)


@pytest.mark.parametrize(
    "end",
    [
        [ev.WorkerExited("jobs-1", code=3)],
        [ev.WorkerExited("jobs-1", signal=9)],
        [ev.WorkerFailed("jobs-1", "ValueError", ""), ev.WorkerExited("jobs-1", code=0)],
    ],
    ids=["code", "signal", "raised"],
)
def test_on_failure_replaces_who_failed(end: list[ev.Event]) -> None:
    """By its code, by a signal, or by its own account although it exits with 0."""
    script = Script(group(restart=Restart.ON_FAILURE))
    script.ready(1, "jobs-1")
    script.at(2, *end)

    assert brief(script.tick(3)) == ["Spawn jobs-2"]


def test_the_supervisor_goes_on_when_all_work_is_done() -> None:
    """It runs until it is stopped, and then ends with 0."""
    script = Script(group(restart=Restart.NEVER))
    script.ready(1, "jobs-1")
    script.left(2, "jobs-1")

    assert (script.tick(1000), script.fleet.phase) == ([], Phase.READY)
    assert brief(script.at(1001, ev.StopRequested("SIGTERM"))) == [
        "supervisor.stopping",
        "supervisor.stopped",
        "Finish 0",
    ]


def test_restarts_count_who_was_born_after_the_first() -> None:
    """Of the group, and for the worker in that place."""
    script = running("jobs-1", "jobs-2")
    script.crashed(20, "jobs-1")
    assert script.group().restarts == 0
    script.tick(21)
    script.ready(21, "jobs-3")

    assert script.group().restarts == 1
    assert {w.id: w.restarts for w in script.snapshot().workers} == {"jobs-2": 0, "jobs-3": 1}


def test_what_has_finished_is_shown_as_that() -> None:
    """Where some still serve the group is ready: nobody is missing."""
    script = Script(group(count=2, restart=Restart.NEVER))
    states = []
    for now, worker in ((1, "jobs-1"), (2, "jobs-2")):
        script.ready(now, worker)
        states.append(script.group().state)
    for now, worker in ((3, "jobs-1"), (4, "jobs-2")):
        script.left(now, worker)
        states.append(script.group().state)
    assert states == ["starting", "ready", "ready", "finished"]
    assert script.group().count == 2


def test_nobody_is_finished_in_a_group_without_places() -> None:
    """Nor when a place lacks somebody whom it wants."""
    script = Script(group(count=0), group("other", count=2, restart=Restart.ON_FAILURE))
    script.ready(1, "other-1", "other-2")
    script.left(2, "other-1")
    script.crashed(3, "other-2")
    assert [found.state for found in script.snapshot().groups] == ["ready", "degraded"]


# --- spawns that come to nothing ------------------------------------------------------------------


@pytest.mark.parametrize("restart", ALL)
def test_a_refused_spawn_is_tried_for_ever_and_is_nobodys_failure(restart: Restart) -> None:
    """The system had no process to give: that says nothing about the worker, whatever its policy."""
    script = Script(group(restart=restart, max_restarts=0))
    for number in range(1, 20):
        refused = script.at(script.now, ev.WorkerNotBorn(f"jobs-{number}", "EAGAIN"))
        due = script.fleet.next_deadline()
        assert brief(refused) == [f"worker.not_spawned jobs-{number}"]
        assert fields_of("worker.not_spawned", refused)["error"] == "EAGAIN"
        assert due is not None
        assert due > script.now
        assert brief(script.tick(due)) == [f"Spawn jobs-{number + 1}"]

    assert (script.group().failure, script.group().restarts) == ("", 0)


def test_a_refused_spawn_does_not_spin() -> None:
    """Even where workers that have run are replaced at once."""
    script = Script(group(backoff=0.0))
    script.at(0, ev.WorkerNotBorn("jobs-1", "EAGAIN"))

    assert script.tick_just_before(0.1) == []
    assert brief(script.tick(0.1)) == ["Spawn jobs-2"]


def test_an_application_that_kills_its_template_fails_its_group() -> None:
    """Imports that end the process are like a worker that dies of them."""
    script = Script(group(max_restarts=1))
    script.at(0, ev.WorkerNotBorn("jobs-1", "its template died", by_application=True))
    script.tick(1)
    actions = script.at(1, ev.WorkerNotBorn("jobs-2", "its template died", by_application=True))

    assert brief(actions) == ["worker.not_spawned jobs-2", "group.failed jobs-2"]
    assert script.group().failure.endswith("the last was jobs-2 (its template died)")


def test_starts_that_fail_slowly_fail_the_group_like_those_that_fail_at_once() -> None:
    """The window does not go on while they are waited for, be that longer than the window."""
    script = Script(group(ready_timeout=70.0, max_restarts=2, window=60.0))
    late: list[ac.Action] = []
    for number in (1, 2, 3):
        due = script.fleet.next_deadline()
        assert due is not None
        assert brief(script.tick(due)) == [f"Kill jobs-{number}"]
        late = script.at(due + 1, ev.WorkerNotBorn(f"jobs-{number}", "it was importing"))
        due = script.fleet.next_deadline()
        assert due is not None
        script.tick(due)
    assert brief(late)[-1] == "group.failed jobs-3"
    assert script.group().failure.endswith(
        "jobs-3 (it was not spawned within 70 s: it was importing)"
    )


def test_who_is_not_spawned_in_time_is_given_up_and_tried_again() -> None:
    """At `ready_timeout`; what was to make it is told to stop, and the failure counts."""
    script = Script(group(ready_timeout=5.0, max_restarts=0))

    assert script.tick_just_before(5) == []
    assert brief(script.tick(5)) == ["Kill jobs-1"]
    assert script.fleet.next_deadline() is None
    actions = script.at(6, ev.WorkerNotBorn("jobs-1", "its template ended with SIGKILL"))
    assert brief(actions) == ["worker.not_spawned jobs-1", "group.failed jobs-1"]
    assert fields_of("worker.not_spawned", actions)["error"] == (
        "it was not spawned within 5 s: its template ended with SIGKILL"
    )


def test_who_is_born_after_it_was_given_up_is_sent_away_and_waited_for() -> None:
    """It has a deadline like everybody, and its place is taken only when it has gone."""
    script = Script(group(ready_timeout=5.0), grace=3.0, abort_margin=1.0)
    script.tick(5)

    assert brief(script.born(6, "jobs-1")) == [
        "worker.spawned jobs-1",
        "worker.cancelled jobs-1",
        "Terminate jobs-1",
    ]
    assert script.tick_just_before(9) == []
    assert brief(script.tick(9)) == ["TakeStacks jobs-1"]
    assert brief(script.tick(9.25)) == ["worker.killed jobs-1", "Kill jobs-1"]
    actions = script.at(10, ev.WorkerExited("jobs-1", signal=9))
    assert fields_of("worker.exited", actions)["reason"] == "was not spawned within 5 s"
    assert brief(script.tick(11)) == ["Spawn jobs-2"]


# --- starts that take too long -----------------------------------------------------------------


def test_who_does_not_say_hello_in_time_is_killed_with_its_stacks() -> None:
    """It has no work that could be lost, and no socket over which to tell it."""
    script = Script(group(ready_timeout=5.0))
    script.born(1, "jobs-1")

    assert script.tick_just_before(5) == []
    assert brief(script.tick(5)) == ["TakeStacks jobs-1"]
    killed = script.at(5.1, ev.StacksTaken("jobs-1", "File app.py, line 3"))
    assert brief(killed) == ["worker.killed jobs-1", "Kill jobs-1"]
    assert fields_of("worker.killed", killed)["why"] == "it did not say hello within 5 s"


def test_who_is_not_ready_in_time_is_cancelled_and_replaced() -> None:
    """It has said hello, so it may have taken something: it gets its deadline like everybody."""
    script = Script(group(ready_timeout=5.0))
    script.registered(1, "jobs-1")

    assert script.tick_just_before(5) == []
    actions = script.tick(5)
    assert brief(actions) == ["worker.cancelled jobs-1", "SendCancel jobs-1"]
    assert cancels(actions) == [
        ac.SendCancel("jobs-1", 35.0, 30.0, "was not ready within 5 s"),
    ]
    script.at(5, ev.WorkerAcknowledged("jobs-1"))
    left = script.left(6, "jobs-1")
    assert fields_of("worker.exited", left)["reason"] == "was not ready within 5 s"
    assert brief(script.tick(7)) == ["Spawn jobs-2"]


def test_who_is_ready_in_time_is_left_alone() -> None:
    """Nothing is due any more."""
    assert running("jobs-1").fleet.next_deadline() is None


# --- groups that fail ---------------------------------------------------------------------------


def test_one_failure_more_than_allowed_fails_the_group() -> None:
    """Its other workers go on, and nobody is replaced any more."""
    script = Script(group(count=3, max_restarts=1))
    script.ready(1, "jobs-1", "jobs-2", "jobs-3")
    first = script.crashed(2, "jobs-1")
    second = script.crashed(2, "jobs-2")

    assert brief(first) == ["worker.exited jobs-1"]
    assert brief(second) == ["worker.exited jobs-2", "group.failed jobs-2"]
    assert fields_of("group.failed", second) == {
        "worker": "jobs-2",
        "group": "jobs",
        "pid": 1002,
        "generation": 1,
        "reason": "2 failures within 60 s, at most 1 are allowed; the last was jobs-2 "
        "(it ended with signal 11)",
        "cause": "crashed",
        "next_try_seconds": 27.0,
    }
    assert script.tick_just_before(29) == []
    assert (script.group().state, script.group().ready) == ("failed", 1)
    assert brief(script.crashed(29 - 1e-6, "jobs-3")) == ["worker.exited jobs-3"]


def test_what_ends_well_does_not_count_as_a_failure() -> None:
    """However often it does."""
    script = Script(group(max_restarts=0))
    for number in range(1, 10):
        script.registered(script.now, f"jobs-{number}")
        script.left(script.now, f"jobs-{number}")
        script.tick(script.now + 40)

    assert script.group().failure == ""


@pytest.mark.parametrize("restart", [Restart.ALWAYS, Restart.ON_FAILURE])
def test_failures_count_for_the_whole_group(restart: Restart) -> None:
    """Different workers' failures add up."""
    script = Script(group(count=2, max_restarts=1, restart=restart))
    script.ready(1, "jobs-1", "jobs-2")
    script.crashed(2, "jobs-1")

    assert brief(script.crashed(3, "jobs-2"))[-1] == "group.failed jobs-2"


def test_a_failure_that_is_never_restarted_fails_the_group() -> None:
    """Nobody makes it good: the supervisor will not end with 0."""
    script = Script(group(restart=Restart.NEVER))
    script.ready(1, "jobs-1")

    assert brief(script.crashed(2, "jobs-1")) == ["worker.exited jobs-1", "group.failed jobs-1"]
    assert script.group().failure == (
        "jobs-1 failed, and is not to be restarted (it ended with signal 11)"
    )
    assert script.fleet.next_deadline() is None
    assert brief(script.at(3, ev.StopRequested("SIGTERM")))[-1] == "Finish 1"


def test_a_failed_group_leaves_the_others_alone() -> None:
    """`on_failed = "keep"`: the supervisor goes on, and ends with 1 when it is stopped."""
    script = Script(group("bad", max_restarts=0), group("good"))
    script.ready(1, "bad-1", "good-1")
    script.crashed(2, "bad-1")

    assert script.fleet.phase is Phase.READY
    script.crashed(3, "good-1")
    assert brief(script.tick(4)) == ["Spawn good-2"]
    script.ready(4, "good-2")
    script.at(5, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("good-2"))
    stopped = script.left(6, "good-2")
    assert brief(stopped)[-1] == "Finish 1"
    assert fields_of("supervisor.stopped", stopped)["failed_groups"] == ["bad"]


def test_a_failed_group_can_take_the_supervisor_with_it() -> None:
    """`on_failed = "exit"`: a graceful stop of all others, that ends with 1."""
    script = Script(group("bad", max_restarts=0, exit_on_failed=True), group("good"))
    script.ready(1, "bad-1", "good-1")
    actions = script.crashed(2, "bad-1")

    assert brief(actions) == [
        "worker.exited bad-1",
        "group.failed bad-1",
        "supervisor.stopping",
        "worker.cancelled good-1",
        "SendCancel good-1",
    ]
    assert fields_of("supervisor.stopping", actions)["cause"] == "group bad has failed"
    assert cancels(actions) == [ac.SendCancel("good-1", 32.0, 27.0, "stop")]
    assert brief(script.left(3, "good-1"))[-1] == "Finish 1"


def test_a_failed_group_that_was_all_there_is_ends_the_supervisor_at_once() -> None:
    """There is nobody left to wait for."""
    script = Script(group(max_restarts=0, exit_on_failed=True))
    script.born(1, "jobs-1")

    assert brief(script.crashed(2, "jobs-1"))[-3:] == [
        "supervisor.stopping",
        "supervisor.stopped",
        "Finish 1",
    ]


# --- a stop as it should be -----------------------------------------------------------------------


def test_a_stop_cancels_every_worker_at_once() -> None:
    """With an absolute deadline, when to abort what is in flight, and the cause."""
    script = running("jobs-1", "jobs-2")
    actions = script.at(100, ev.StopRequested("SIGTERM"))

    assert brief(actions) == [
        "supervisor.stopping",
        "worker.cancelled jobs-1",
        "SendCancel jobs-1",
        "worker.cancelled jobs-2",
        "SendCancel jobs-2",
    ]
    assert cancels(actions) == [
        ac.SendCancel("jobs-1", 130.0, 125.0, "stop"),
        ac.SendCancel("jobs-2", 130.0, 125.0, "stop"),
    ]
    assert fields_of("supervisor.stopping", actions) == {
        "cause": "SIGTERM",
        "workers": 2,
        "grace_seconds": 30.0,
    }


def test_each_worker_goes_through_cancelled_acknowledged_drained_exited() -> None:
    """And the last exit ends the supervisor, with 0."""
    script = running("jobs-1")
    cancelled = script.at(100, ev.StopRequested("SIGTERM"))
    acknowledged = script.at(100.002, ev.WorkerAcknowledged("jobs-1"))
    drained = script.at(101.5, ev.WorkerDrained("jobs-1", CLOSED, LIFE))
    end = ev.WorkerExited("jobs-1", code=0, max_rss_bytes=9_000_000, cpu_seconds=0.25)
    exited = script.at(101.625, end)
    who = {"worker": "jobs-1", "group": "jobs", "pid": 1001, "generation": 1}

    assert fields_of("worker.cancelled", cancelled) == {
        **who,
        "cause": "stop",
        "grace_seconds": 30.0,
    }
    assert acknowledged == [ac.Announce("worker.acknowledged", {**who, "seconds": 0.002})]
    assert drained == [ac.Announce("worker.drained", {**who, "reports": CLOSED, "seconds": 1.5})]
    assert exited == [
        ac.Announce(
            "worker.exited",
            {
                **who,
                "code": 0,
                "uptime_seconds": 101.625,
                "cancel_cause": "stop",
                "ready_seconds": 10,
                "serving_seconds": 90,
                "drain_seconds": 1.5,
                "exit_seconds": 0.125,
                "jobs": LIFE["jobs"],
                "in_stop": LIFE["in_stop"],
                "pools": {"main": {"acquires": 40, "closed": 2, "leaked": 1}},
                "max_rss_bytes": 9_000_000,
                "cpu_seconds": 0.25,
            },
        ),
        ac.Announce(
            "supervisor.stopped",
            {
                "exit_code": 0,
                "workers": 1,
                "drained": 1,
                "killed": [],
                "failed_groups": [],
                "cause": "SIGTERM",
                "grace_seconds": 30.0,
                "seconds": 1.625,
                "acknowledged": 1,
                "jobs": {"finished": 3, "aborted": 1},
                "connections": {"closed": 2, "leaked": 1},
            },
        ),
        ac.Finish(0, (ac.Outcome("jobs-1", 0.002, 1.5, 1.625, "", CLOSED),)),
    ]
    assert script.snapshot().state == "stopping"


def test_an_acknowledgement_is_a_claim_and_an_exit_is_the_truth() -> None:
    """Drained counts the WaitGroup down; the supervisor ends when the process has."""
    script = running("jobs-1", "jobs-2")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.at(100, ev.WorkerDrained("jobs-1"), ev.WorkerDrained("jobs-2"))

    assert script.snapshot().outstanding == ()
    assert brief(script.at(101, ev.WorkerExited("jobs-1", code=0))) == ["worker.exited jobs-1"]
    assert brief(script.at(102, ev.WorkerExited("jobs-2", code=0)))[-1] == "Finish 0"


def test_a_worker_that_dies_in_the_stop_is_accounted_for() -> None:
    """It needs neither receipt nor `drained`; nobody had to kill it."""
    script = running("jobs-1", "jobs-2")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.crashed(101, "jobs-1")

    assert script.snapshot().outstanding == ("jobs-2",)
    assert brief(script.left(102, "jobs-2"))[-1] == "Finish 0"


def test_a_stop_of_nobody_ends_at_once() -> None:
    """And says so."""
    script = Script(group(count=0))

    assert brief(script.at(1, ev.StopRequested("SIGTERM"))) == [
        "supervisor.stopping",
        "supervisor.stopped",
        "Finish 0",
    ]


def test_nothing_happens_after_the_end() -> None:
    """Late signals and late news find nobody."""
    script = Script(group(count=0))
    script.at(1, ev.StopRequested("SIGTERM"))

    assert script.at(2, ev.StopRequested("SIGTERM"), ev.StopNowRequested("SIGQUIT")) == []
    assert script.tick(3) == []


def test_a_stop_starts_nobody() -> None:
    """Restarts that were due are not, and who dies is not replaced."""
    script = running("jobs-1", "jobs-2")
    script.crashed(100, "jobs-1")
    script.at(100.05, ev.StopRequested("SIGTERM"))
    script.crashed(100.06, "jobs-2")

    assert script.fleet.next_deadline() is None
    assert "Spawn" not in str(brief(script.tick(200)))


def test_what_was_made_good_before_the_stop_does_not_count() -> None:
    """A crash that was replaced, or whose replacement is on its way, is not a failure of the stop."""
    script = running("jobs-1")
    script.crashed(100, "jobs-1")

    assert brief(script.at(100.05, ev.StopRequested("SIGTERM")))[-1] == "Finish 0"


# --- times of a stop -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grace", "deadline", "abort_at"),
    [(None, 130.0, 125.0), (60.0, 160.0, 155.0), (6.0, 106.0, 105.0), (0.0, 100.0, 100.0)],
)
def test_a_stop_may_bring_its_own_grace(
    grace: float | None, deadline: float, abort_at: float
) -> None:
    """With more time the abort margin stays, with less it keeps its share."""
    script = running("jobs-1")
    actions = script.at(100, ev.StopRequested("supervisor stop", grace))

    assert cancels(actions) == [ac.SendCancel("jobs-1", deadline, abort_at, "stop")]


def test_a_longer_grace_does_not_put_off_a_stop_that_is_under_way() -> None:
    """A second request can only hurry."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))

    assert script.at(101, ev.StopRequested("supervisor stop", 300.0)) == []
    assert script.at(102, ev.StopRequested("supervisor stop")) == []
    assert script.snapshot().deadline == 130.0


def test_a_shorter_grace_hurries_a_stop_that_is_under_way() -> None:
    """Everyone is told the new deadline; that they are cancelled is no news."""
    script = running("jobs-1", "jobs-2", "jobs-3")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.at(100, ev.WorkerAcknowledged("jobs-2"))
    script.at(100, ev.WorkerAcknowledged("jobs-3"), ev.WorkerDrained("jobs-3"))
    actions = script.at(100.5, ev.StopRequested("supervisor stop", 12.0))

    assert brief(actions) == ["supervisor.stopping", "SendCancel jobs-1", "SendCancel jobs-2"]
    assert cancels(actions) == [
        ac.SendCancel("jobs-1", 112.5, 107.5, "stop"),
        ac.SendCancel("jobs-2", 112.5, 107.5, "stop"),
    ]
    assert brief(script.tick(101)) == ["Terminate jobs-1"]
    assert brief(script.tick(112.5)) == [f"TakeStacks jobs-{n}" for n in (1, 2, 3)]


def test_stop_now_kills_within_a_second() -> None:
    """What is in flight is aborted at once; that moment is for rolling back."""
    script = running("jobs-1", "jobs-2")
    actions = script.at(100, ev.StopNowRequested("SIGQUIT"))
    script.at(100, ev.WorkerAcknowledged("jobs-2"))

    assert cancels(actions) == [
        ac.SendCancel("jobs-1", 100.5, 100.0, "stop"),
        ac.SendCancel("jobs-2", 100.5, 100.0, "stop"),
    ]
    assert brief(script.tick(100.5)) == ["TakeStacks jobs-1", "TakeStacks jobs-2"]
    assert brief(script.tick(100.75)) == [
        "worker.killed jobs-1",
        "Kill jobs-1",
        "worker.killed jobs-2",
        "Kill jobs-2",
    ]


def test_stop_now_hurries_a_stop_that_is_under_way() -> None:
    """The second SIGTERM, ten seconds after the first."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    actions = script.at(110, ev.StopNowRequested("SIGTERM again"))

    assert cancels(actions) == [ac.SendCancel("jobs-1", 110.5, 105.5, "stop")]
    assert brief(script.tick(110.5)) == ["TakeStacks jobs-1"]


def test_a_graceful_stop_does_not_put_off_stop_now() -> None:
    """The order of the two does not matter."""
    script = running("jobs-1")
    script.at(100, ev.StopNowRequested("SIGQUIT"))

    assert script.at(100.1, ev.StopRequested("SIGTERM")) == []
    assert brief(script.tick(100.5)) == ["TakeStacks jobs-1"]


# --- the ladder --------------------------------------------------------------------------------


def test_no_receipt_within_a_second_means_sigterm() -> None:
    """Once, and not before; its control thread may be dead."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"))

    assert script.tick_just_before(101) == []
    assert brief(script.tick(101)) == ["Terminate jobs-1"]
    assert script.tick(129) == []


def test_a_receipt_in_time_spares_it_the_sigterm() -> None:
    """Then only the deadline counts."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.at(100.9, ev.WorkerAcknowledged("jobs-1"))

    assert script.fleet.next_deadline() == 130.0
    assert script.tick_just_before(130) == []


def test_a_receipt_after_the_sigterm_still_counts() -> None:
    """It drains as everybody does."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.tick(101)

    assert brief(script.at(102, ev.WorkerAcknowledged("jobs-1"))) == ["worker.acknowledged jobs-1"]
    assert brief(script.left(103, "jobs-1"))[-1] == "Finish 0"


def test_at_the_deadline_its_stacks_are_taken_and_then_it_is_killed() -> None:
    """Not before; the kill waits for the stacks, and is explained step by step."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.tick(101)

    assert script.tick_just_before(130) == []
    assert brief(script.tick(130)) == ["TakeStacks jobs-1"]
    in_flight = (JobSeen("report", 90.0),)
    killed = script.at(
        130.05, ev.StacksTaken("jobs-1", "File app.py, line 3, in loop", "", in_flight)
    )
    assert brief(killed) == ["worker.killed jobs-1", "Kill jobs-1"]
    assert fields_of("worker.killed", killed) == {
        "worker": "jobs-1",
        "group": "jobs",
        "pid": 1001,
        "generation": 1,
        "why": (
            "it did not acknowledge the cancel and did not end by its deadline: 30.1 s after cancel"
        ),
        "ladder": [("cancel", 0.0), ("SIGTERM", 1.0), ("stacks", 30.0), ("SIGKILL", 30.05)],
        "jobs": [{"name": "report", "seconds": 40.05}],
        "stacks": "File app.py, line 3, in loop",
    }
    stopped = script.at(130.06, ev.WorkerExited("jobs-1", signal=9))
    assert brief(stopped) == ["worker.exited jobs-1", "supervisor.stopped", "Finish 1"]
    assert fields_of("supervisor.stopped", stopped)["killed"] == ["jobs-1"]
    assert fields_of("worker.exited", stopped)["signal"] == 9


def test_stacks_that_do_not_come_do_not_hold_up_the_kill() -> None:
    """A quarter of a second, and the event says why there are none."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    script.tick(130)

    assert script.tick_just_before(130.25) == []
    killed = script.tick(130.25)
    assert brief(killed) == ["worker.killed jobs-1", "Kill jobs-1"]
    fields = fields_of("worker.killed", killed)
    assert (fields["stacks"], fields["stacks_missing"]) == ("", "it wrote none in time")
    assert script.at(131, ev.StacksTaken("jobs-1", "too late")) == []


def test_stacks_that_cannot_be_had_say_why() -> None:
    """A stopped process writes none."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    script.tick(130)
    killed = script.at(130, ev.StacksTaken("jobs-1", "", "it is stopped (SIGSTOP)"))

    assert fields_of("worker.killed", killed)["stacks_missing"] == "it is stopped (SIGSTOP)"


def test_who_exits_while_its_stacks_are_taken_is_not_killed() -> None:
    """And did not have to be: 0."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    script.tick(130)

    assert brief(script.at(130.1, ev.WorkerExited("jobs-1", code=0)))[-1] == "Finish 0"


def test_after_its_deadline_a_worker_is_not_believed_any_more() -> None:
    """So no claim puts off a kill, and a killed worker has no late `drained`."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    script.tick(130)

    assert script.at(130.1, ev.WorkerDrained("jobs-1"), ev.WorkerFailed("jobs-1", "", "")) == []
    assert script.snapshot().outstanding == ("jobs-1",)
    assert brief(script.tick(130.25)) == ["worker.killed jobs-1", "Kill jobs-1"]


def test_a_liar_that_drains_but_stays_is_killed_for_it() -> None:
    """The claim counted it down, its process is what is waited for."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    script.at(101, ev.WorkerDrained("jobs-1"))
    script.tick(130)
    killed = script.tick(130.25)

    assert fields_of("worker.killed", killed)["why"] == (
        "it said that it was drained but did not exit: 30.2 s after cancel"
    )
    assert brief(script.at(131, ev.WorkerExited("jobs-1", signal=9)))[-1] == "Finish 1"


@pytest.mark.parametrize("moment", [5.25, 5.3])
def test_a_kill_from_before_the_stop_does_not_count(moment: float) -> None:
    """Only who had to be killed in the stop makes it end with 1, by order, not by the clock."""
    script = Script(group(ready_timeout=5.0))
    script.born(0, "jobs-1")
    script.tick(5)
    script.tick(5.25)
    script.at(moment, ev.StopRequested("SIGTERM"))
    stopped = script.at(5.4, ev.WorkerExited("jobs-1", signal=9))

    assert brief(stopped)[-1] == "Finish 0"
    assert fields_of("supervisor.stopped", stopped)["killed"] == []


def test_with_no_grace_the_ladder_is_climbed_at_once() -> None:
    """And time cannot stand still on it."""
    script = running("jobs-1", grace=0.0, abort_margin=0.0)
    script.at(100, ev.StopRequested("SIGTERM"))

    assert brief(script.tick(100)) == ["TakeStacks jobs-1"]
    assert script.fleet.next_deadline() == 100.25


def test_with_no_grace_a_late_start_ends_in_the_same_turn() -> None:
    """Every step that is due is taken at once: the loop cannot spin on them."""
    script = Script(group(ready_timeout=5.0), grace=0.0, abort_margin=0.0)
    script.registered(1, "jobs-1")

    assert brief(script.tick(5)) == [
        "worker.cancelled jobs-1",
        "SendCancel jobs-1",
        "TakeStacks jobs-1",
    ]
    assert script.fleet.next_deadline() == 5.25


# --- a stop at an awkward moment ----------------------------------------------------------------


def test_a_stop_waits_a_second_for_births_and_then_gives_them_up() -> None:
    """A slow import does not hold up a stop; nobody was killed, so it ends with 0."""
    script = Script(group())
    actions = script.at(1, ev.StopRequested("SIGTERM"))

    assert brief(actions) == ["supervisor.stopping"]
    assert script.tick_just_before(2) == []
    assert brief(script.tick(2)) == ["Kill jobs-1"]
    stopped = script.at(2.1, ev.WorkerNotBorn("jobs-1", "its template ended with SIGKILL"))
    assert brief(stopped) == ["supervisor.stopped", "Finish 0"]
    assert fields_of("supervisor.stopped", stopped)["workers"] == 0


def test_who_is_born_into_a_stop_is_sent_away_at_once() -> None:
    """It has not said hello, so SIGTERM has to do; it is cancelled all the same."""
    script = Script(group())
    script.at(1, ev.StopRequested("SIGTERM"))

    assert brief(script.born(1.5, "jobs-1")) == [
        "worker.spawned jobs-1",
        "worker.cancelled jobs-1",
        "Terminate jobs-1",
    ]
    assert script.fleet.next_deadline() == 31.0
    stopped = script.at(1.6, ev.WorkerExited("jobs-1", signal=15))
    assert brief(stopped)[-1] == "Finish 0"


def test_who_is_born_after_the_deadline_is_not_taken_for_a_gap_in_time() -> None:
    """It is late, the supervisor is not: it goes by the ladder, from now."""
    script = Script(group(), grace=5.0, abort_margin=1.0)
    script.at(1, ev.StopRequested("SIGTERM"))
    script.tick(2)
    script.registered(20, "jobs-1")
    script.at(20, ev.WorkerAcknowledged("jobs-1"))

    assert brief(script.tick(20)) == ["TakeStacks jobs-1"]
    assert brief(script.tick(20.25)) == ["worker.killed jobs-1", "Kill jobs-1"]


def test_a_stop_before_the_hello_means_sigterm_at_once() -> None:
    """There is no socket yet over which to tell it, and no work that could be lost."""
    script = Script(group())
    script.born(1, "jobs-1")

    assert brief(script.at(2, ev.StopRequested("SIGTERM"))) == [
        "supervisor.stopping",
        "worker.cancelled jobs-1",
        "Terminate jobs-1",
    ]
    assert script.tick_just_before(32) == []
    assert brief(script.tick(32)) == ["TakeStacks jobs-1"]
    killed = script.tick(32.25)
    assert fields_of("worker.killed", killed)["why"] == (
        "it did not say hello and did not end by its deadline: 30.2 s after cancel"
    )


def test_who_has_been_sent_away_is_not_sent_away_again() -> None:
    """A second request only brings its end nearer."""
    script = Script(group())
    script.born(1, "jobs-1")
    script.at(2, ev.StopRequested("SIGTERM"))

    assert brief(script.at(3, ev.StopNowRequested("SIGTERM again"))) == ["supervisor.stopping"]
    assert brief(script.tick(3.5)) == ["TakeStacks jobs-1"]


def test_a_hello_after_the_sigterm_is_answered_with_the_cancel() -> None:
    """Its handlers stood already: it learns its deadline and drains."""
    script = Script(group())
    script.born(1, "jobs-1")
    script.at(2, ev.StopRequested("SIGTERM"))
    hello = script.at(2.1, ev.WorkerRegistered("jobs-1"))

    assert hello == [ac.SendCancel("jobs-1", 32.0, 27.0, "stop")]
    assert brief(script.at(2.2, ev.WorkerAcknowledged("jobs-1"))) == ["worker.acknowledged jobs-1"]


def test_a_worker_that_is_failing_is_cancelled_too() -> None:
    """It drains for its own reason; now it knows the deadline. It is no reason to end with 1."""
    script = running("jobs-1")
    script.at(99, ev.WorkerFailed("jobs-1", "ValueError: no", "Traceback"))
    actions = script.at(100, ev.StopRequested("SIGTERM"))

    assert brief(actions)[1:] == ["worker.cancelled jobs-1", "SendCancel jobs-1"]
    assert cancels(actions) == [ac.SendCancel("jobs-1", 129.0, 124.0, "stop")]
    script.at(100, ev.WorkerAcknowledged("jobs-1"))
    assert brief(script.left(101, "jobs-1"))[-1] == "Finish 0"


def test_a_worker_that_has_drained_by_itself_is_only_waited_for() -> None:
    """There is nothing left to cancel, but its exit is due by the stop's deadline."""
    script = running("jobs-1")
    script.at(99, ev.WorkerDrained("jobs-1"))

    assert brief(script.at(100, ev.StopRequested("stop", 2.0))) == ["supervisor.stopping"]
    assert script.fleet.next_deadline() == 102.0


def test_stop_now_reaches_those_who_are_not_born() -> None:
    """They are given up when the others' time is up."""
    script = Script(group())
    script.at(1, ev.StopRequested("SIGTERM"))
    script.at(1.1, ev.StopNowRequested("SIGTERM again"))

    assert brief(script.tick(1.6)) == ["Kill jobs-1"]
    assert script.at(1.7, ev.StopNowRequested("SIGQUIT")) == []


# --- workers that end by themselves ------------------------------------------------------------


def test_code_that_returns_drains_and_exits_without_a_cancel() -> None:
    """Nobody has cancelled it, so nothing is acknowledged; then its restart type decides."""
    script = running("jobs-1")

    assert brief(script.left(20, "jobs-1")) == ["worker.drained jobs-1", "worker.exited jobs-1"]
    assert brief(script.tick(21)) == ["Spawn jobs-2"]


def test_who_drains_by_itself_but_does_not_exit_is_killed_after_its_grace() -> None:
    """Its place would be lost for ever."""
    script = running("jobs-1")
    script.at(20, ev.WorkerDrained("jobs-1"))

    assert brief(script.tick(50)) == ["TakeStacks jobs-1"]
    killed = script.tick(50.25)
    assert fields_of("worker.killed", killed)["why"] == (
        "it said that it was drained but did not exit: 30.2 s after drained"
    )


def test_code_that_raises_is_told_with_its_traceback() -> None:
    """The exception reaches the parent, the worker drains itself, and it counts as failed."""
    script = running("jobs-1")
    failed = script.at(20, ev.WorkerFailed("jobs-1", "ValueError: no", "Traceback ..."))

    assert failed == [
        ac.Announce(
            "worker.failed",
            {
                "worker": "jobs-1",
                "group": "jobs",
                "pid": 1001,
                "generation": 1,
                "error": "ValueError: no",
                "traceback": "Traceback ...",
            },
        )
    ]
    assert script.snapshot().workers[0].state == "failed"
    exited = script.left(21, "jobs-1")
    assert brief(exited) == ["worker.drained jobs-1", "worker.exited jobs-1"]
    assert fields_of("worker.exited", exited)["reason"] == "failed"


def test_code_that_raises_has_its_grace_to_drain_in() -> None:
    """Then it is killed, although nobody has cancelled it."""
    script = running("jobs-1")
    script.at(20, ev.WorkerFailed("jobs-1", "ValueError", ""))

    assert script.tick_just_before(50) == []
    assert brief(script.tick(50)) == ["TakeStacks jobs-1"]
    assert fields_of("worker.killed", script.tick(50.25))["why"] == (
        "its code raised and it did not end by its deadline: 30.2 s after failed"
    )


def test_code_that_raises_while_it_drains_is_told_once() -> None:
    """However often the worker says so, and without another way to its end."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    failed = ev.WorkerFailed("jobs-1", "ValueError", "")

    assert brief(script.at(101, failed, failed)) == ["worker.failed jobs-1"]
    assert script.fleet.next_deadline() == 130.0
    assert brief(script.left(102, "jobs-1"))[-1] == "Finish 0"


def test_who_is_sent_away_by_somebody_else_gets_a_deadline_and_a_successor() -> None:
    """SIGTERM to a worker means: drain under the parent's deadline."""
    script = running("jobs-1")
    actions = script.at(20, ev.WorkerLeaving("jobs-1", "SIGTERM from outside"))

    assert brief(actions) == ["worker.cancelled jobs-1", "SendCancel jobs-1"]
    assert cancels(actions) == [ac.SendCancel("jobs-1", 50.0, 45.0, "SIGTERM from outside")]
    assert script.at(20, ev.WorkerLeaving("jobs-1", "SIGTERM from outside")) == []
    script.at(20, ev.WorkerAcknowledged("jobs-1"))
    script.left(21, "jobs-1")
    assert brief(script.tick(22)) == ["Spawn jobs-2"]


def test_who_is_sent_away_before_its_hello_is_cancelled_when_it_says_it() -> None:
    """The signal is not forgotten because it came early."""
    script = Script(group())
    script.born(1, "jobs-1")

    assert brief(script.at(1, ev.WorkerLeaving("jobs-1", "SIGTERM from outside"))) == [
        "worker.cancelled jobs-1",
        "Terminate jobs-1",
    ]
    assert brief(script.at(2, ev.WorkerRegistered("jobs-1"))) == ["SendCancel jobs-1"]


def test_a_stop_does_not_give_more_time_to_who_is_leaving() -> None:
    """The nearer deadline stands, and it is not told again what it knows."""
    script = running("jobs-1")
    script.at(20, ev.WorkerLeaving("jobs-1", "SIGTERM from outside"))
    script.at(20, ev.WorkerAcknowledged("jobs-1"))

    assert brief(script.at(30, ev.StopRequested("SIGTERM"))) == ["supervisor.stopping"]
    assert script.fleet.next_deadline() == 50.0


def test_an_exit_tells_what_was_left_behind_and_what_it_wrote() -> None:
    """Processes that were killed with its group, and the stacks of a crash."""
    script = running("jobs-1")
    exited = script.at(
        20, ev.WorkerExited("jobs-1", signal=11, leftovers=("sleep (pid 7)",), stacks="Fatal")
    )
    fields = fields_of("worker.exited", exited)

    assert (fields["leftovers"], fields["stacks"]) == (["sleep (pid 7)"], "Fatal")


# --- lies and late news ------------------------------------------------------------------------


def test_strangers_and_the_dead_are_not_heard() -> None:
    """Nothing is done and nothing is changed."""
    script = running("jobs-1")
    script.crashed(20, "jobs-1")
    before = script.snapshot()

    for worker in ("jobs-1", "jobs-99", "web-1", ""):
        assert script.at(20, ev.WorkerReady(worker), ev.WorkerDrained(worker)) == []
        assert script.at(20, ev.WorkerExited(worker, code=0), ev.WorkerBorn(worker, 1)) == []
    assert script.snapshot() == before


def test_a_receipt_for_a_cancel_that_was_never_sent_is_ignored() -> None:
    """A worker gone mad does not stop serving by it."""
    script = running("jobs-1")

    assert script.at(20, ev.WorkerAcknowledged("jobs-1")) == []
    assert script.snapshot().workers[0].state == "ready"


# --- time that was lost ---------------------------------------------------------------------------


def test_a_supervisor_that_stood_still_judges_nobody_in_that_turn() -> None:
    """Who was due is due that much later, with a second at least to be heard."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))

    assert script.tick(190) == []
    assert script.fleet.next_deadline() == 191.0
    assert brief(script.at(190.1, ev.WorkerDrained("jobs-1"))) == ["worker.drained jobs-1"]
    assert brief(script.at(190.2, ev.WorkerExited("jobs-1", code=0)))[-1] == "Finish 0"


def test_time_that_was_lost_is_given_back_to_all() -> None:
    """Also to those who were not due yet; the end of the stop moves with them."""
    script = running("jobs-1", "jobs-2")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-2"))
    script.tick(111)  # jobs-1's receipt was due at 101

    assert script.fleet.next_deadline() == 112.0
    assert brief(script.tick(112)) == ["Terminate jobs-1"]
    assert script.fleet.next_deadline() == 140.0
    assert script.snapshot().deadline == 140.0


def test_what_happens_after_the_gap_is_not_put_off_by_it() -> None:
    """A stop that is requested first thing after an hour's sleep takes its grace, not an hour."""
    script = running("jobs-1", "jobs-2")
    script.at(11, ev.WorkerFailed("jobs-2", "ValueError", ""))
    script.at(3600, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    script.at(3600, ev.WorkerAcknowledged("jobs-2"))

    assert script.tick(3600) == []
    assert script.snapshot().deadline == 3630.0
    assert brief(script.tick(3601)) == ["TakeStacks jobs-2"]  # it has had its grace, and a second
    script.tick(3602)
    assert brief(script.tick(3630)) == ["TakeStacks jobs-1"]


def test_a_late_turn_is_judged_as_a_whole_when_the_last_one_was_excused() -> None:
    """What is heard before the clock is looked at does not win another excuse."""
    script = running("jobs-1", "jobs-2")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.at(100, ev.WorkerAcknowledged("jobs-1"), ev.WorkerAcknowledged("jobs-2"))
    script.tick(190)
    script.at(195, ev.WorkerDrained("jobs-2"))

    assert brief(script.tick(195)) == ["TakeStacks jobs-1", "TakeStacks jobs-2"]


def test_a_turn_that_is_a_little_late_is_no_excuse() -> None:
    """A busy loop is not one that stood still."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))

    assert brief(script.tick(130 + STOOD_STILL - 0.01)) == ["TakeStacks jobs-1"]


def test_late_twice_in_a_row_is_a_slow_machine() -> None:
    """There a deadline is a deadline, whatever else is looked at in between."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"), ev.WorkerAcknowledged("jobs-1"))
    script.tick(190)

    assert script.tick(190.5) == []  # nothing is due: it tells nothing about the machine
    assert brief(script.tick(195)) == ["TakeStacks jobs-1"]


def test_lost_time_does_not_make_a_worker_late_with_its_start() -> None:
    """A machine that was frozen wakes up with all of its workers."""
    script = Script(group(ready_timeout=5.0))
    script.registered(1, "jobs-1")

    assert script.tick(3600) == []
    assert brief(script.at(3600.5, ev.WorkerReady("jobs-1"))) == [
        "worker.ready jobs-1",
        "supervisor.ready",
    ]


def test_a_restart_that_is_late_is_simply_late() -> None:
    """Nobody is judged by it."""
    script = running("jobs-1")
    script.crashed(20, "jobs-1")

    assert brief(script.tick(3600)) == ["Spawn jobs-2"]


# --- what is shown ------------------------------------------------------------------------------


def test_a_groups_state_follows_its_workers() -> None:
    """Starting until it has been complete once, then ready or degraded, failed for good."""
    script = Script(group(count=2, max_restarts=1))
    states = [script.group().state]
    script.ready(1, "jobs-1")
    states.append(script.group().state)
    script.ready(2, "jobs-2")
    states.append(script.group().state)
    script.crashed(3, "jobs-1")
    states.append(script.group().state)
    script.tick(4)
    script.ready(4, "jobs-3")
    states.append(script.group().state)
    script.crashed(5, "jobs-2")
    states.append(script.group().state)

    assert states == ["starting", "starting", "ready", "degraded", "ready", "failed"]


def test_the_snapshot_shows_everyone_with_place_and_state() -> None:
    """What `status` prints."""
    script = running("jobs-1", "jobs-2")
    script.at(20, ev.WorkerLeaving("jobs-2", "SIGTERM"))
    fleet = script.snapshot()

    assert (fleet.state, fleet.generation, fleet.deadline) == ("ready", 1, None)
    assert [(w.id, w.group, w.pid, w.state, w.ready, w.deadline) for w in fleet.workers] == [
        ("jobs-1", "jobs", 1001, "ready", True, None),
        ("jobs-2", "jobs", 1002, "draining", False, 50.0),
    ]
    assert script.fleet.worker_of("jobs-1") == fleet.workers[0]
    assert script.fleet.worker_of("jobs-9") is None
    (found,) = fleet.groups
    assert (found.count, found.ready, found.next_restart, found.failure) == (2, 1, None, "")


def test_a_group_tells_when_it_restarts_next() -> None:
    """The earliest of its places."""
    script = running("jobs-1", "jobs-2")
    script.crashed(20, "jobs-1")
    script.crashed(20.02, "jobs-2")

    assert script.group().next_restart == pytest.approx(20.1)


def test_a_group_of_many_is_counted_once_each() -> None:
    """Five hundred workers start, stop and are accounted for."""
    script = Script(GroupSpec("jobs", 500))
    workers = [f"jobs-{number}" for number in range(1, 501)]
    script.ready(1, *workers)
    script.at(2, ev.StopRequested("SIGTERM"))
    script.at(2, *(ev.WorkerAcknowledged(worker) for worker in workers))
    finish = script.left(3, *workers)[-1]

    assert isinstance(finish, ac.Finish)
    assert (finish.exit_code, [o.worker for o in finish.outcomes]) == (0, workers)


def test_the_end_of_a_killed_worker_says_why_and_where_its_stacks_are() -> None:
    """What it has not said itself is not invented."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.at(101, ev.WorkerAcknowledged("jobs-1"))
    script.tick(130)
    script.at(130.1, ev.StopNowRequested("SIGQUIT"))
    script.at(130.125, ev.StacksTaken("jobs-1", "File x", "", ()))
    actions = script.at(130.25, ev.WorkerExited("jobs-1", signal=9))

    exited = fields_of("worker.exited", actions)
    assert "did not drain" in exited["why"]
    assert exited["has_stacks"] is True
    assert exited["exit_seconds"] == 0.125
    assert not {"drain_seconds", "jobs", "pools", "stacks"} & exited.keys()
    stopped = fields_of("supervisor.stopped", actions)
    assert (stopped["acknowledged"], stopped["killed"]) == (1, ["jobs-1"])
    assert stopped["jobs"] == {"finished": 0, "aborted": 0}


def test_a_stop_tells_who_has_hurried_it() -> None:
    """And the grace that it was left with in the end."""
    script = running("jobs-1")
    script.at(100, ev.StopRequested("SIGTERM"))
    script.at(101, ev.StopNowRequested("SIGTERM again"))
    actions = script.at(101.25, ev.WorkerExited("jobs-1", code=0))

    stopped = fields_of("supervisor.stopped", actions)
    assert (stopped["cause"], stopped["hurried_by"]) == ("SIGTERM", ["SIGTERM again"])
    assert (stopped["grace_seconds"], stopped["seconds"]) == (1.5, 1.25)
