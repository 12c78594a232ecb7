"""The drivers for asyncio: what they know is the thread drivers', what they do awaits.

Not for MySQL: PyMySQL blocks, and a pool that hides threads behind `await` would promise a cancel
that it cannot keep. `asyncio.to_thread` with a `Pool` is honest there.
"""

from __future__ import annotations

__all__ = ["AsyncDriver", "driver_of", "from_url", "module_of"]

import inspect
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any, ClassVar, TypeAlias

from workers.pool import drivers
from workers.pool.drivers.base import Driver

Connect: TypeAlias = Callable[[], Awaitable[Any]]

# Module of the driver by the kind that `drivers` knows it by, and its class.
_DRIVERS = {
    "postgresql": ("postgresql_aio", "AsyncPostgreSQLDriver"),
    "redis": ("redis_aio", "AsyncRedisDriver"),
    "sqlite": ("sqlite_aio", "AsyncSQLiteDriver"),
}
# The first parts of the modules that a connection's class comes from.
_PACKAGES = {"psycopg": "postgresql", "redis.asyncio": "redis"}


class AsyncDriver:
    """The generic driver: any `async def connect`, of which nothing else is known.

    It rolls back what comes back. A task that was cancelled inside a call of the driver may have
    left anything behind, so a connection that a cancelled task gives back is closed.
    """

    kind: ClassVar[type[Driver]] = Driver
    settles = False
    """After a call that was cancelled the driver knows whether the connection is still good."""

    knows: Driver
    """What it knows without waiting: the answers of the driver for threads."""
    tidy: Callable[[Any], object]
    """Falsy: it is as it was when it was new. Truthy: `reset` it. Does not wait."""
    with_spare: Callable[[Callable[[Any], Awaitable[object]], float], Awaitable[bool]]
    """As `Driver.with_spare`; set by the pool where `knows.spares`."""

    def __init__(self) -> None:
        self.knows = self.kind()
        self.tidy = _can_roll_back

    async def adopt(self, conn: Any) -> None:
        """Look at a new connection, after `setup`: how it is now is how it is lent each time."""

    async def reset(self, conn: Any) -> None:
        """Make it as new. Raises where it cannot."""
        await settle(conn.rollback())

    async def check(self, conn: Any) -> None:
        """Make a round trip. Raises where there is no answer."""
        if _can_roll_back(conn):
            await settle(conn.rollback())

    async def cancel(self, conn: Any, seconds: float) -> None:
        """End the statement that runs; as `Driver.cancel`."""

    async def close(self, conn: Any) -> None:
        """Close it. Nobody else uses it."""
        await settle(conn.close())


def _can_roll_back(conn: Any) -> bool:
    return hasattr(conn, "rollback")


async def settle(outcome: Any) -> Any:
    """Wait for it, where it is something to wait for."""
    return await outcome if inspect.isawaitable(outcome) else outcome


def from_url(url: str, application_name: str | None) -> tuple[Connect, AsyncDriver]:
    """Return what dials and the driver, for a URL; raises what `module_of` raises."""
    dialler: tuple[Connect, AsyncDriver] = module_of(url).from_url(url, application_name)
    return dialler


def module_of(url: str) -> Any:
    """Return the module of the driver for a URL, of which no more than the scheme is read.

    Raises:
        ValueError: there is no such driver for asyncio. The message shows the scheme only.
        MissingDriverError: the driver is not installed.
    """
    kind = drivers.kind_of(url)
    found = _DRIVERS.get(kind)
    if found is None:
        raise ValueError(
            f"{kind} has no driver for asyncio that could be cancelled: use a Pool, and its "
            "connections by asyncio.to_thread; or AsyncPool(connect) with a connect of your own"
        )
    import_module(f"workers.pool.drivers.{kind}")  # it says what is missing
    return import_module(f"workers.pool.drivers.{found[0]}")


def driver_of(thing: object) -> AsyncDriver | None:
    """Return the driver for a connection, or for an error, by the class it is of; None: unknown."""
    for cls in type(thing).__mro__:
        for package, kind in _PACKAGES.items():
            if f"{cls.__module__}.".startswith(f"{package}."):
                module, name = _DRIVERS[kind]
                driver = getattr(import_module(f"workers.pool.drivers.{module}"), name)()
                assert isinstance(driver, AsyncDriver)
                return driver
    return None
