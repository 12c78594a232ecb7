"""SQLAlchemy on this pool: a `creator` for an engine that has no pool of its own.

    from sqlalchemy import NullPool, create_engine
    from workers.pool.sqlalchemy import creator

    engine = create_engine("postgresql+psycopg://", creator=creator(pool), poolclass=NullPool)

The engine "connects" by borrowing and "closes" by giving back. What is left open is rolled back
twice, which costs one round trip: by SQLAlchemy, and by the pool if need be. The URL tells the
engine its dialect only.
"""

from __future__ import annotations

__all__ = ["creator"]

import sys
from collections.abc import Callable
from typing import Any

from workers.pool.errors import WrongPoolError
from workers.pool.pool import Pool
from workers.pool.stacks import capture_beyond


def creator(pool: Pool) -> Callable[[], Any]:
    """Return a function that borrows from *pool*, for `create_engine(creator=…)`.

    What it returns is the driver's connection in all but its `close`, which gives it back. It
    raises what `Pool.get` raises: SQLAlchemy passes that on as it is.
    """

    def borrow() -> Any:
        conn = pool.get()
        # The places that matter are those of SQLAlchemy's caller.
        pool._by_conn[id(conn)].stack = capture_beyond("sqlalchemy", sys._getframe(1))  # noqa: SLF001
        return _Borrowed(pool, conn)

    return borrow


class _Borrowed:
    """A lent connection that is given back by its own `close`.

    It also passes for one of the driver's class: psycopg wants to see its own.
    """

    __slots__ = ("_conn", "_pool")

    def __init__(self, pool: Pool, conn: Any) -> None:
        object.__setattr__(self, "_pool", pool)
        object.__setattr__(self, "_conn", conn)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(object.__getattribute__(self, "_conn"))

    def close(self) -> None:
        """Give it back; once more does nothing."""
        conn = object.__getattribute__(self, "_conn")
        if conn is not None:
            object.__setattr__(self, "_conn", None)
            object.__getattribute__(self, "_pool").put(conn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lent(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._lent(), name, value)

    def _lent(self) -> Any:
        conn = object.__getattribute__(self, "_conn")
        if conn is None:
            raise WrongPoolError("this connection has been given back")
        return conn
