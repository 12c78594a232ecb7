"""Asks the supervisor for `top`, in a thread of its own: a status a second, and the events.

The supervisor is asked once a second at most, whatever happens there: a status that has not been
answered is not asked for again, and events that come in a storm are fetched in batches. Between two
events the supervisor does nothing for a follower.
"""

from __future__ import annotations

__all__ = ["Ended", "Feed", "Heard", "Silent"]

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from supervisor.client import Client
from supervisor.errors import NoSupervisorError, SupervisorError
from supervisor.plain import counted
from supervisor.protocol import EventBatch, FetchEvents, GetStatus

INTERVAL = 1.0  # seconds between two questions of a kind
SILENCE = 3.0  # seconds without an answer that are worth a word
BEFORE = 500  # how many events of the time before are fetched
TURN = 0.2  # seconds in which the end of the user's interest is noticed
_NEWEST = 1 << 62  # a number that no event has: the answer says which is the newest


@dataclass(frozen=True, slots=True)
class Heard:
    """A status, or None, and the events since the last time."""

    status: dict[str, Any] | None
    events: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Silent:
    """The supervisor lives and has not answered for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing more will come: one sentence why, and the exit code that goes with it."""

    why: str
    exit_code: int


class Feed:
    """Tells `told`, in its own thread, what it hears.

    Args:
        client: an open one; it is closed by this.
        told: called with `Heard`, `Silent`, and at last once with `Ended`, unless stopped.
    """

    def __init__(self, client: Client, told: Callable[[Heard | Silent | Ended], object]) -> None:
        self._client = client
        self._told = told
        self._stop = threading.Event()
        # A daemon: nobody who leaves waits for an answer.
        self._thread = threading.Thread(target=self._run, name="top-feed", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End soon; wait for that a moment. Any thread but its own may call."""
        self._stop.set()
        self._thread.join(2 * TURN)

    def _run(self) -> None:
        with self._client as client:
            follower = _Follower(client, self._told)
            while not self._stop.is_set():
                try:
                    follower.turn()
                except NoSupervisorError as exc:
                    self._told(follower.ended or Ended(str(exc), exc.exit_code))
                    return
                except SupervisorError as exc:  # an answer of another version
                    self._told(Ended(str(exc), exc.exit_code))
                    return


class _Follower:
    """What has been asked for, and when the next question is due. Of the feed's thread."""

    def __init__(self, client: Client, told: Callable[[Heard | Silent | Ended], object]) -> None:
        self._client = client
        self._told = told
        self._after: int | None = None  # None: the newest number has been asked for
        self._status_asked: float | None = None
        self._status_due = 0.0
        self._events_due: float | None = None  # None: they have been asked for
        self._is_stopping = False
        self.ended: Ended | None = None
        client.send(FetchEvents(_NEWEST))

    def turn(self) -> None:
        """Ask what is due, and take what comes within a moment."""
        now = time.monotonic()
        if self._status_asked is None and now >= self._status_due:
            self._client.send(GetStatus())
            self._status_asked = now
            self._status_due = now + INTERVAL
        if self._events_due is not None and now >= self._events_due:
            self._client.send(FetchEvents(self._after or 0, follow=True))
            self._events_due = None
        answer = self._client.receive(TURN)
        now = time.monotonic()
        if isinstance(answer, EventBatch):
            self._take(answer, now)
        elif answer is not None:
            self._status_asked = None
            self._told(Heard(answer.data, []))
        elif self._status_asked is not None and now - self._status_asked > SILENCE:
            self._told(Silent(now - self._status_asked))

    def _take(self, batch: EventBatch, now: float) -> None:
        if self._after is None:
            self._after = max(0, batch.last - BEFORE)
            self._events_due = now
            return
        if batch.last <= self._after and not batch.ended:
            return
        self._after = batch.last
        if batch.events:
            self._told(Heard(None, batch.events))
        for event in batch.events:
            if event["event"] == "supervisor.stopping":
                self._is_stopping = True
            elif event["event"] == "supervisor.stopped":
                self.ended = Ended(_farewell(self._client.pid, event), 0)
        # In a stop the next ones are wanted at once: they are few, and the last.
        self._events_due = now if self._is_stopping else now + INTERVAL


def _farewell(pid: int, event: dict[str, Any]) -> str:
    killed = f", killed: {', '.join(event['killed'])}" if event["killed"] else ""
    return (
        f"the supervisor (pid {pid}) has stopped: {counted(event['workers'], 'worker')}, "
        f"{event['drained']} drained{killed}; exit code {event['exit_code']}"
    )
