"""What the workers are told of the budgets, over the control socket; the ledgers decide.

A worker is there to be told from its hello on: what comes up before is told then.
"""

from __future__ import annotations

__all__ = ["Lending"]

import time
from collections.abc import Callable, Iterable, Mapping

from supervisor import protocol
from supervisor.core.budget import Tell, Terms
from supervisor.core.budgets import LET_GO, SETTLE, Budgets, Telling


class Lending:
    """The budgets, and who has been told what.

    Args:
        send: puts a message on a worker's way.
    """

    def __init__(self, send: Callable[[str, protocol.Allowance], object]) -> None:
        self._send = send
        self._budgets = Budgets()
        # What could not be told yet, by worker; None: it is there to be told.
        self._untold: dict[str, list[Telling] | None] = {}
        self._have_closed: set[str] = set()

    def change(self, terms: dict[str, Terms]) -> None:
        """Have each budget do for these terms from now on."""
        self._tell(self._budgets.change(terms))

    def orphaned(self, leases: Mapping[str, int]) -> None:
        """Do without what orphans of an earlier supervisor may have, by pool."""
        self._tell(self._budgets.orphaned(leases))

    def bound(self, maxima: Mapping[str, int]) -> None:
        """Let each worker have so many connections of these pools at most."""
        self._tell(self._budgets.bound(maxima))

    def join(self, worker: str, wanted: dict[str, int]) -> Mapping[str, Tell]:
        """Take a new worker into the ledgers; return its first allowances, by pool."""
        self._untold[worker] = []
        first, others = self._budgets.join(worker, wanted)
        self._tell(others)
        return first

    def registered(self, worker: str) -> None:
        """Tell a worker what it could not be told before its hello."""
        untold = self._untold.get(worker)
        if untold is not None:
            self._untold[worker] = None
            self._tell(untold)

    def heard(self, worker: str, usage: protocol.Usage) -> None:
        """Take what a worker says of an allowance."""
        self._tell(
            self._budgets.heard(worker, usage.pool, usage.serial, usage.accepted, usage.wanted)
        )

    def closed_all(self, worker: str) -> None:
        """A worker says that all of its connections are closed."""
        self._have_closed.add(worker)

    def leave(self, worker: str, *, was_born: bool) -> None:
        """Take back what a worker had; the server may take a while to let go of it."""
        settled_at = None
        if was_born:
            has_closed = worker in self._have_closed
            settled_at = time.monotonic() + (LET_GO if has_closed else SETTLE)
        self._tell(self._budgets.leave(worker, settled_at))

    def forget(self, worker: str) -> None:
        """A worker has ended: nothing more is told to it."""
        self._untold.pop(worker, None)
        self._have_closed.discard(worker)

    def time_passed(self, now: float) -> None:
        """Act on what is due."""
        self._tell(self._budgets.time_passed(now))

    def next_deadline(self) -> float | None:
        """Return the moment by which `time_passed` is wanted."""
        return self._budgets.next_deadline()

    def terms(self) -> Mapping[str, Terms]:
        """Return the terms in force, by pool."""
        return self._budgets.terms()

    def granted(self) -> Mapping[str, int]:
        """Return how many connections the workers may have, by pool."""
        return self._budgets.granted()

    def _tell(self, tellings: Iterable[Telling]) -> None:
        for pool, tell in tellings:
            untold = self._untold[tell.worker]
            if untold is None:
                self._send(
                    tell.worker,
                    protocol.Allowance(pool, tell.allowance, tell.serial, tell.unused_only),
                )
            else:
                untold.append((pool, tell))
