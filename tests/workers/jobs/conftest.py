"""The databases that tests of jobs run on. Session-scoped where it starts a server: so that it is
there before a test looks at what it holds."""

from __future__ import annotations

__all__ = ["bare", "database", "on_postgresql", "on_sqlite", "postgresql", "server"]

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import PostgreSQLServer, postgresql
from tests.workers.jobs.databases import Database, PostgreSQLDatabase, SQLiteDatabase
from workers.context import Context


@pytest.fixture(scope="session", autouse=True)
def _deadlines() -> None:
    """Start the one thread that contexts' deadlines share, which is there to stay."""
    Context.background().with_timeout(3600.0).on_done(lambda: None)()


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> PostgreSQLServer | None:
    """The server of each database in turn; None for SQLite."""
    if request.param == "sqlite":
        return None
    found: PostgreSQLServer = request.getfixturevalue("postgresql")
    return found


@pytest.fixture
def bare(server: PostgreSQLServer | None, tmp_path: Path) -> Iterator[Database]:
    """Each database in turn, fresh, without any table."""
    if server is None:
        yield SQLiteDatabase(str(tmp_path / "jobs.db"))
        return
    database = PostgreSQLDatabase(server)
    yield database
    database.remove()


@pytest.fixture
def database(bare: Database) -> Database:
    """Each database in turn, fresh, with both tables."""
    return bare.create()


@pytest.fixture
def on_sqlite(tmp_path: Path) -> Database:
    """A SQLite database with both tables: for what only that does, or where that is enough."""
    return SQLiteDatabase(str(tmp_path / "jobs.db")).create()


@pytest.fixture
def on_postgresql(postgresql: PostgreSQLServer) -> Iterator[Database]:
    """A PostgreSQL database with both tables, for what only that does."""
    database = PostgreSQLDatabase(postgresql)
    yield database.create()
    database.remove()
