"""The story of one worker, from its spawn to its end, in sentences. Pure: events in, text out."""

from __future__ import annotations

__all__ = ["sentence", "tell"]

import signal
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]

# What happens to all of them while one lives, and explains what becomes of it.
_BACKGROUND = ("supervisor.stopping", "reload.started", "reload.done", "reload.rolled_back")
# Said in the heading, or by the event's own sentence.
_KNOWN = frozenset({"time", "event", "worker", "group", "pid", "generation"})
# Long texts, shown as blocks below their sentence.
_BLOCKS = ("traceback", "stacks", "stack")


def tell(worker: str, events: Iterable[Event]) -> str | None:
    """Return what is known of a worker, or None where no event names it.

    Args:
        worker: its id.
        events: those that there are, oldest first.
    """
    listed = list(events)
    own = [index for index, event in enumerate(listed) if event.get("worker") == worker]
    if not own:
        return None
    first, last = own[0], own[-1]
    lines = [_heading(worker, listed[first])]
    for event in listed[first : last + 1]:
        if event.get("worker") == worker or event["event"] in _BACKGROUND:
            lines += _lines(event)
    lines += ["", _conclusion(worker, [listed[index] for index in own])]
    return "\n".join(lines)


def _heading(worker: str, event: Event) -> str:
    day = event["time"][:10]
    start = "" if event["event"] == "worker.spawned" else "; what came before has been forgotten"
    return f"{worker} of group {event['group']}, generation {event['generation']}, {day} UTC{start}"


def sentence(event: Event) -> str:
    """Return what one event says, without when and whom; in brackets where it is not one's own."""
    return _SENTENCES.get(event["event"], _plain)(event)


def _lines(event: Event) -> Iterable[str]:
    yield f"{event['time'][11:23]}  {sentence(event)}"
    for name in _BLOCKS:
        if event.get(name):
            yield textwrap.indent(str(event[name]).rstrip(), " " * 14)
    for pool, report in (event.get("reports") or {}).items():
        for leak in report["leaked"]:
            yield f"{'':14}never given back to pool {pool}, held for {leak['held_seconds']:.1f} s:"
            yield textwrap.indent(str(leak["stack"]).rstrip(), " " * 16)


def _plain(event: Event) -> str:
    """Say an event that has no sentence of its own."""
    fields = ", ".join(
        f"{name} {value}"
        for name, value in event.items()
        if name not in _KNOWN and name not in _BLOCKS and value not in (None, "", [], {})
    )
    return f"{event['event']}{': ' if fields else ''}{fields}"


def _cancelled(event: Event) -> str:
    return f"was told to end ({event['cause']}), within {_seconds(event['grace_seconds'])}"


def _drained(event: Event) -> str:
    reports = event["reports"].values()
    closed = sum(report["closed"] for report in reports)
    leaked = sum(len(report["leaked"]) for report in reports)
    lost = f", {leaked} never given back" if leaked else ""
    return f"had nothing in flight any more{_after(event)}; connections closed: {closed}{lost}"


def _killed(event: Event) -> str:
    steps = [f"{step} at {_seconds(at)}" for step, at in event.get("ladder", ())]
    ladder = f" ({', '.join(steps)})" if steps else ""
    missing = event.get("stacks_missing", "")
    return f"was killed: {event['why']}{ladder}{'; no stacks: ' if missing else ''}{missing}"


def _exited(event: Event) -> str:
    leftovers = event.get("leftovers") or []
    left = f"; killed what it had left behind: {', '.join(leftovers)}" if leftovers else ""
    cause = f"; cause: {event['cause']}" if event.get("cause") else ""
    old = _seconds(event["uptime_seconds"])
    error = f"; {event['error']}" if left and event.get("error") else ""
    return f"its process is gone, {_end(event)}, {old} old{cause}{left}{error}"


def _end(event: Event) -> str:
    if event.get("signal") is not None:
        return f"by {_signal_name(event['signal'])}"
    return f"with exit code {event['code']}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _after(event: Event) -> str:
    return f" after {_seconds(event['seconds'])}" if "seconds" in event else ""


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if abs(seconds) < 1 else f"{seconds:.3g} s"


def _leaked(event: Event) -> str:
    return (
        f"has lent a connection of pool {event['pool']} to thread {event['thread']} for "
        f"{_seconds(event['held_seconds'])}; it was taken at"
    )


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "supervisor.stopping": lambda e: f"[the supervisor stops: {e['cause']}]",
    "reload.started": lambda e: f"[a reload begins, to generation {e['generation']}]",
    "reload.done": lambda e: f"[the reload is done, generation {e['generation']}]",
    "reload.rolled_back": lambda e: f"[the reload is rolled back: {e.get('error', '')}]",
    "worker.spawned": lambda e: f"was spawned, pid {e['pid']}",
    "worker.not_spawned": lambda e: f"could not be spawned: {e['error']}",
    "worker.ready": lambda e: f"was ready{_after(e)}",
    "worker.stopped": lambda e: f"did not run: {e['why']}",
    "worker.continued": lambda _: "ran again",
    "worker.hung": lambda e: e["why"].removeprefix("it "),
    "worker.cancelled": _cancelled,
    "worker.acknowledged": lambda e: f"acknowledged{_after(e)}",
    "worker.drained": _drained,
    "worker.failed": lambda e: f"its code raised {e['error']}",
    "worker.killed": _killed,
    "worker.exited": _exited,
    "pool.leak": _leaked,
    "group.failed": lambda e: f"[its group has failed: {e['reason']}]",
    "group.probing": lambda e: (
        f"[its group has failed, and it is tried for all, probe {e['probe']}]"
    ),
}


def _conclusion(worker: str, own: list[Event]) -> str:
    """Say in one sentence what became of it, the gravest thing first."""
    by_name = {event["event"]: event for event in own}
    killed, failed = by_name.get("worker.killed"), by_name.get("worker.failed")
    exited, cancelled = by_name.get("worker.exited"), by_name.get("worker.cancelled")
    if killed is not None:
        return f"In short: {worker} was killed, since {killed['why']}."
    if failed is not None:
        return f"In short: the code of {worker} raised {failed['error']}."
    if exited is None:
        return f"In short: {worker} is there; since {own[-1]['time'][11:19]} it {_state(own)}."
    if exited.get("cause") == "memory":
        return f"In short: {worker} was killed by the kernel for want of memory."
    if exited.get("cause") == "killed":
        return f"In short: {worker} was killed by somebody else, {_end(exited)}."
    if cancelled is not None:
        return f"In short: {worker} ended as it was told to ({cancelled['cause']}), {_end(exited)}."
    if "worker.drained" in by_name:
        return f"In short: {worker} ended by itself, {_end(exited)}."
    return f"In short: {worker} ended without a word, {_end(exited)}: from outside, or a crash."


def _state(own: list[Event]) -> str:
    states = {
        "worker.ready": "is ready",
        "worker.cancelled": "is told to end",
        "worker.acknowledged": "drains",
        "worker.drained": "is drained",
    }
    name = own[-1]["event"]
    return states.get(name, f"has had nothing but {name}")
