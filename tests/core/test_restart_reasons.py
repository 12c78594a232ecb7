"""Why a worker takes another one's place: it is said when it is spawned, and metrics count it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from supervisor.core import events as ev
from tests.core.script import Script, fields_of, group

KILL, SEGV = 9, 11


def born(script: Script, now: float, worker: str) -> str:
    """Return the reason that the worker's spawn is announced with."""
    return str(fields_of("worker.spawned", script.born(now, worker)).get("reason", "none"))


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([ev.WorkerDrained("jobs-1"), ev.WorkerExited("jobs-1", code=0)], "exited"),
        ([ev.WorkerExited("jobs-1", code=3)], "failed"),
        (
            [ev.WorkerFailed("jobs-1", "ValueError", ""), ev.WorkerExited("jobs-1", code=0)],
            "failed",
        ),
        ([ev.WorkerExited("jobs-1", signal=SEGV)], "failed"),
        ([ev.WorkerExited("jobs-1", signal=KILL)], "killed"),
        ([ev.WorkerLeaving("jobs-1", "SIGTERM"), ev.WorkerExited("jobs-1", code=0)], "killed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_successor_says_how_its_predecessor_ended(events: list[ev.Event], reason: str) -> None:
    """Its own end, a failure, or somebody's signal; the first worker of a place has no reason."""
    script = Script(group())
    assert born(script, 0, "jobs-1") == "none"
    script.at(0, ev.WorkerRegistered("jobs-1"), ev.WorkerReady("jobs-1"))
    script.at(1, *events)
    script.tick(2)
    assert born(script, 2, "jobs-2") == reason


def test_a_worker_that_is_late_counts_as_failed() -> None:
    """It was killed, but for its own fault: that is no signal from outside."""
    script = Script(group(ready_timeout=5))
    script.born(0, "jobs-1")
    script.tick(5)
    script.at(5, ev.StacksTaken("jobs-1", ""), ev.WorkerExited("jobs-1", signal=KILL))
    script.tick(6)
    assert born(script, 6, "jobs-2") == "failed"


def test_a_spawn_that_was_refused_does_not_hide_the_reason() -> None:
    """What took the predecessor is still why, when the second attempt succeeds."""
    script = Script(group())
    script.ready(0, "jobs-1")
    script.at(1, ev.WorkerExited("jobs-1", signal=KILL))
    script.tick(2)
    script.at(2, ev.WorkerNotBorn("jobs-2", "EAGAIN"))
    script.tick(3)
    assert born(script, 3, "jobs-3") == "killed"


def test_rolls_say_rolled_and_age_says_recycled() -> None:
    """A restart that was asked for is a roll; one for its age is not, and growth is neither."""
    script = Script(replace(group(), max_age=100.0))
    script.ready(0, "jobs-1")
    script.at(1, ev.RestartRequested("jobs"))
    assert born(script, 1, "jobs-2") == "rolled"
    script.at(1, ev.WorkerRegistered("jobs-2"), ev.WorkerReady("jobs-2"))
    script.tick(2)
    script.left(2, "jobs-1")
    script.tick(1 + 95)
    assert born(script, 96, "jobs-3") == "recycled"
    script.at(96, ev.WorkerRegistered("jobs-3"), ev.WorkerReady("jobs-3"))
    script.tick(97)
    script.left(97, "jobs-2")
    script.at(98, ev.ScaleRequested("jobs", 2))
    assert born(script, 98, "jobs-4") == "none"
