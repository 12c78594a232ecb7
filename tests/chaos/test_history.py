"""The checks of a history find what they are for; a nemesis alone would not show that they do."""

from __future__ import annotations

import pytest

from tests.chaos.history import check

LADDER = [["cancel", 0.0], ["acknowledged", 0.1], ["stacks", 3.0], ["SIGKILL", 3.1]]


def life(*, ladder=LADDER, grace=3.0, uptime=9.0, ends=1, **killed):
    """What is told of a worker that was cancelled, killed and has exited."""
    who = {"worker": "jobs-1", "pid": 7}
    explained = {"why": "it did not drain", "ladder": ladder, "stacks": "Thread", "jobs": []}
    cancelled = {"event": "worker.cancelled", **who, "grace_seconds": grace}
    return [
        {"event": "worker.spawned", **who},
        *([cancelled] if "cancel" in dict(ladder) else []),
        {"event": "worker.killed", **who, **explained, **killed},
        *[{"event": "worker.exited", **who, "uptime_seconds": uptime}] * ends,
        {"event": "jobs.taken_back", "worker": "jobs-2"},
    ]


def verdict(events):
    return check(events, grace=3.0, ready_timeout=30.0)


@pytest.mark.parametrize(
    "ladder",
    [
        LADDER,
        [["failed", 0.0], ["stacks", 3.0], ["SIGKILL", 3.0]],
        [["failed", 0.0], ["cancel", 1.0], ["SIGKILL", 4.0]],
    ],
)
def test_a_kill_in_its_time_is_none_to_complain_of(ladder):
    """After the deadline of the cancel, or of the failure."""
    assert verdict(life(ladder=ladder)) == 1


def test_lives_of_several_supervisors_are_told_apart():
    """The second one's jobs-1 is another worker."""
    second = [{**event, "pid": 8} for event in life()]
    assert verdict(life() + second) == 2


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        (life(ladder=[["cancel", 0.0], ["SIGKILL", 2.9]]), "before its time, 3.000 s"),
        (life(grace=3.2), "before its time, 3.200 s"),
        (life(ladder=[["failed", 0.0], ["SIGKILL", 2.9]]), "before its time, 3.000 s"),
        (life(ladder=[["stacks", 0.0], ["SIGKILL", 0.3]]), "nobody had told it to end"),
        (life(why=""), "not explained, for want of .'why'"),
        (life(stacks=""), "for want of .'stacks'"),
        (life(ladder=LADDER[:-1]), "without its last step"),
        (life(ends=2), "an end came twice"),
    ],
)
def test_what_must_not_be_is_named(events, complaint):
    """Each with a message of its own."""
    with pytest.raises(AssertionError, match=complaint):
        verdict(events)


def test_a_kill_for_a_late_start_is_in_its_time():
    """Where nobody cancelled it: it had its whole time to start."""
    assert verdict(life(ladder=[["stacks", 0.0], ["SIGKILL", 0.3]], uptime=30.3)) == 1
