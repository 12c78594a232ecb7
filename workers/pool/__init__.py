"""A connection pool: fair, observed, and bounded on every way out. A library in its own right.

from workers.pool import Pool
"""

from __future__ import annotations

__all__ = [
    "CloseReport",
    "ConnectError",
    "ForkedPoolError",
    "Histogram",
    "Holder",
    "Leak",
    "MissingDriverError",
    "Pool",
    "PoolClosed",
    "PoolDeadlock",
    "PoolError",
    "PoolEvent",
    "PoolStats",
    "PoolTimeout",
    "Settings",
    "WrongPoolError",
]

from workers.pool.errors import (
    ConnectError,
    ForkedPoolError,
    MissingDriverError,
    PoolClosed,
    PoolDeadlock,
    PoolError,
    PoolTimeout,
    WrongPoolError,
)
from workers.pool.events import PoolEvent
from workers.pool.pool import Pool
from workers.pool.reports import CloseReport, Holder, Leak
from workers.pool.settings import Settings
from workers.pool.stats import Histogram, PoolStats
