"""What `--wait` shows: a roll followed by its events to its end."""

from __future__ import annotations

__all__ = ["follow", "is_end"]

from typing import Any, TextIO

from supervisor.client import Client
from supervisor.core.roll import Progress
from supervisor.core.underway import rolled
from supervisor.errors import SupervisorError
from supervisor.protocol import Accepted, FetchEvents, GetStatus

_DONE = {
    "reload": "reload.done",
    "restart": "restart.done",
    "scale": "scale.done",
}
_FAILED = {
    "reload": ("reload.rolled_back", "reload.rejected", "reload.superseded"),
    "restart": ("restart.failed",),
    "scale": ("scale.failed",),
}


def follow(client: Client, kind: str, accepted: Accepted, terminal: TextIO) -> str:
    """Wait for the end of a roll; return what to say of it.

    Args:
        client: of the supervisor that has accepted it.
        kind: "reload", "restart" or "scale".
        accepted: the supervisor's answer.
        terminal: where progress is shown, if it is one.

    Raises:
        SupervisorError: it was rolled back, superseded, or ended by a stop.
    """
    after = accepted.after
    shows = terminal.isatty()
    while True:
        batch = client.ask(FetchEvents(after, follow=True), None)
        after = batch.last
        for event in batch.events:
            if is_end(event, kind, accepted):
                if shows:
                    terminal.write("\r\x1b[K")
                return _conclusion(event, kind)
        if shows:
            terminal.write(f"\r\x1b[K{_progress(client.ask(GetStatus()).data)}")
            terminal.flush()


def is_end(event: dict[str, Any], kind: str, accepted: Accepted) -> bool:
    """Return whether this event is the end of what was accepted, and not of another one like it."""
    name = event["event"]
    if name == "supervisor.stopping":
        return True
    if kind != "reload":
        return name in (_DONE[kind], *_FAILED[kind]) and event.get("request") == accepted.request
    if accepted.is_live:
        return name == "reload.done" and "applied" in event
    numbers = (event.get("generation"), event.get("failed_generation"))
    return name in (_DONE[kind], *_FAILED[kind]) and accepted.generation in numbers


def _conclusion(event: dict[str, Any], kind: str) -> str:
    name = event["event"]
    if name == "supervisor.stopping":
        raise SupervisorError(f"the {kind} was ended by a stop ({event['cause']})")
    if name == _DONE[kind]:
        if event.get("failed"):
            raise SupervisorError("\n".join(event["failed"]))
        generation = f", generation {event['generation']}" if kind == "reload" else ""
        applied = event.get("applied")
        live = f": nobody replaced, applied {', '.join(applied)}" if applied else ""
        return f"{kind} done{generation}{live}"
    if name == "reload.superseded":
        raise SupervisorError("the reload was superseded by a later one")
    # Where no worker is to blame, as when a reload has superseded it, none is named.
    said = [name.replace(".", " ").replace("_", " "), event.get("worker"), event.get("error")]
    reason = ": ".join(filter(None, said))
    raise SupervisorError(f"{reason}\n{event.get('traceback', '')}".rstrip())


def _progress(status: dict[str, Any]) -> str:
    roll = status["roll"]
    if roll is None:
        return status["state"]  # type: ignore[no-any-return]
    return rolled(Progress(**roll))
