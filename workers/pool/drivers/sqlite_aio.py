"""SQLite for asyncio, by aiosqlite: one thread for each connection, which does one thing after another.

SQLite blocks, and a thread cannot be cancelled; but a statement can be interrupted from outside,
and that is what makes this honest. A task that is cancelled while it waits for the thread leaves
something running there: it is interrupted, and whoever has the connection next waits for its end.
"""

from __future__ import annotations

__all__ = ["AsyncSQLiteDriver", "Connection", "from_url"]

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

from workers.pool.drivers import sqlite
from workers.pool.drivers.aio import AsyncDriver, Connect
from workers.pool.errors import MissingDriverError
from workers.pool.protocols import ContextLike

try:
    import aiosqlite
except ImportError as exc:
    raise MissingDriverError(
        'SQLite in asyncio needs aiosqlite, which is not installed: pip install "ackvisor[sqlite]"'
    ) from exc

CHUNK = 64  # rows that `async for` fetches at a time; aiosqlite's own default


class Connection(aiosqlite.Connection):
    """aiosqlite's own, which knows whether its thread has something in hand."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        super().__init__(connect, CHUNK)
        self._thread.daemon = True  # one that is never given back keeps no program from ending
        self._asked = 0  # by the event loop
        self._answered = 0  # by the thread
        self.stopped: asyncio.Future[Any] | None = None  # done with the last word of the thread

    def stop(self) -> asyncio.Future[Any] | None:
        """As aiosqlite's."""
        self.stopped = super().stop()
        return self.stopped

    @property
    def is_busy(self) -> bool:
        """Whether its thread has something in hand, be it that nobody waits for it any more."""
        return self._asked != self._answered

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._running and self._connection is not None:  # else it is refused
            self._asked += 1
        try:
            return await super()._execute(self._answer, fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        except asyncio.CancelledError:
            self.interrupt_now()  # nobody waits for it any more
            raise

    def _answer(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do it: the thread."""
        try:
            return fn(*args, **kwargs)
        finally:
            self._answered += 1

    def interrupt_now(self) -> None:
        """End the statement that runs, if one does."""
        with suppress(ValueError):  # it is closed
            self._conn.interrupt()

    async def settle(self) -> None:
        """Wait until the thread has done everything that it was given."""
        await self._execute(_nothing)


class _Knows(sqlite.SQLiteDriver):
    """What can be known without waiting. Nothing of what it asks for takes the thread's turn."""

    def _differs(self, conn: Any) -> bool:
        return conn.is_busy or super()._differs(conn)

    def is_busy(self, conn: Any) -> bool:
        """Whether its thread has something in hand."""
        return bool(conn.is_busy)

    def bind(self, conn: Any, ctx: ContextLike | None) -> None:
        """Have its waits for another's lock end with the context."""
        with suppress(ValueError):  # its borrower has closed it
            super().bind(conn._conn, ctx)  # noqa: SLF001 (aiosqlite has no other name for it)

    def is_broken(self, conn: Any) -> bool:
        """Whether its borrower has closed it."""
        try:
            return super().is_broken(conn)
        except ValueError:
            return True


class AsyncSQLiteDriver(AsyncDriver):
    """SQLite through a thread: interrupted within milliseconds, and never closed in mid-call."""

    kind = _Knows
    settles = True
    knows: _Knows

    def __init__(self) -> None:
        super().__init__()
        self.tidy = self.knows.tidy

    async def adopt(self, conn: Any) -> None:
        """Remember the settings that a borrower may change."""
        self.knows.adopt(conn)

    async def reset(self, conn: Any) -> None:
        """Wait for what still runs; roll back, and take back changed settings."""
        await conn.settle()
        await conn._execute(self.knows.reset, conn._conn)  # noqa: SLF001

    async def check(self, conn: Any) -> None:
        """Ask its thread."""
        await conn.settle()

    async def cancel(self, conn: Any, seconds: float) -> None:  # noqa: ARG002 (it does not wait)
        """Interrupt. Harmless where nothing runs. It does not reach into a wait for a lock."""
        conn.interrupt_now()

    async def close(self, conn: Any) -> None:
        """Close it, after what it was told before."""
        conn.interrupt_now()
        await conn.close()


def _nothing() -> None:
    """Be something for a thread to do."""


def from_url(url: str, application_name: str | None) -> tuple[Connect, AsyncDriver]:
    """Read a SQLite URL, as the driver for threads does."""
    connect, _ = sqlite.from_url(url, application_name)

    async def dial() -> Any:
        conn = Connection(partial(connect, inf))
        try:
            return await conn
        except BaseException:
            if conn.stopped is not None:  # or its thread would speak to a loop that may be closed
                await conn.stopped
            raise

    return dial, AsyncSQLiteDriver()
