"""The journal: the last life-cycle events, numbered, for whoever follows.

Followers pull. A slow one costs nothing but its place: when the ring has gone on without it, the
numbers tell how many events it has missed.
"""

from __future__ import annotations

__all__ = ["Journal"]

from collections import deque
from itertools import islice
from typing import Any

from supervisor.protocol import EventBatch

CAPACITY = 10_000
# A traceback may be large, and a worker that fails all day long must not fill the memory with them.
MAX_SIZE = 1 << 26  # characters of all events


class Journal:
    """A ring of events. Numbers start at 1 and are never used again."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._ring: deque[dict[str, Any]] = deque()
        self._sizes: deque[int] = deque()
        self._size = 0
        self._capacity = capacity
        self._last = 0
        self.ended = False  # the last event of all, supervisor.stopped, is in

    def append(self, event: dict[str, Any]) -> None:
        """Add one event, already complete with its time."""
        self._ring.append(event)
        self._sizes.append(len(repr(event)))
        self._size += self._sizes[-1]
        self._last += 1
        while len(self._ring) > self._capacity or self._size > MAX_SIZE:
            self._ring.popleft()
            self._size -= self._sizes.popleft()

    @property
    def last(self) -> int:
        """The number of the newest event, 0 when there is none."""
        return self._last

    def names(self, worker: str) -> bool:
        """Return whether an event that is still there is about this worker."""
        return any(event.get("worker") == worker for event in self._ring)

    def newest(self, most: int) -> list[dict[str, Any]]:
        """Return the last events, at most so many, oldest first."""
        return list(islice(reversed(self._ring), most))[::-1]

    def after(self, number: int, limit: int) -> EventBatch:
        """Return at most `limit` events that came after event `number`, oldest first."""
        number = max(0, min(number, self._last))
        oldest = self._last - len(self._ring)  # the number before the oldest one that is left
        missed = max(0, oldest - number)
        start = max(number, oldest) - oldest
        events = list(islice(self._ring, start, start + limit))
        last = oldest + start + len(events)
        return EventBatch(
            events=events, last=last, missed=missed, ended=self.ended and last == self._last
        )
