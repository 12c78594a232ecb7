"""What a worker tells of pools that cannot connect, and when it ends because of one."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from supervisor.protocol import Reachable, Unreachable
from workers.context import DeadlineExceeded
from workers.outages import MAX_ERROR, Outages
from workers.pool import Pool, PoolTimeout
from workers.pool.drivers.postgresql import PostgreSQLDriver


class Server:
    """A database that is up or down, in memory: `connect` is the driver's."""

    def __init__(self) -> None:
        self.is_up = True
        self.error = "refused"

    def connect(self) -> sqlite3.Connection:
        if not self.is_up:
            raise ConnectionRefusedError(self.error)
        return sqlite3.connect(":memory:", check_same_thread=False)


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def pool(server):
    with Pool(server.connect, name="main", max_open=1, max_idle=0, acquire_timeout=0.1) as pool:
        yield pool


@pytest.fixture
def told():
    """What the supervisor was told, in order."""
    return []


@pytest.fixture
def outages(pool, told):
    outages = Outages({"main": pool}, told.append)
    outages.watch("main", pool)
    return outages


def failure(pool):
    """Return what an acquire raises that gets no connection."""
    with pytest.raises(PoolTimeout) as caught:
        pool.get()
    return caught.value


def test_a_file_that_others_have_locked_is_no_outage(tmp_path, told):
    """Nothing is told of a lock, which passes; who waits for it too long is told what it was."""
    path = tmp_path / "locked.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("create table t (x)")
        other.execute("begin exclusive")
        with Pool.from_url(f"sqlite:///{path}", name="main", acquire_timeout=0.5) as pool:
            outages = Outages({"main": pool}, told.append)
            outages.watch("main", pool)
            with pytest.raises(PoolTimeout, match="locked"):
                pool.get()
            assert told == []
            other.execute("commit")
            with pool.acquire() as conn:
                conn.execute("insert into t values (1)")
            assert told == []


def test_an_outage_is_told_when_it_begins_and_when_it_ends(server, pool, outages, told):
    """Once each, however often it is dialled meanwhile, and in a bounded number of words."""
    server.is_up = False
    server.error = "refused\n" * 1000
    for _ in range(3):
        failure(pool)
    server.is_up = True
    with pool.acquire(), pytest.raises(PoolTimeout):
        pool.get()

    begun, ended = told
    assert isinstance(begun, Unreachable)
    assert begun.error.startswith("ConnectionRefusedError: refused refused")
    assert len(begun.error) <= MAX_ERROR + 2
    assert ended == Reachable("main")


def test_what_was_raised_names_the_pool_behind_it(server, pool, outages):
    """However it is wrapped: as a cause, as what was handled meanwhile, within a group."""
    server.is_up = False
    error = failure(pool)
    for wrapped in (error, caused_by(error), met_while_handling(error), among_others(error)):
        assert outages.behind(wrapped) == "main"


def test_a_pool_that_is_only_busy_is_no_outage(pool, outages, told):
    """Somebody has its connections: that is the worker's own doing."""
    with pool.acquire():
        assert outages.behind(failure(pool)) == ""
    assert outages.behind(ValueError("a bug")) == ""
    assert told == []


def test_a_deadline_that_passes_in_an_outage_is_its_doing(server, pool, outages):
    """Who waits under a context gets no PoolTimeout."""
    assert outages.behind(DeadlineExceeded()) == ""
    server.is_up = False
    failure(pool)
    assert outages.behind(DeadlineExceeded()) == "main"


def test_who_was_told_not_to_look_further_is_not_blamed(server, pool, outages):
    """`raise … from None` says that what was handled has nothing to do with it."""
    server.is_up = False
    error = failure(pool)
    try:
        try:
            raise error
        except PoolTimeout:
            raise KeyError("a bug") from None
    except KeyError as exc:
        assert outages.behind(exc) == ""


@pytest.mark.parametrize(
    ("sqlstate", "text", "expected"),
    [
        ("57P01", "terminating connection due to administrator command", True),
        (None, "server closed the connection unexpectedly", True),
        (None, "connection refused", True),
        (None, 'password authentication failed for user "app"', False),
        (None, "the connection is closed", False),
        ("57014", "canceling statement due to statement timeout", False),
        ("55P03", "could not obtain lock", False),
    ],
)
def test_what_psycopg_says_of_a_server_that_is_away(sqlstate, text, expected):
    """That it goes or has gone; not that it refuses, nor what a statement may meet with."""
    psycopg = pytest.importorskip("psycopg")
    error = psycopg.OperationalError(text)
    error.sqlstate = sqlstate

    assert PostgreSQLDriver().is_outage(error) is expected


def caused_by(error):
    wrapped = RuntimeError("cannot start")
    wrapped.__cause__ = error
    return wrapped


def met_while_handling(error):
    wrapped = SystemExit(1)
    wrapped.__context__ = error
    return wrapped


def among_others(error):
    return ExceptionGroup("threads", [ValueError("a bug"), caused_by(error)])
