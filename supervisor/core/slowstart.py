"""Slow start: many wait for one thing, one of them tries for all, and the rest follow in a ramp.

Theory of operation. A gate stands before every place that is to be restarted after the same trouble:
one for each pool that cannot connect, over all groups, and one for each group whose start fails.

    SHUT      after a failure, for the back-off; nobody is let through
    PROBING   one worker is let through, and nobody else until it has proved itself or ended
    RAMPING   whoever proves itself makes room for one more: 1, 2, 4, 8 ... at the same time

A worker has proved itself when it has been ready for `min_ready_time` without saying in that time that
its pool cannot connect: one may be ready before it has looked at its database. One that is let
through and fails shuts the gate, for twice as long as before; so does whoever fails when the
thing had worked. Those that the first failure finds on their way fail as well, and that is no news.

The back-off is short again after a whole window in which the thing has worked. To wait is not to
work, so that an outage of an hour ends with tries as far apart as the policy allows.

Invariants: never more are on their way than `room`, which is 1 from a failure to the next proof; nobody
passes before `opens_at`; who is on its way lives.
"""

from __future__ import annotations

__all__ = ["Gate", "Gates"]

from collections.abc import Callable

from supervisor.core.causes import Cause, first_backoff
from supervisor.core.policy import RestartPolicy, backoff_delay

_NEVER = float("inf")


class Gate:
    """What those pass one by one who wait for the same thing. Written by Group and Fleet.

    Args:
        cause: whose back-off it keeps.
        draw: uniform numbers from 0 to 1, for jitter.
        counts_all: every failure counts, also of those who were on their way before the first.
    """

    def __init__(self, cause: Cause, draw: Callable[[], float], *, counts_all: bool) -> None:
        self._cause = cause
        self._draw = draw
        self._counts_all = counts_all
        self.opens_at = -_NEVER
        self.room = 1  # how many may be on their way at the same time
        self._failures = 0  # the exponent of the next back-off
        self.works_since = -_NEVER  # +inf: it has not worked since the last failure
        self._proofs: dict[str, float] = {}  # who is on its way -> when it will have proved itself

    @property
    def due(self) -> float:
        """When the next one may pass, +inf while that depends on those who are on their way."""
        return self.opens_at if len(self._proofs) < self.room else _NEVER

    @property
    def on_their_way(self) -> frozenset[str]:
        """Who was let through, and has neither proved itself nor ended."""
        return frozenset(self._proofs)

    def proof_due(self, worker: str) -> float:
        """Return when this worker will have proved itself, +inf when that cannot be told."""
        return self._proofs.get(worker, _NEVER)

    def enter(self, worker: str) -> None:
        """Let one through: the caller has seen that `due` is not later than now."""
        self._proofs[worker] = _NEVER

    def observe(self, worker: str, proof_due: float) -> None:
        """Settle when it will have proved itself: +inf takes that back."""
        if worker in self._proofs:
            self._proofs[worker] = proof_due

    def prove(self, worker: str, now: float) -> None:
        """Take it that what is waited for works: one has proved that, and one more may try."""
        del self._proofs[worker]
        self.room += 1
        self.works_since = min(self.works_since, now)

    def leave(self, worker: str) -> None:
        """Forget one that has ended for another reason, or is not wanted any more."""
        self._proofs.pop(worker, None)

    def fail(self, worker: str, rules: RestartPolicy, now: float) -> None:
        """Shut it: this worker has ended because what is waited for does not work."""
        was_let_through = worker in self._proofs
        self.leave(worker)
        if self.works_since < _NEVER:
            if now - self.works_since >= rules.window:
                self._failures = 0
        elif not (was_let_through or self._counts_all):
            return
        self.works_since = _NEVER
        self.room = 1
        delay = backoff_delay(
            rules, self._failures, self._draw, first_backoff(self._cause, rules.backoff)
        )
        self.opens_at = now + delay
        self._failures += 1


class Gates:
    """All gates of a fleet.

    Args:
        draw: uniform numbers from 0 to 1, for jitter.
    """

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw
        self._by_pool: dict[str, Gate] = {}

    def of_pool(self, pool: str) -> Gate:
        """Return the gate that is shared by all who use this pool, of whatever group."""
        gate = self._by_pool.get(pool)
        if gate is None:
            gate = self._by_pool[pool] = Gate(Cause.DEPENDENCY, self.draw, counts_all=False)
        return gate

    def of_a_start(self) -> Gate:
        """Return a new gate for a group whose start fails."""
        return Gate(Cause.STARTUP, self.draw, counts_all=True)
