"""psycopg_pool's names on this pool, for code that was written for those.

    from workers.pool.psycopg_pool import ConnectionPool

    pool = ConnectionPool(Pool.from_url("postgresql://app@/orders", min=4, max_open=10))
    with pool.connection() as conn:
        conn.execute("insert into t values (1)")  # committed when the block ends well

The names mean what they mean there. How the pool is made, its errors and its promises are ours:
`PoolTimeout` and `PoolClosed` are those of `workers.pool`.
"""

from __future__ import annotations

__all__ = ["ConnectionPool", "PoolClosed", "PoolTimeout"]

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from workers.pool.errors import ConnectError, PoolClosed, PoolTimeout
from workers.pool.pool import Pool
from workers.pool.reports import CloseReport

# Seconds; psycopg_pool's own defaults.
WAIT_TIMEOUT = 30.0
CLOSE_TIMEOUT = 5.0


class ConnectionPool:
    """A `Pool` that answers to psycopg_pool's names."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        """The pool itself."""

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.pool.name

    @contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[Any]:
        """Borrow a connection for a block; commit when it ends well, else roll back.

        Args:
            timeout: Seconds to wait at most; default the pool's `acquire_timeout`.

        Raises what `Pool.get` raises.
        """
        with self.pool.acquire(timeout=timeout) as conn:
            yield conn
            if not getattr(conn, "closed", False):
                conn.commit()

    def getconn(self, timeout: float | None = None) -> Any:
        """Borrow a connection; `putconn` gives it back. Raises what `Pool.get` raises."""
        return self.pool.get(timeout=timeout)

    def putconn(self, conn: Any) -> None:
        """Give a connection back. What is open is rolled back, what is broken closed.

        Raises:
            ValueError: it is not lent by this pool.
        """
        self.pool.put(conn)

    def wait(self, timeout: float = WAIT_TIMEOUT) -> None:
        """Wait until the pool has its minimum of connections.

        Raises:
            PoolTimeout: it had not within *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        least = self.pool._state.settings.min  # noqa: SLF001
        while (stats := self.pool.stats()).idle + stats.in_use < least:
            if time.monotonic() >= deadline:
                raise PoolTimeout(
                    f"pool {self.name!r} has {stats.idle + stats.in_use} of {least} connections "
                    f"after {timeout:g} s"
                ) from self.pool._state.last_dial_error  # noqa: SLF001
            time.sleep(0.005)

    def check(self) -> None:
        """Try every idle connection, and replace those that do not answer."""
        before = self.pool._state.settings.validate_after_idle  # noqa: SLF001
        self.pool.resize(validate_after_idle=0.0)  # from now on none is lent without an answer
        conns: list[Any] = []
        try:
            with suppress(PoolTimeout, ConnectError):  # the server is away: the pool tries on
                for _ in range(self.pool.stats().idle):
                    conns.append(self.pool.get())  # noqa: PERF401 (what it has must not be lost)
        finally:
            for conn in conns:
                self.pool.put(conn)
            self.pool.resize(validate_after_idle=before)

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the least and the greatest number of connections, the greater one to the least."""
        self.pool.resize(min=min_size, max_open=min_size if max_size is None else max_size)

    def get_stats(self) -> dict[str, int]:
        """Return psycopg_pool's figures, in milliseconds where they are times."""
        stats = self.pool.stats()
        histograms = self.pool.histograms()
        return {
            "pool_min": self.pool._state.settings.min,  # noqa: SLF001
            "pool_max": stats.max_open,
            "pool_size": stats.open,
            "pool_available": stats.idle,
            "requests_waiting": stats.waiting,
            "usage_ms": _milliseconds(histograms["use"].sum),
            "requests_num": histograms["wait"].count + stats.timeouts,
            "requests_queued": stats.wait_count,
            "requests_wait_ms": _milliseconds(stats.wait_seconds),
            "requests_errors": stats.timeouts,
            "returns_bad": stats.broken_closed,
            "connections_num": histograms["create"].count,
            "connections_ms": _milliseconds(histograms["create"].sum),
        }

    def close(self, timeout: float = CLOSE_TIMEOUT) -> CloseReport:
        """Close the pool; unlike psycopg_pool's, wait for what is lent, and report."""
        return self.pool.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
