"""psycopg_pool's names, with psycopg_pool's meaning, on a real PostgreSQL."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from tests.servers import PostgreSQLServer, postgresql
from tests.workers.pool.fake import FakeServer, OperationalError, eventually
from workers.pool import Pool
from workers.pool.psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

psycopg_pool = pytest.importorskip("psycopg_pool")
__all__ = ["postgresql"]  # a fixture is taken by name


@pytest.fixture
def pool(postgresql: PostgreSQLServer) -> Iterator[ConnectionPool]:
    """A pool on the server."""
    inner = Pool.from_url(postgresql.url(), max_open=3, min=2, name="facade")
    with ConnectionPool(inner) as pool:
        yield pool


@pytest.mark.parametrize(
    "name",
    ["connection", "getconn", "putconn", "get_stats", "close", "wait", "check", "resize", "name"],
)
def test_every_name_takes_what_psycopg_pools_takes(name):
    """The same methods, the same arguments."""
    theirs = getattr(psycopg_pool.ConnectionPool, name, None)
    ours = getattr(ConnectionPool, name)
    if not callable(theirs):
        return
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_a_block_that_ends_well_commits(pool):
    """And one that raises rolls back: as psycopg_pool's connection()."""
    with pool.connection() as conn:
        conn.execute("drop table if exists facade")
        conn.execute("create table facade (i int)")
    with pytest.raises(KeyError), pool.connection() as conn:
        conn.execute("insert into facade values (1)")
        raise KeyError
    with pool.connection() as conn:
        conn.execute("insert into facade values (2)")
    with pool.connection() as conn:
        assert conn.execute("select i from facade").fetchall() == [(2,)]
        conn.execute("drop table facade")


def test_a_connection_may_be_closed_in_its_block(pool):
    """The pool replaces it, as psycopg_pool's does."""
    with pool.connection() as conn:
        conn.close()
    with pool.connection() as conn:
        assert conn.execute("select 1").fetchone() == (1,)


def test_getconn_and_putconn(pool):
    """What is put back is rolled back; what is another pool's is a ValueError."""
    conn = pool.getconn(timeout=5)
    conn.execute("select 1")
    pool.putconn(conn)
    again = pool.getconn()
    assert again is conn
    assert again.info.transaction_status == 0
    pool.putconn(again)
    with pytest.raises(ValueError, match="has not lent"):
        pool.putconn(conn.__class__)


def test_wait_returns_when_the_minimum_is_there(pool):
    """Two connections, in the background."""
    pool.wait()
    assert pool.get_stats()["pool_available"] == 2


def test_wait_says_why_there_are_none():
    """PoolTimeout, with the dial's error as its cause."""
    server = FakeServer(error=OperationalError("too many connections"))
    with ConnectionPool(Pool(server.connect, min=1)) as pool:
        eventually(lambda: server.dials > 0, "a dial")
        with pytest.raises(PoolTimeout, match="0 of 1") as caught:
            pool.wait(timeout=0.05)
        assert isinstance(caught.value.__cause__, OperationalError)


def test_the_figures_have_psycopg_pools_names(pool):
    """Each is one of psycopg_pool's, and counts the same thing."""
    pool.wait()
    for _ in range(3):
        with pool.connection() as conn:
            conn.execute("select 1")
    conns = [pool.getconn() for _ in range(3)]
    with pytest.raises(PoolTimeout):
        pool.getconn(timeout=0.02)
    stats = pool.get_stats()
    for conn in conns:
        pool.putconn(conn)
    assert (stats["pool_min"], stats["pool_max"], stats["pool_size"]) == (2, 3, 3)
    assert (stats["pool_available"], stats["requests_waiting"]) == (0, 0)
    assert (stats["requests_num"], stats["requests_errors"]) == (7, 1)
    assert stats["connections_num"] == 3
    assert stats["requests_wait_ms"] >= 20
    documented = inspect.getsource(psycopg_pool.base) + inspect.getsource(psycopg_pool.pool)
    for name in stats:
        assert f'"{name}"' in documented or name in documented.lower()


def test_check_replaces_what_does_not_answer(pool, postgresql):
    """Dead connections are found although nobody has asked for one."""
    pool.wait()
    conns = [pool.getconn() for _ in range(2)]
    pids = [conn.info.backend_pid for conn in conns]
    for conn in conns:
        pool.putconn(conn)
    with postgresql.connect() as watcher:
        for pid in pids:
            watcher.execute("select pg_terminate_backend(%s, 5000)", [pid])
    pool.check()
    for _ in range(2):
        with pool.connection() as conn:
            assert conn.info.backend_pid not in pids
    assert pool.get_stats()["returns_bad"] == 2


def test_resize_takes_both_numbers(pool):
    """Without the second the pool has as many as its least."""
    pool.resize(1, 2)
    assert (pool.get_stats()["pool_min"], pool.get_stats()["pool_max"]) == (1, 2)
    pool.resize(2)
    assert (pool.get_stats()["pool_min"], pool.get_stats()["pool_max"]) == (2, 2)


def test_close_waits_and_reports(postgresql):
    """What psycopg_pool's close leaves open, ours waits for and names."""
    pool = ConnectionPool(Pool.from_url(postgresql.url()))
    conn = pool.getconn()
    report = pool.close(timeout=0.05)
    assert len(report.leaked) == 1
    with pytest.raises(PoolClosed):
        pool.getconn()
    pool.putconn(conn)
