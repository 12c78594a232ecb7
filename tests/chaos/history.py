"""What a log must say, however many things went wrong: read as a history, after the fact.

Each check raises AssertionError with a message of its own. Times are taken from what events say of
themselves (monotonic), never from when they were written: the wall clock was set meanwhile.
"""

from __future__ import annotations

__all__ = ["check"]

from collections import Counter
from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]
ROUNDED = 1e-4  # seconds: times of events are rounded to microseconds


def check(events: Iterable[Event], *, grace: float, ready_timeout: float) -> int:
    """Hold every kill of a log against its life; return how many there were.

    Args:
        events: of the log, oldest first, of several supervisors one after the other.
        grace: seconds from a cancel, or a failure, to the deadline.
        ready_timeout: seconds in which a worker must have said hello.
    """
    lives: dict[tuple[str, int], list[Event]] = {}
    for event in events:
        if event["event"].startswith("worker.") and event.get("pid"):
            lives.setdefault((event["worker"], event["pid"]), []).append(event)
    kills = 0
    for life in lives.values():
        _each_end_once(life)
        for event in life:
            if event["event"] == "worker.killed":
                kills += 1
                _explained(event)
                _not_before_its_time(event, life, grace, ready_timeout)
    return kills


def _each_end_once(life: list[Event]) -> None:
    names = Counter(event["event"] for event in life)
    twice = [name for name in ("worker.exited", "worker.killed") if names[name] > 1]
    assert not twice, f"an end came twice: {twice} of {life}"


def _explained(killed: Event) -> None:
    missing = [
        name
        for name, there in {
            "why": killed.get("why"),
            "ladder": killed.get("ladder"),
            "stacks": killed.get("stacks") or killed.get("stacks_missing"),
            "jobs": killed.get("jobs") or killed.get("jobs_missing") or "jobs" in killed,
        }.items()
        if not there
    ]
    assert not missing, f"a kill is not explained, for want of {missing}: {killed}"
    assert killed["ladder"][-1][0] == "SIGKILL", f"a ladder without its last step: {killed}"


def _not_before_its_time(
    killed: Event, life: list[Event], grace: float, ready_timeout: float
) -> None:
    """Hold a kill against the deadline that was set: by the cancel, by a failure, by its start."""
    at = dict(map(tuple, killed["ladder"]))
    dues = [
        at["cancel"] + event["grace_seconds"]
        for event in life
        if event["event"] == "worker.cancelled"
    ]
    dues += [at[step] + grace for step in ("failed", "drained") if step in at]
    if dues:
        due = min(dues)
        assert at["SIGKILL"] >= due - ROUNDED, f"a kill before its time, {due:.3f} s: {killed}"
        return
    lived = [event["uptime_seconds"] for event in life if event["event"] == "worker.exited"]
    assert not lived or lived[0] >= ready_timeout, (
        f"a kill before its time: nobody had told it to end, and {ready_timeout:g} s to start were"
        f" not over: {killed}, {lived}"
    )
