"""What a pool tells people: who holds what, and how its close went. Frozen, and only text."""

from __future__ import annotations

__all__ = ["CloseReport", "Holder", "Leak"]

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holder:
    """One loan that is out now."""

    connection: int
    """The pool's own number of the connection; never used twice."""
    held_seconds: float
    thread: str
    """The borrowing thread's name, or its number where it has ended."""
    stack: str
    """Where it was borrowed: the frames nearest to the pool, as a traceback prints them."""
    now: str
    """Where that thread is now, or "" where it has ended."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A loan that was longer than its threshold, or was not given back before a close's end."""

    connection: int
    held_seconds: float
    thread: str
    stack: str
    now: str
    outcome: str
    """What was done to it, in words."""


@dataclass(frozen=True, slots=True)
class CloseReport:
    """How a close went."""

    closed: int
    """Connections physically closed by it, those that came back late included."""
    waited: int
    """How many of them were lent, and had to be waited for."""
    leaked: list[Leak]
    """What was still lent at the deadline."""
