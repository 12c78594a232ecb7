"""Jobs that an attempt has been lost with run alone in their worker. Any thread; no I/O.

A job whose worker died is suspected of having killed it, and so is each that was in flight beside
it. Run alone, a good one is done and a bad one takes nobody with it any more: so a job is lost at
most once for what another one does, and a death beside nobody is evidence.

Who takes no suspect because others are in flight must not pass it by for ever: when it is first in
the queue, a worker makes room for a while, now and then, so that in a fleet that is never idle
suspects have their turn and a job that takes hours does not keep its worker from all others.
"""

from __future__ import annotations

__all__ = ["LOOK_EVERY", "MAKE_ROOM_EVERY", "MAKE_ROOM_FOR", "Isolation"]

import threading
from collections.abc import Callable

from workers.context import Context
from workers.jobs.table import Claim

LOOK_EVERY = 1.0  # seconds between two looks whether a suspect is first in the queue
MAKE_ROOM_FOR = 5.0  # seconds in which nothing new is begun, so that what is in flight may end
MAKE_ROOM_EVERY = 60.0  # seconds from the end of such a time to the next, at least


class Isolation:
    """Who of one worker's jobs runs beside whom.

    Args:
        accepting: ends when no new work may be taken; then nobody waits.
    """

    def __init__(self, accepting: Context) -> None:
        self._accepting = accepting
        self._lock = threading.Lock()
        self._in_flight = 0  # these two: only with the lock
        self._suspect: Context | None = None  # ends with the suspect that is in flight
        self._room_until = 0.0  # these two: only by the thread whose turn it is to ask
        self._look_at = 0.0

    @property
    def is_alone(self) -> bool:
        """Whether nothing is in flight: whoever begins now may be a suspect."""
        with self._lock:
            return self._in_flight == 0

    def begin(self, claim: Claim) -> None:
        """Count a job as in flight; a suspect only where `is_alone`, by the same thread."""
        with self._lock:
            self._in_flight += 1
            if claim.losses:
                self._suspect = self._accepting.with_cancel()

    def end(self, claim: Claim) -> None:
        """Count a job as over."""
        with self._lock:
            self._in_flight -= 1
            suspect = self._suspect if claim.losses else None
            if suspect is not None:
                self._suspect = None
        if suspect is not None:
            suspect.cancel("its job is over")

    def wait(self) -> None:
        """Wait until no suspect is in flight, or no new work may be taken."""
        with self._lock:
            suspect = self._suspect
        if suspect is not None:
            suspect.wait()

    def makes_room(self, is_suspect_first: Callable[[], bool], now: float) -> bool:
        """Return whether nothing is to be begun now, so that a suspect can be.

        Args:
            is_suspect_first: looks whether the job that is due for longest is a suspect.
            now: the time.
        """
        if self.is_alone:
            self._room_until = 0.0
            return False
        if now < self._room_until:
            return True
        if now < self._look_at:
            return False
        self._look_at = now + LOOK_EVERY
        if not is_suspect_first():
            return False
        self._room_until = now + MAKE_ROOM_FOR
        self._look_at = self._room_until + MAKE_ROOM_EVERY
        return True
