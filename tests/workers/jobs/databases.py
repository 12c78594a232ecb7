"""The two databases that jobs are kept in, the same to a test: a URL, connections, a way to look."""

from __future__ import annotations

__all__ = ["EFFECTS", "Database", "PostgreSQLDatabase", "SQLiteDatabase", "soon"]

import contextlib
import itertools
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from tests.servers import PostgreSQLServer
from workers.context import Context
from workers.jobs.dialects import table_for
from workers.jobs.table import Claim, Table

EFFECTS = "CREATE TABLE IF NOT EXISTS effects (job BIGINT NOT NULL, attempt BIGINT NOT NULL)"


def soon() -> Context:
    """Return a context for one step of a test, which must not last."""
    return Context.background().with_timeout(20.0)


class Database(ABC):
    """A database of its own for one test, with the table `jobs` and one for effects."""

    url: str
    mark: str

    @abstractmethod
    def connect(self) -> Any:
        """Return a new connection; the caller closes it."""

    @contextlib.contextmanager
    def connection(self) -> Iterator[tuple[Any, Table]]:
        """Lend a connection of its own, and the table as this database has it."""
        conn = self.connect()
        try:
            yield conn, table_for(conn)
        finally:
            conn.close()

    def create(self) -> Database:
        """Create both tables."""
        with self.connection() as (conn, table):
            table.create(conn, soon())
            conn.rollback()
            conn.execute(EFFECTS)
            conn.commit()
        return self

    def add(self, *payloads: str, due_in: int = 0) -> list[int]:
        """Add jobs, which are due in so many seconds; return their numbers."""
        with self.connection() as (conn, table):
            with table.writing(conn, soon()):
                first, last = table.add(conn, payloads)
                conn.execute(
                    "UPDATE jobs SET due = due + ? WHERE id BETWEEN ? AND ?".replace(
                        "?", self.mark
                    ),
                    (due_in, first, last),
                )
            return list(range(first, last + 1))

    def claim(self, owner: str, lease: float = 60.0) -> Claim:
        """Claim the next job, which must be there."""
        with self.connection() as (conn, table):
            claim = table.claim(conn, soon(), owner, lease)
        assert claim is not None
        return claim

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return what a query finds."""
        with self.connection() as (conn, _):
            return [tuple(row) for row in conn.execute(query.replace("?", self.mark), values)]

    def change(self, statement: str, *values: Any) -> None:
        """Execute one statement and commit it."""
        with self.connection() as (conn, _):
            conn.execute(statement.replace("?", self.mark), values)
            conn.commit()

    def job(self, number: int, *columns: str) -> Any:
        """Return one column of a job, or several as a tuple."""
        [row] = self.rows(f"SELECT {', '.join(columns)} FROM jobs WHERE id = ?", number)
        return row if len(columns) > 1 else row[0]

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are in each state."""
        with self.connection() as (conn, table):
            return table.counts(conn)

    def effects(self) -> list[tuple[int, int]]:
        """Return (job, attempt) of every effect, in the order of the jobs."""
        return [(job, n) for job, n in self.rows("SELECT job, attempt FROM effects ORDER BY 1, 2")]


class SQLiteDatabase(Database):
    """A file in WAL mode."""

    mark = "?"

    def __init__(self, path: str) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"
        with contextlib.closing(self.connect()) as conn:
            conn.execute("PRAGMA journal_mode = WAL")

    def connect(self) -> Any:
        return sqlite3.connect(self.path, check_same_thread=False)


class PostgreSQLDatabase(Database):
    """A database of its own on a private server; `remove` drops it."""

    mark = "%s"
    _numbers = itertools.count(1)

    def __init__(self, server: PostgreSQLServer) -> None:
        self._server = server
        self.name = f"jobs_{os.getpid()}_{next(self._numbers)}"
        self.url = server.url().replace("/postgres?", f"/{self.name}?")
        with server.connect() as conn:
            conn.execute(f"CREATE DATABASE {self.name}")

    def connect(self) -> Any:
        import psycopg

        return psycopg.connect(self.url)

    def remove(self) -> None:
        """Drop it, whoever is connected."""
        with self._server.connect() as conn:
            conn.execute(f"DROP DATABASE {self.name} WITH (FORCE)")
