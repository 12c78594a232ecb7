"""Who reads the journal, and how far each has come. Owned by the loop's thread."""

from __future__ import annotations

__all__ = ["Followers"]

from collections.abc import Callable

from supervisor.journal import CAPACITY, Journal
from supervisor.protocol import EventBatch, FetchEvents

BATCH = 500  # events
MAX_READING = 1000  # who may be behind at the end; who left without a word is among them


class Followers:
    """Those who ask for events, and those who wait for more.

    Args:
        journal: what they read.
        send: sends to one client, and tells whether it could.
    """

    def __init__(self, journal: Journal, send: Callable[[bytes, EventBatch], bool]) -> None:
        self._journal = journal
        self._send = send
        self._waiting: dict[bytes, int] = {}  # after which event
        self._reading: dict[bytes, int] = {}  # who has been sent events up to which one

    def asked(self, client: bytes, request: FetchEvents) -> None:
        """Answer one who asks; who follows waits for what comes."""
        if request.follow:
            self._reading.pop(client, None)
            self._waiting[client] = request.after
        else:
            limit = max(1, min(request.limit, BATCH))
            self._send(client, self._journal.after(request.after, limit))

    def feed(self) -> None:
        """Send what has come to those who wait for it."""
        for client, after in list(self._waiting.items()):
            if self._journal.last > after:
                del self._waiting[client]
                batch = self._journal.after(after, BATCH)
                if self._send(client, batch):
                    self._reading[client] = batch.last
        while len(self._reading) > MAX_READING:
            del self._reading[next(iter(self._reading))]

    def close(self) -> None:
        """Send the rest: whoever is still busy with its last batch finds it when it comes back."""
        self._journal.ended = True
        for client, after in (self._reading | self._waiting).items():
            self._send(client, self._journal.after(after, CAPACITY))
