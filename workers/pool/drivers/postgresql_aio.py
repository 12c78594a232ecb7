"""PostgreSQL for asyncio, by psycopg's AsyncConnection.

A task that is cancelled in a query is psycopg's own business: it has the server end the query and
waits for that. The pool then only looks whether it has worked.
"""

from __future__ import annotations

__all__ = ["AsyncPostgreSQLDriver", "end_sessions", "from_url"]

import asyncio
from time import monotonic
from typing import Any

from workers.pool.drivers.aio import AsyncDriver, Connect
from workers.pool.drivers.postgresql import (
    END_SESSIONS,
    IDLE,
    SESSIONS_PAUSE,
    PostgreSQLDriver,
    read_options,
)

_ASYNC_SETTINGS = ("autocommit", "isolation_level", "read_only", "deferrable")
_PLAIN_SETTINGS = ("row_factory", "cursor_factory", "prepare_threshold")


class AsyncPostgreSQLDriver(AsyncDriver):
    """psycopg 3's AsyncConnection: cancel on the server, cut at the socket, safe after a fork."""

    kind = PostgreSQLDriver
    settles = True
    knows: PostgreSQLDriver

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {}
        self.tidy = self.knows.tidy

    async def adopt(self, conn: Any) -> None:
        """Remember its settings, and which socket it is."""
        self._settings = {name: getattr(conn, name) for name in _ASYNC_SETTINGS + _PLAIN_SETTINGS}
        self.knows.adopt(conn)
        self.tidy = self.knows.tidy

    async def reset(self, conn: Any) -> None:
        """Roll back, and take back the settings of psycopg's that a borrower may change.

        Raises:
            psycopg.Error: it is broken, or in the middle of something that has no clean end.
        """
        self.knows.refuse_unfinished(conn)
        if conn.pgconn.transaction_status != IDLE:
            await conn.rollback()
        for name in _ASYNC_SETTINGS:
            if getattr(conn, name) != self._settings[name]:
                await getattr(conn, f"set_{name}")(self._settings[name])
        for name in _PLAIN_SETTINGS:
            if getattr(conn, name) != self._settings[name]:
                setattr(conn, name, self._settings[name])
        self.knows.refuse_dirty(conn)

    async def check(self, conn: Any) -> None:
        """Make the round trip of an empty query."""
        was_autocommit = conn.autocommit
        if not was_autocommit:
            await conn.set_autocommit(True)
        try:
            await conn.execute("")
        finally:
            if not was_autocommit and not conn.closed:
                await conn.set_autocommit(False)

    async def cancel(self, conn: Any, seconds: float) -> None:
        """Send a cancel request, and wait until the server has taken it."""
        await conn.cancel_safe(timeout=seconds)

    async def close(self, conn: Any) -> None:
        """Say good-bye and close."""
        self.knows.forget(conn)
        await conn.close()


async def end_sessions(conn: Any, application_name: str, seconds: float) -> None:
    """End all other sessions of this role that have this name, as for threads."""
    due = monotonic() + seconds
    while True:
        cursor = await conn.execute(END_SESSIONS, (application_name,))
        (left,) = await cursor.fetchone()
        await conn.rollback()  # within one transaction the server shows the same sessions again
        if not left:
            return
        if monotonic() >= due:
            raise TimeoutError(f"{left} sessions have not ended within {seconds:g} s")
        await asyncio.sleep(SESSIONS_PAUSE)


def from_url(url: str, application_name: str | None) -> tuple[Connect, AsyncDriver]:
    """Read a libpq URL, as the driver for threads does."""
    options = read_options(url, application_name)

    async def connect() -> Any:
        import psycopg

        return await psycopg.AsyncConnection.connect(**options)

    return connect, AsyncPostgreSQLDriver()
