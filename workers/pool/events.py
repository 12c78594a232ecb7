"""What a pool tells its listener: the events of MongoDB's CMAP specification, in its words."""

from __future__ import annotations

__all__ = ["Listener", "PoolEvent"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from workers.pool.reports import Leak


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """One event. Fields that it does not have are None.

    Names: PoolCreated, PoolReady, PoolCleared, PoolClosed, ConnectionCreated, ConnectionReady,
    ConnectionClosed (reason: stale, idle, error, poolClosed), ConnectionCheckOutStarted,
    ConnectionCheckOutFailed (reason: timeout, connectionError, poolClosed, cancelled),
    ConnectionCheckedOut, ConnectionCheckedIn; and our own: ConnectionLeaked (with `leak`) and
    CheckOutNested (a thread waits for a second connection of the pool; told once per pool).
    """

    name: str
    pool: str
    connection: int | None = None
    reason: str | None = None
    seconds: float | None = None
    """How long it took: a dial (ConnectionReady), a check-out."""
    error: BaseException | None = None
    leak: Leak | None = None


# Called without any lock, in the thread that it happened in. It must be quick; what it raises is
# written to the log and otherwise ignored.
Listener: TypeAlias = Callable[[PoolEvent], object]
