"""All budgets of a supervisor: which worker has a share in which, and what is to be told to whom.

Pure, like all of the core. What a budget decides is the ledger's business.
"""

from __future__ import annotations

__all__ = ["ENDED", "LET_GO", "SETTLE", "Budgets", "Telling"]

from collections.abc import Callable, Iterable, Mapping

from supervisor.core.budget import Ledger, Tell, Terms

# Seconds until a server has surely let go of a killed worker's connections: the kernel closes them
# at once, but a back end notices that only when it has finished what it does, or writes.
SETTLE = 2.0
# Seconds in which another worker has seen to it that it has, where one can.
ENDED = 10.0
# Seconds until it has let go of connections that were closed in order: a good-bye is read at once,
# and the back end that has read it still takes a moment to be gone.
LET_GO = 0.1

Telling = tuple[str, Tell]  # the pool and what is told


class Budgets:
    """The ledgers by pool. Owned by the loop."""

    def __init__(self) -> None:
        self._ledgers: dict[str, Ledger] = {}

    def change(self, terms: Mapping[str, Terms]) -> list[Telling]:
        """Take new numbers; a pool that is not among them has no budget any more."""
        for pool in self._ledgers.keys() - terms.keys():
            del self._ledgers[pool]
        tellings: list[Telling] = []
        for pool, new in terms.items():
            ledger = self._ledgers.get(pool)
            if ledger is None:
                self._ledgers[pool] = Ledger(new)
            elif ledger.terms != new:
                tellings += _of(pool, ledger.change(new))
        return tellings

    def orphaned(self, leases: Mapping[str, int]) -> list[Telling]:
        """Take note of what orphans may have of each pool, see `Ledger.orphaned`."""
        return [
            telling
            for pool, ledger in self._ledgers.items()
            for telling in _of(pool, ledger.orphaned(leases.get(pool, 0)))
        ]

    def bound(self, maxima: Mapping[str, int]) -> list[Telling]:
        """Let each worker have so many connections of these pools at most."""
        return [
            telling
            for pool, maximum in maxima.items()
            if pool in self._ledgers
            for telling in _of(pool, self._ledgers[pool].bound(maximum))
        ]

    def join(self, worker: str, maxima: Mapping[str, int]) -> tuple[dict[str, Tell], list[Telling]]:
        """Give a new worker its first allowances.

        Args:
            worker: who.
            maxima: `max_open` of each of its pools that have a budget.

        Returns:
            Its own by pool, and what others have to be told.
        """
        first: dict[str, Tell] = {}
        others: list[Telling] = []
        for pool, maximum in maxima.items():
            first[pool], *tells = self._ledgers[pool].join(worker, maximum)
            others += _of(pool, tells)
        return first, others

    def heard(
        self, worker: str, pool: str, serial: int, accepted: int, wanted: int
    ) -> list[Telling]:
        """Take a worker's answer or request, see `Ledger.heard`."""
        ledger = self._ledgers.get(pool)
        return [] if ledger is None else _of(pool, ledger.heard(worker, serial, accepted, wanted))

    def leave(self, worker: str, settled_at: float | None) -> list[Telling]:
        """Take back all leases of a worker that has ended, see `Ledger.leave`."""
        return self._each(lambda ledger: ledger.leave(worker, settled_at=settled_at))

    def await_end(self, pool: str, worker: str, until: float) -> bool:
        """Wait longer for what a dead worker had; False where it had nothing of this pool."""
        ledger = self._ledgers.get(pool)
        return ledger is not None and ledger.await_end(worker, until)

    def settled(self, pool: str, worker: str) -> list[Telling]:
        """Take back at once what a dead worker had of a pool: its server has let go."""
        ledger = self._ledgers.get(pool)
        return [] if ledger is None else _of(pool, ledger.settled(worker))

    def helper(self, pool: str) -> list[str]:
        """Return who has connections of a pool, whoever can spare one first."""
        ledger = self._ledgers.get(pool)
        return [] if ledger is None else ledger.by_spare()

    def time_passed(self, now: float) -> list[Telling]:
        """Take back what the dead had, where its time has come."""
        return self._each(lambda ledger: ledger.time_passed(now))

    def next_deadline(self) -> float | None:
        """Return when `time_passed` is wanted, or None."""
        dues = (ledger.next_deadline() for ledger in self._ledgers.values())
        return min((due for due in dues if due is not None), default=None)

    def terms(self) -> dict[str, Terms]:
        """Return the numbers in force by pool."""
        return {pool: ledger.terms for pool, ledger in self._ledgers.items()}

    def granted(self) -> dict[str, int]:
        """Return how many leases are out by pool."""
        return {pool: ledger.granted for pool, ledger in self._ledgers.items()}

    def _each(self, happens: Callable[[Ledger], Iterable[Tell]]) -> list[Telling]:
        return [
            telling
            for pool, ledger in self._ledgers.items()
            for telling in _of(pool, happens(ledger))
        ]


def _of(pool: str, tells: Iterable[Tell]) -> list[Telling]:
    return [(pool, tell) for tell in tells]
