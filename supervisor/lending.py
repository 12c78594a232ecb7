"""What the workers are told of the budgets, over the control socket; the ledgers decide.

A worker is there to be told from its hello on: what comes up before is told then.
"""

from __future__ import annotations

__all__ = ["Lending"]

import time
from collections.abc import Callable, Iterable, Mapping

from supervisor import protocol
from supervisor.core.budget import Tell, Terms
from supervisor.core.budgets import ENDED, LET_GO, SETTLE, Budgets, Telling


class Lending:
    """The budgets, and who has been told what.

    Args:
        send: puts a message on a worker's way.
    """

    def __init__(
        self, send: Callable[[str, protocol.Allowance | protocol.EndSessions], object]
    ) -> None:
        self._send = send
        self._budgets = Budgets()
        # What could not be told yet, by worker; None: it is there to be told.
        self._untold: dict[str, list[Telling] | None] = {}
        self._have_closed: set[str] = set()
        # By worker: its application name, and the pools whose servers can end sessions by it.
        self._names: dict[str, tuple[str, frozenset[str]]] = {}
        # Pool and name -> the worker that was killed, and until when an answer counts.
        self._ending: dict[tuple[str, str], tuple[str, float]] = {}

    def change(self, terms: dict[str, Terms]) -> None:
        """Have each budget do for these terms from now on."""
        self._tell(self._budgets.change(terms))

    def orphaned(self, leases: Mapping[str, int]) -> None:
        """Do without what orphans of an earlier supervisor may have, by pool."""
        self._tell(self._budgets.orphaned(leases))

    def bound(self, maxima: Mapping[str, int]) -> None:
        """Let each worker have so many connections of these pools at most."""
        self._tell(self._budgets.bound(maxima))

    def join(
        self, worker: str, wanted: dict[str, int], name: str, terminable: frozenset[str]
    ) -> Mapping[str, Tell]:
        """Take a new worker into the ledgers; return its first allowances, by pool.

        Args:
            worker: who.
            wanted: `max_open` of each of its pools that have a budget.
            name: the application name of its connections.
            terminable: those of its pools whose servers can end sessions by that.
        """
        self._untold[worker] = []
        self._names[worker] = (name, terminable)
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
        if was_born and worker not in self._have_closed:
            self._end_sessions(worker)

    def _end_sessions(self, worker: str) -> None:
        """Have somebody else end at the server what a killed worker has left there.

        A query goes on there when its client has gone. A sibling's connection is inside the budget,
        and has the right to end sessions of its own role; nobody else has to be given the password.
        """
        now = time.monotonic()
        self._ending = {key: value for key, value in self._ending.items() if value[1] > now}
        name, pools = self._names.get(worker, ("", frozenset()))
        for pool in pools:
            helper = next((w for w in self._budgets.helper(pool) if self._is_there(w)), None)
            if helper and self._budgets.await_end(pool, worker, now + ENDED):
                self._ending[pool, name] = (worker, now + ENDED)
                self._send(helper, protocol.EndSessions(pool, name))

    def _is_there(self, worker: str) -> bool:
        return self._untold.get(worker, []) is None

    def sessions_ended(self, message: protocol.SessionsEnded) -> None:
        """The server has let go of what a killed worker had."""
        found = self._ending.pop((message.pool, message.application_name), None)
        if found is not None:
            self._tell(self._budgets.settled(message.pool, found[0]))

    def forget(self, worker: str) -> None:
        """A worker has ended: nothing more is told to it."""
        self._untold.pop(worker, None)
        self._have_closed.discard(worker)
        self._names.pop(worker, None)

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
