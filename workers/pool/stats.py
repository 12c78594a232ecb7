"""The figures of a pool: a snapshot in the words of Go's DBStats, and histograms. Pure."""

from __future__ import annotations

__all__ = ["Histogram", "PoolStats"]

from dataclasses import dataclass

# Seconds. Fine where a healthy pool lives (below a millisecond), coarse where it hurts.
BOUNDS = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One moment of a pool. Counters only grow; seconds are sums over all callers."""

    max_open: int
    """The ceiling in force."""
    open: int
    """Physical connections, those being opened and being closed included."""
    in_use: int
    """Lent, or on their way back."""
    idle: int
    waiting: int
    """Callers that wait now."""
    wait_count: int
    """Callers that had to wait."""
    wait_seconds: float
    """How long all of them waited together."""
    max_idle_closed: int
    """Closed because enough were idle already."""
    max_idle_time_closed: int
    max_lifetime_closed: int
    broken_closed: int
    """Closed because they were broken, or not proven to be sound."""
    timeouts: int
    """Acquires that ended in PoolTimeout."""
    leaks: int
    """Loans that were reported as longer than their leak threshold."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often something took how long, in seconds.

    `counts[i]` are those up to and including `bounds[i]` and above the bound before; the last
    one, `counts[len(bounds)]`, are those above every bound.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)
