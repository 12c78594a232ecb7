"""What is said to whoever waits: how far it is, who is missing, and what that one waits for."""

from __future__ import annotations

from math import ceil

from supervisor.core import events as ev
from supervisor.core.spec import GroupSpec
from supervisor.core.underway import sentence
from tests.core.script import Script, group


def said(script: Script, began: float = 0.0) -> str:
    """Return what is said now of what began then."""
    return sentence(script.fleet.snapshot(), script.now - began, script.now)


def test_a_start_names_who_is_not_ready_and_what_it_does():
    """Those without a process wait for an import, the others for themselves; few are named."""
    script = Script(group("jobs", 5), group("web", 1))
    script.ready(2.0, "jobs-1")
    script.registered(3.0, "jobs-2", "jobs-3", "jobs-4", "jobs-5")
    assert said(script) == (
        "starting, 3 s: 1 of 6 ready; imported for web-1 (3 s); "
        "not ready yet jobs-2, jobs-3, jobs-4 and 1 more (3 s)"
    )
    script.ready(4.0, "web-1")
    script.at(5.0, *(ev.WorkerReady(f"jobs-{number}") for number in range(2, 6)))
    assert said(script) == ""


def test_a_start_names_the_pool_that_a_group_waits_for():
    """By what its driver says, cut; its workers are not named beside."""
    script = Script(group("jobs", 2))
    script.registered(1.0, "jobs-1", "jobs-2")
    script.at(2.0, ev.WorkerUnreachable("jobs-1", "main", "refused " * 100))
    words = said(script)
    assert words.startswith(
        "starting, 2 s: 0 of 2 ready; jobs waits for pool main: refused refused"
    )
    assert len(words) < 130
    assert "jobs-1" not in words


def test_a_start_names_what_has_to_run_before_the_others():
    """It is none of those that are counted, whether it serves or not."""
    script = Script(GroupSpec("migrate", 1, before=True), group("jobs", 2))
    script.ready(1.0, "migrate-1")
    script.tick(4.0)
    assert said(script) == (
        "starting, 4 s: 0 of 2 ready; first migrate-1 has to end well, 4 s by now, 30 s at most"
    )
    script.tick(30.0)
    assert said(script) == "starting, 30 s: 0 of 2 ready; migrate-1 is told to end, 30 s left"


def test_a_start_says_when_a_group_is_tried_again_and_that_it_has_failed():
    """With the cause of its last failure."""
    script = Script(group("jobs", 1, max_restarts=1))
    script.registered(1.0, "jobs-1")
    script.at(1.5, ev.WorkerExited("jobs-1", 3, None))
    due = script.fleet.next_deadline()
    assert due is not None
    left = ceil(due - script.now)
    assert said(script) == (
        f"starting, 2 s: 0 of 1 ready; jobs is tried again in {left} s (startup)"
    )
    script.tick(due)
    script.registered(due, "jobs-2")
    script.at(due, ev.WorkerExited("jobs-2", 3, None))
    assert ": 0 of 1 ready; jobs has failed; jobs is tried again in " in said(script)


def test_a_roll_says_how_far_it_is():
    """And who is on the move."""
    script = Script(group("jobs", 2))
    script.ready(1.0, "jobs-1", "jobs-2")
    script.at(2.0, ev.RestartRequested("jobs"))
    script.tick(3.0)
    assert said(script, 2.0) == "rolling 0/2 to generation 1: jobs-3 starting, 1 s"


def test_a_stop_says_who_is_outstanding_and_how_much_time_is_left():
    """Only those that have not drained."""
    script = Script(group("jobs", 3), grace=20.0)
    script.ready(1.0, "jobs-1", "jobs-2", "jobs-3")
    script.at(2.0, ev.StopRequested("SIGTERM"))
    script.at(3.5, ev.WorkerAcknowledged("jobs-1"), ev.WorkerDrained("jobs-1", {}))
    assert said(script, 2.0) == "draining, 19 s left: 2 outstanding: jobs-2, jobs-3"
