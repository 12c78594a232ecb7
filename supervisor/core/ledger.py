"""The ledger: what all workers together have counted, those that have ended included.

A worker says what it has counted since its start, as vectors of numbers by key. The total of a key is
what the dead have left behind plus what the living have said last.

Invariant: no number of a total ever goes down, in whatever order workers come, report and end. So a
report that says less than an earlier one counts for what it says more of, and one that comes before
its worker was entered, or after its end, does not count at all.
"""

from __future__ import annotations

__all__ = ["Key", "Ledger", "Vector", "add"]

from collections.abc import Mapping

Key = tuple[str, ...]
Vector = tuple[float, ...]


class Ledger:
    """The books of all counters. Written by its own methods."""

    def __init__(self) -> None:
        self._living: dict[str, dict[Key, Vector]] = {}
        self._dead: dict[Key, Vector] = {}

    def enter(self, worker: str) -> None:
        """Begin a worker's account. Its id is never used again."""
        self._living.setdefault(worker, {})

    def heard(self, worker: str, counted: Mapping[Key, Vector]) -> None:
        """Take what a worker has counted since its start. A key keeps the length of its vectors."""
        account = self._living.get(worker)
        if account is None:
            return
        for key, new in counted.items():
            old = account.get(key)
            account[key] = new if old is None else tuple(map(max, old, new))

    def close(self, worker: str) -> None:
        """End a worker's account; what it had counted stays."""
        for key, counted in self._living.pop(worker, {}).items():
            self._dead[key] = add(self._dead.get(key), counted)

    def totals(self) -> dict[Key, Vector]:
        """Return the totals as they are now."""
        totals = self._dead.copy()
        for account in self._living.values():
            for key, counted in account.items():
                totals[key] = add(totals.get(key), counted)
        return totals


def add(one: Vector | None, other: Vector) -> Vector:
    """Return the sum of two vectors of one length; None stands for zeros."""
    return other if one is None else tuple(a + b for a, b in zip(one, other, strict=True))
