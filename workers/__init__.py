"""What user code touches: contexts, wait groups, pools, and the worker that it is handed.

Everything here but `Worker` is a library in its own right, and works without a supervisor. Names
are imported when they are first used, so that each costs only who uses it.
"""

from __future__ import annotations

__all__ = [
    "AsyncPool",
    "Cancelled",
    "CloseReport",
    "Context",
    "DeadlineExceeded",
    "ForkedPoolError",
    "Job",
    "Leak",
    "Pool",
    "PoolClosed",
    "PoolError",
    "PoolStats",
    "PoolTimeout",
    "WaitGroup",
    "Worker",
]

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.context import Cancelled, Context, DeadlineExceeded
    from workers.pool import (
        CloseReport,
        ForkedPoolError,
        Leak,
        Pool,
        PoolClosed,
        PoolError,
        PoolStats,
        PoolTimeout,
    )
    from workers.pool.aio import AsyncPool
    from workers.waitgroup import WaitGroup
    from workers.worker import Job, Worker

_HOMES = {
    "workers.pool.aio": ("AsyncPool",),
    "workers.context": ("Cancelled", "Context", "DeadlineExceeded"),
    "workers.waitgroup": ("WaitGroup",),
    "workers.worker": ("Job", "Worker"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "workers.pool")
    value = globals()[name] = getattr(import_module(home), name)
    return value
