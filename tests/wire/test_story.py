"""The story of a worker: what its events become in sentences."""

from __future__ import annotations

from supervisor.story import tell

WHO = {"worker": "jobs-1", "group": "jobs", "pid": 7, "generation": 1}
REPORT = {"closed": 2, "waited": 0, "leaked": []}
LEAK = {"held_seconds": 9.5, "thread": "t", "stack": '  File "app.py", line 3, in take\n'}


def event(name, second=0, **fields):
    """Return an event as the journal has it."""
    return {"time": f"2026-11-24T18:00:{second:02}.000000Z", "event": name, **fields}


def own(name, second=0, **fields):
    """Return an event of jobs-1."""
    return event(name, second, **WHO, **fields)


def told(*events):
    """Return the story of jobs-1 in lines."""
    text = tell("jobs-1", events)
    assert text is not None
    return text.splitlines()


LIFE = (own("worker.spawned"), own("worker.ready", 1, seconds=0.0123))
STOP = (
    own("worker.cancelled", 5, cause="stop", grace_seconds=30.0),
    own("worker.acknowledged", 5, seconds=0.002),
)


def test_nobody_has_no_story():
    """A worker that no event names is not made up."""
    assert tell("jobs-2", LIFE) is None


def test_a_good_life():
    """From spawn to end each step is one line, and the last one sums it up."""
    lines = told(
        *LIFE,
        event("worker.ready", 2, worker="other-1"),
        event("supervisor.stopping", 5, cause="SIGTERM", workers=1, grace_seconds=30.0),
        *STOP,
        own("worker.drained", 6, reports={"main": REPORT}, seconds=1.0),
        own("worker.exited", 6, code=0, uptime_seconds=6.0),
        event("supervisor.stopped", 6, exit_code=0),
    )
    assert lines == [
        "jobs-1 of group jobs, generation 1, 2026-11-24 UTC",
        "18:00:00.000  was spawned, pid 7",
        "18:00:01.000  was ready after 12.3 ms",
        "18:00:05.000  [the supervisor stops: SIGTERM]",
        "18:00:05.000  was told to end (stop), within 30 s",
        "18:00:05.000  acknowledged after 2 ms",
        "18:00:06.000  had nothing in flight any more after 1 s; connections closed: 2",
        "18:00:06.000  its process is gone, with exit code 0, 6 s old",
        "",
        "In short: jobs-1 ended as it was told to (stop), with exit code 0.",
    ]


def test_a_kill_is_explained():
    """Why, the steps before it, its stacks; a leak with the place that took it."""
    lines = told(
        *LIFE,
        *STOP,
        own(
            "worker.killed",
            35,
            why="it did not drain by its deadline: 30 s after cancelled",
            ladder=[["cancelled", 0.0], ["acknowledged", 0.002], ["stacks", 30.0]],
            stacks='Thread 1\n  File "app.py", line 9 in loop\n',
        ),
        own("worker.exited", 35, signal=9, uptime_seconds=35.0, leftovers=["sleep (pid 9)"]),
    )
    text = "\n".join(lines)
    assert "(cancelled at 0 ms, acknowledged at 2 ms, stacks at 30 s)" in text
    assert '                File "app.py", line 9 in loop' in lines
    assert "by SIGKILL, 35 s old; killed what it had left behind: sleep (pid 9)" in text
    assert lines[-1].startswith("In short: jobs-1 was killed, since it did not drain")


def test_a_leak_is_shown_with_its_stack():
    """What a close could not get back is named with where it was taken."""
    text = "\n".join(
        told(*LIFE, own("worker.drained", reports={"main": REPORT | {"leaked": [LEAK]}}))
    )
    assert "1 never given back" in text
    assert "never given back to pool main, held for 9.5 s:" in text
    assert "line 3, in take" in text


def test_code_that_raised():
    """The error is in the conclusion, the traceback above it."""
    lines = told(
        *LIFE,
        own("worker.failed", 3, error="ValueError: no", traceback="Traceback …\nValueError: no\n"),
        own("worker.exited", 3, code=1, uptime_seconds=3.0),
    )
    assert "              ValueError: no" in lines
    assert lines[-1] == "In short: the code of jobs-1 raised ValueError: no."


def test_an_end_from_outside():
    """Nobody told it to end and it said nothing: that is what is said."""
    lines = told(*LIFE, own("worker.exited", 3, signal=11, uptime_seconds=3.0))
    assert lines[-1] == (
        "In short: jobs-1 ended without a word, by SIGSEGV: from outside, or a crash."
    )


def test_who_killed_it_is_said_where_the_kernel_knows():
    """Want of memory is told from a kill by somebody."""
    by = own("worker.exited", 3, signal=9, uptime_seconds=3.0, cause="memory")
    lines = told(*LIFE, by)
    assert "by SIGKILL, 3 s old; cause: memory" in lines[-3]
    assert lines[-1] == "In short: jobs-1 was killed by the kernel for want of memory."
    assert told(*LIFE, by | {"cause": "killed"})[-1] == (
        "In short: jobs-1 was killed by somebody else, by SIGKILL."
    )


def test_a_living_worker():
    """It is there, and since when it is what it is."""
    assert told(*LIFE)[-1] == "In short: jobs-1 is there; since 18:00:01 it is ready."


def test_what_came_before_the_ring_is_not_made_up():
    """A story that begins in the middle says so."""
    assert "what came before has been forgotten" in told(LIFE[1])[0]


def test_an_event_without_a_sentence_is_told_plainly():
    """What a later version adds is not left out."""
    assert "18:00:02.000  worker.blinked: eye left" in told(
        *LIFE, own("worker.blinked", 2, eye="left")
    )
