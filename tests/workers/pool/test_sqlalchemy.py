"""SQLAlchemy's real engine on this pool: SQLite, PostgreSQL and MariaDB alike."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.servers import postgresql
from tests.servers_mysql_redis import mariadb
from tests.workers.pool.fake import eventually, in_thread
from workers.pool import Pool, PoolTimeout, WrongPoolError

sqlalchemy = pytest.importorskip("sqlalchemy")
from sqlalchemy.exc import DBAPIError, IntegrityError  # noqa: E402
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column  # noqa: E402

from workers.pool.sqlalchemy import creator  # noqa: E402

__all__ = ["mariadb", "postgresql"]  # fixtures are taken by name


@dataclass
class Place:
    """Where an engine's data are: for the pool, for the engine, and for who cuts them off."""

    url: str
    dialect: str
    kill: Callable[[], None] | None


@dataclass
class Site:
    """An engine, the pool below it, and how to end the sessions behind its back."""

    engine: Any
    pool: Pool
    kill: Callable[[], None] | None


@pytest.fixture(scope="session", params=["sqlite", "postgresql", "mysql"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Each kind of server."""
    if request.param == "sqlite":
        folder = tmp_path_factory.mktemp("alchemy")
        yield Place(f"sqlite:///{folder}/t.db", "sqlite://", None)
    elif request.param == "postgresql":
        server = request.getfixturevalue("postgresql")

        def terminate() -> None:
            with server.connect() as conn:
                conn.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where application_name = 'alchemy'"
                )

        yield Place(server.url(), "postgresql+psycopg://", terminate)
    else:
        server = request.getfixturevalue("mariadb")

        def kill() -> None:
            with contextlib.closing(server.connect()) as conn, conn.cursor() as cursor:
                cursor.execute(
                    "select id from information_schema.processlist "
                    "where user = 'app' and id <> connection_id()"
                )
                for (number,) in cursor.fetchall():
                    cursor.execute(f"kill {number}")

        yield Place(server.url(), "mysql+pymysql://", kill)


@pytest.fixture
def site(place: Place) -> Iterator[Site]:
    """An engine with an empty table `t`."""
    with Pool.from_url(
        place.url, max_open=3, acquire_timeout=5.0, application_name="alchemy"
    ) as pool:
        engine = sqlalchemy.create_engine(
            place.dialect, creator=creator(pool), poolclass=sqlalchemy.NullPool
        )
        with engine.begin() as conn:
            execute(conn, "drop table if exists t")
            execute(conn, "create table t (i integer primary key)")
        yield Site(engine, pool, place.kill)
        with engine.begin() as conn:
            execute(conn, "drop table t")


def execute(conn: Any, query: str) -> Any:
    """Run a query that is a text."""
    return conn.execute(sqlalchemy.text(query))


def count(site: Site) -> int:
    """Count what was committed."""
    with site.engine.connect() as conn:
        return int(execute(conn, "select count(*) from t").scalar())


def test_connections_come_from_the_pool_and_go_back(site):
    """An engine that connects a hundred times opens one connection."""
    for _ in range(100):
        with site.engine.connect() as conn:
            assert execute(conn, "select 1").scalar() == 1
            assert site.pool.stats().in_use == 1
    assert site.pool.stats().open == 1
    assert site.pool.stats().in_use == 0


def test_commit_lasts_and_what_is_left_open_is_rolled_back(site):
    """As on any engine: begin commits, connect does not, an exception rolls back."""
    with site.engine.begin() as conn:
        execute(conn, "insert into t values (1)")
    with site.engine.connect() as conn:
        execute(conn, "insert into t values (2)")
    with pytest.raises(KeyError), site.engine.begin() as conn:
        execute(conn, "insert into t values (3)")
        raise KeyError
    assert count(site) == 1


def test_an_error_leaves_a_usable_connection(site):
    """SQLAlchemy's exception, its driver's as cause, and the connection goes back clean."""
    with site.engine.begin() as conn:
        execute(conn, "insert into t values (1)")
    for _ in range(3):
        with pytest.raises(IntegrityError), site.engine.begin() as conn:
            execute(conn, "insert into t values (1)")
        with pytest.raises(DBAPIError), site.engine.connect() as conn:
            execute(conn, "select nonsense from nowhere")
    assert count(site) == 1
    assert site.pool.stats().open == 1


def test_autocommit_is_for_who_asked_for_it(site):
    """An isolation level of one connection is not the next one's."""
    with site.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        execute(conn, "insert into t values (1)")
    with site.engine.connect() as conn:
        execute(conn, "insert into t values (2)")
    assert count(site) == 1
    assert site.pool.stats().open == 1


class Base(DeclarativeBase):
    """The tables of the ORM's test."""


class Row(Base):
    """A row of `t`."""

    __tablename__ = "t"
    i: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def test_a_session_works(site):
    """The ORM: flush, commit, rollback, and a connection for as long as it needs one."""
    with Session(site.engine) as session:
        session.add_all([Row(i=1), Row(i=2)])
        session.commit()
        assert site.pool.stats().in_use == 0
        session.add(Row(i=3))
        session.flush()
        assert site.pool.stats().in_use == 1
        session.rollback()
        assert session.query(Row).count() == 2
    assert site.pool.stats().in_use == 0


def test_a_lost_connection_is_replaced(site):
    """SQLAlchemy says that it is invalid, the pool closes it, the next one is new."""
    if site.kill is None:
        return  # SQLite has no server that could go away
    with site.engine.connect() as conn:
        execute(conn, "select 1")
        site.kill()

        def is_lost() -> bool:
            try:
                execute(conn, "select 1")
            except DBAPIError as exc:
                return exc.connection_invalidated
            return False

        eventually(is_lost, "the end of the session")
    with site.engine.connect() as conn:
        assert execute(conn, "select 1").scalar() == 1
    assert site.pool.stats().broken_closed == 1


def test_the_pools_errors_pass_as_they_are(site):
    """PoolTimeout says who has the connections, and their places are the user's own."""
    conns = [site.engine.connect() for _ in range(3)]
    site.pool.resize(acquire_timeout=0.05)
    with pytest.raises(PoolTimeout, match="test_the_pools_errors_pass_as_they_are") as caught:
        site.engine.connect()
    assert all("test_sqlalchemy.py" in holder.stack for holder in caught.value.holders)
    for conn in conns:
        conn.close()
    assert site.pool.stats().in_use == 0


def test_waiting_is_fair_below_an_engine(site):
    """Sixteen threads on three connections: all are served."""
    served: list[int] = []
    gate = threading.Barrier(16)

    def work() -> None:
        gate.wait(10)
        for _ in range(5):
            with site.engine.connect() as conn:
                served.append(execute(conn, "select 1").scalar())

    for member in [in_thread(work) for _ in range(16)]:
        member.result()
    assert len(served) == 80
    assert site.pool.stats().open <= 3


def test_close_gives_back_once(tmp_path):
    """A second close does nothing, and what was given back cannot be used."""
    with Pool.from_url(f"sqlite:///{tmp_path}/t.db") as pool:
        conn = creator(pool)()
        assert conn.execute("select 1").fetchone() == (1,)
        conn.close()
        conn.close()
        assert pool.stats().idle == 1
        with pytest.raises(WrongPoolError):
            conn.execute("select 1")


def test_a_forgotten_connection_comes_back(site):
    """SQLAlchemy gives back what its user has dropped without closing, when it is collected."""
    conn = site.engine.connect()
    execute(conn, "select 1")
    del conn
    gc.collect()
    assert site.pool.stats().in_use == 0
