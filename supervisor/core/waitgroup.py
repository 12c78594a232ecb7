"""The cross-process WaitGroup: who is outstanding, counted down exactly once.

`add` comes before the process exists, so no worker can end uncounted. `done` is claimed by an
acknowledgement (drained) or established by the process's end, whichever comes first. The laws are
those of Go's `sync.WaitGroup`; members are named, because an operator asks who, not how many.
"""

from __future__ import annotations

__all__ = ["WaitGroup"]

from supervisor.errors import InvariantError


class WaitGroup:
    """A ledger of members: each is added once, done once, and then may be forgotten."""

    __slots__ = ("_done", "_outstanding")

    def __init__(self) -> None:
        self._outstanding: dict[str, None] = {}  # ordered: reports list members as they came
        # Invariant: no member is in both.
        self._done: set[str] = set()

    def add(self, member: str) -> None:
        """Count a member in, before it can possibly end.

        Raises:
            InvariantError: it is in already.
        """
        if member in self._outstanding or member in self._done:
            raise InvariantError(f"BUG: {member} was added to the WaitGroup twice")
        self._outstanding[member] = None

    def done(self, member: str) -> bool:
        """Count a member down; False when it was down already.

        Raises:
            InvariantError: it was never added, or has been forgotten.
        """
        if member in self._done:
            return False
        if member not in self._outstanding:
            raise InvariantError(f"BUG: {member} is done but was never added")
        del self._outstanding[member]
        self._done.add(member)
        return True

    def forget(self, member: str) -> None:
        """Drop a member that is done, so that the ledger does not grow for ever.

        Raises:
            InvariantError: it is outstanding, or was never added.
        """
        if member not in self._done:
            raise InvariantError(f"BUG: {member} is forgotten before it is done")
        self._done.remove(member)

    @property
    def outstanding(self) -> tuple[str, ...]:
        """Who has not been counted down yet, in the order of `add`."""
        return tuple(self._outstanding)
