"""The pool on a real PostgreSQL: cancel, restart, deaf peers, a full server, forks, close."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import PostgreSQLServer, own_postgresql, postgresql
from tests.workers.pool.fake import eventually, in_thread
from tests.workers.pool.proxy import Proxy
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.pool import ConnectError, ForkedPoolError, Pool, PoolTimeout

psycopg = pytest.importorskip("psycopg")
__all__ = ["own_postgresql", "postgresql"]  # fixtures are taken by name


@pytest.fixture
def pool(postgresql: PostgreSQLServer) -> Iterator[Pool]:
    """A pool on the server, by its Unix socket."""
    with Pool.from_url(postgresql.url(), max_open=8, application_name="pool-test") as pool:
        yield pool


@pytest.fixture
def watcher(postgresql: PostgreSQLServer) -> Iterator[Any]:
    """A connection of the test's own, to see what the server sees."""
    with postgresql.connect() as conn:
        yield conn


def sessions(watcher: Any, name: str = "pool-test") -> list[int]:
    """Return the backends of an application that the server knows of."""
    rows = watcher.execute(
        "select pid from pg_stat_activity where application_name = %s", [name]
    ).fetchall()
    return [row[0] for row in rows]


def running(watcher: Any, text: str) -> bool:
    """Whether a query with this text runs now."""
    row = watcher.execute(
        "select count(*) from pg_stat_activity "
        "where state = 'active' and query like %s and pid <> pg_backend_pid()",
        [f"%{text}%"],
    ).fetchone()
    return bool(row[0])


# -- the connection


def test_the_server_sees_the_application_name(pool, watcher):
    """`application_name` can be given beside the URL."""
    with pool.acquire():
        eventually(lambda: len(sessions(watcher)) == 1, "the end of an earlier test's sessions")


def test_what_is_not_committed_is_rolled_back(pool):
    """A transaction left open ends on the way back, a failed one too; a commit lasts."""
    with pool.acquire() as conn:
        conn.execute("create temporary table t (i int)")
        conn.commit()
    with pool.acquire() as conn:
        conn.execute("insert into t values (1)")
    with pool.acquire() as conn:
        assert conn.info.transaction_status == 0
        assert conn.execute("select count(*) from t").fetchone() == (0,)
        with pytest.raises(psycopg.errors.DivisionByZero):
            conn.execute("select 1/0")
    with pool.acquire() as conn:
        conn.execute("insert into t values (1)")
        conn.commit()
    with pool.acquire() as conn:
        assert conn.execute("select count(*) from t").fetchone() == (1,)
    assert pool.stats().open == 1


def test_changed_settings_do_not_reach_the_next_borrower(postgresql):
    """Autocommit, row factory and isolation level are as `setup` left them."""
    from psycopg.rows import dict_row

    def setup(conn: Any) -> None:
        conn.prepare_threshold = None

    with Pool.from_url(postgresql.url(), setup=setup) as pool:
        with pool.acquire() as conn:
            conn.autocommit = True
            conn.row_factory = dict_row
            conn.prepare_threshold = 3
            conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        with pool.acquire() as again:
            assert again is conn
            assert again.autocommit is False
            assert again.prepare_threshold is None
            assert again.isolation_level is None
            assert again.execute("select 1").fetchone() == (1,)


def test_a_connection_closed_by_its_borrower_is_replaced(pool):
    """And so is one that is given back in the middle of a query."""
    with pool.acquire() as conn:
        conn.close()
    with pool.acquire() as conn:
        assert conn.execute("select 1").fetchone() == (1,)
        conn.pgconn.send_query(b"select pg_sleep(5)")
    with pool.acquire() as conn:
        assert conn.execute("select 2").fetchone() == (2,)
    assert pool.stats().broken_closed == 2


def test_any_psycopg_connect_is_known(postgresql):
    """A pool of somebody's own `psycopg.connect` cancels like one of a URL."""
    with Pool(lambda: psycopg.connect(postgresql.url())) as pool:
        with (
            pytest.raises(DeadlineExceeded),
            pool.acquire(Context.background().with_timeout(0.1)) as conn,
        ):
            conn.execute("select pg_sleep(10)")
        with pool.acquire() as again:
            assert again is conn


# -- cancel


def test_the_end_of_a_context_ends_the_query_on_the_server(pool, watcher):
    """The block raises the context's error with the driver's as cause; the connection lives on."""
    ctx = Context.background().with_cancel()
    seen: list[Any] = []

    def work() -> None:
        with pool.acquire(ctx) as conn:
            seen.append(conn)
            conn.execute("select pg_sleep(60)")

    worker = in_thread(work)
    eventually(lambda: running(watcher, "pg_sleep(60)"), "the query")
    ctx.cancel("stop")
    with pytest.raises(Cancelled) as caught:
        worker.result()
    assert caught.value.cause == "stop"
    assert isinstance(caught.value.__cause__, psycopg.errors.QueryCanceled)
    assert not running(watcher, "pg_sleep(60)")
    with pool.acquire() as conn:
        assert conn is seen[0]
        assert conn.execute("select 1").fetchone() == (1,)


def test_a_second_query_under_an_ended_context_is_cancelled_too(pool):
    """The borrower who swallows the first error and goes on is cancelled again."""
    ctx = Context.background().with_cancel()
    with pool.acquire(ctx) as conn:
        ctx.cancel()
        for _ in range(3):
            with pytest.raises(psycopg.errors.QueryCanceled):
                conn.execute("select pg_sleep(60)")
            conn.rollback()


def test_the_borrowers_own_error_is_not_replaced(pool):
    """Only a driver's error becomes the context's."""
    ctx = Context.background().with_cancel()
    with pytest.raises(KeyError), pool.acquire(ctx):
        ctx.cancel()
        raise KeyError("the borrower's")


def test_a_block_that_ended_well_stays_so(pool):
    """A context that ends after the last query takes nothing back."""
    ctx = Context.background().with_cancel()
    with pool.acquire(ctx) as conn:
        row = conn.execute("select 1").fetchone()
        ctx.cancel()
    assert row == (1,)


def test_a_cancel_never_hits_the_next_borrower(postgresql):
    """300 cancels, each racing the end of its query: none hits what runs there afterwards."""
    with Pool.from_url(postgresql.url(), max_open=1) as pool:
        hits = cancelled = 0
        for turn in range(300):
            ctx = Context.background().with_cancel()
            canceller = threading.Timer(0.001 + turn % 10 * 0.0002, ctx.cancel)
            canceller.start()
            try:
                with pool.acquire(ctx) as conn:
                    conn.execute("select pg_sleep(0.002)")
            except Cancelled:
                cancelled += 1
            try:
                with pool.acquire() as conn:
                    conn.execute("select pg_sleep(0.002)")
            except psycopg.Error:
                hits += 1
            canceller.join()
        assert hits == 0
        assert cancelled > 0
        assert pool.stats().open == 1
        assert pool.stats().broken_closed == 0, "a cancelled connection is used again"


# -- servers that go away


def test_a_restart_costs_each_thread_one_query_at_most(own_postgresql):
    """Eight threads, a restart: at most what was in flight fails, and all go on by themselves."""
    failed: list[BaseException] = []
    good: list[float] = []
    end = threading.Event()
    with Pool.from_url(own_postgresql.url(), max_open=8, acquire_timeout=10.0) as pool:

        def work() -> None:
            while not end.is_set():
                try:
                    with pool.acquire() as conn:
                        conn.execute("select 1")
                        good.append(time.monotonic())
                except (psycopg.Error, PoolTimeout) as exc:
                    failed.append(exc)

        crew = [in_thread(work) for _ in range(8)]
        eventually(lambda: len(good) > 200, "work")
        own_postgresql.stop()
        own_postgresql.start()
        up = time.monotonic()
        eventually(lambda: good[-1] > up, "work again")
        end.set()
        for member in crew:
            member.result()
        assert len(failed) <= 8
        assert not any(isinstance(exc, PoolTimeout) for exc in failed)
        assert next(at for at in good if at > up) - up < 1.0


def test_idle_connections_of_a_restarted_server_are_not_handed_out(own_postgresql):
    """Five at rest through a restart: not one borrower sees a dead one."""
    with Pool.from_url(own_postgresql.url()) as pool:
        for conn in [pool.get() for _ in range(5)]:
            pool.put(conn)
        own_postgresql.stop()
        own_postgresql.start()
        for _ in range(5):
            with pool.acquire() as conn:
                assert conn.execute("select 1").fetchone() == (1,)
        assert pool.stats().timeouts == 0


def test_a_deaf_peer_is_found_within_a_second(postgresql):
    """A proxy that keeps the connections and passes nothing on costs one check, not ten."""
    with (
        Proxy(postgresql.port) as proxy,
        Pool.from_url(postgresql.url(port=proxy.port), max_open=5, validate_after_idle=0.0) as pool,
    ):
        for conn in [pool.get() for _ in range(5)]:
            pool.put(conn)
        proxy.deafen()
        began = time.monotonic()
        with pytest.raises(PoolTimeout):
            pool.get(timeout=2.0)
        assert time.monotonic() - began < 3.0
        eventually(lambda: pool.stats().broken_closed == 1, "the first's end")
        assert pool.stats().idle == 0, "the others of its time went with it"
        proxy.cut()
        with pool.acquire(timeout=10.0) as conn:
            assert conn.execute("select 1").fetchone() == (1,)


def test_a_query_on_a_deaf_connection_ends_with_its_context(postgresql):
    """Where the server cannot be told, the connection is cut: its borrower is free."""
    with Proxy(postgresql.port) as proxy:
        pool = Pool.from_url(postgresql.url(port=proxy.port), max_open=1)
        ctx = Context.background().with_cancel()
        lent, deaf = threading.Event(), threading.Event()

        def work() -> None:
            with pool.acquire(ctx) as conn:
                lent.set()
                deaf.wait(10)
                conn.execute("select 1")

        worker = in_thread(work)
        assert lent.wait(10)
        proxy.deafen()
        deaf.set()
        ctx.cancel("stop")
        with pytest.raises(Cancelled):
            worker.result()
        eventually(lambda: pool.stats().broken_closed == 1, "its end")
        assert pool.close(0).leaked == []


def test_a_rollback_on_a_deaf_connection_is_bounded(postgresql, monkeypatch):
    """Giving back does not hang where the server does not answer."""
    monkeypatch.setattr("workers.pool.state.RESET_TIMEOUT", 0.2)
    with Proxy(postgresql.port) as proxy:
        pool = Pool.from_url(postgresql.url(port=proxy.port), max_open=1)
        conn = pool.get()
        conn.execute("select 1")
        proxy.deafen()
        in_thread(lambda: pool.put(conn)).result()
        eventually(lambda: pool.stats().broken_closed == 1, "its end")
        pool.close(0)


def test_a_full_server_is_named_in_the_timeout(postgresql, watcher):
    """`too many connections` is what the borrower reads, and room is used as it comes."""
    watcher.execute("create role small login connection limit 2")
    pool = Pool.from_url(postgresql.url(user="small"), max_open=4)
    try:
        conns = [pool.get() for _ in range(2)]
        with pytest.raises(PoolTimeout, match="too many connections for role") as caught:
            pool.get(timeout=0.3)
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        third = in_thread(lambda: pool.get(timeout=10.0))
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        pool.put(conns.pop(), broken=True)
        pool.put(third.result())
        pool.put(conns.pop())
    finally:
        pool.close(0)
        watcher.execute("drop role small")


def test_a_wrong_name_is_told_at_once_and_never_with_the_password(postgresql):
    """What waiting does not change does not wait, and no text has the password."""
    url = f"postgresql://nobody:s3cr3t@127.0.0.1:{postgresql.port}/postgres"
    pool = Pool.from_url(url, acquire_timeout=10.0)
    with pytest.raises(ConnectError, match='role "nobody" does not exist') as caught:
        pool.get()
    texts = [str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(pool)]
    assert not any("s3cr3t" in text for text in texts)
    pool.close()


def test_a_url_that_libpq_does_not_understand_is_not_quoted():
    """The error names no part of it, since any part may be the password."""
    with pytest.raises(ValueError, match="does not understand") as caught:
        Pool.from_url("postgresql://app:s3cr3t@/db?nonsense=s3cr3t")
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_missing_driver_names_its_extra():
    """One clear sentence says what to install."""
    program = """
import sys
sys.modules["psycopg"] = None
from workers.pool import MissingDriverError, Pool
try:
    Pool.from_url("postgresql:///db")
except MissingDriverError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True
    )
    assert 'pip install "ackvisor[postgresql]"' in done.stdout


# -- fork


def test_a_forked_child_cannot_hurt_the_parents_connections(pool, watcher):
    """Whatever the child does to what it inherited, the parent's session hears nothing of it."""
    lent = pool.get()
    lent.execute("select 1")
    idle = pool.get()
    pool.put(idle)
    child = os.fork()
    if child == 0:
        try:
            pool.get()
        except ForkedPoolError:
            lent.close()
            idle.close()
            os._exit(7)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert lent.execute("select 2").fetchone() == (2,)
    pool.put(lent)
    with pool.acquire() as conn:
        assert conn.execute("select 3").fetchone() == (3,)
    eventually(lambda: len(sessions(watcher)) == 2, "the end of an earlier test's sessions")
    assert pool.stats().broken_closed == 0


# -- close


def test_close_with_three_borrowed(postgresql, watcher):
    """One in a query, one idle in a transaction, one forgotten: each is named, none stays open."""
    pool = Pool.from_url(postgresql.url(), application_name="closing", max_open=4)
    query = pool.get()
    querying = in_thread(lambda: query.execute("select pg_sleep(60)"))
    eventually(lambda: running(watcher, "pg_sleep(60)"), "the query")
    transaction = pool.get()
    transaction.execute("select 1")
    forgotten = pool.get()
    began = time.monotonic()
    report = pool.close(0.2)
    assert 0.2 <= time.monotonic() - began < 5.0
    with pytest.raises(psycopg.errors.QueryCanceled):
        querying.result()
    assert len(report.leaked) == 3
    assert all("cut off from the server" in leak.outcome for leak in report.leaked)
    eventually(lambda: sessions(watcher, "closing") == [], "the end of the sessions")
    for conn in (query, transaction, forgotten):
        pool.put(conn)
    assert pool.stats().open == 0


def test_a_query_that_close_cancels_in_time_is_not_cut(postgresql, watcher):
    """Its borrower gets half a second to give it back, and the report says so."""
    pool = Pool.from_url(postgresql.url())

    def work() -> None:
        with pool.acquire() as conn:
            conn.execute("select pg_sleep(60)")

    worker = in_thread(work)
    eventually(lambda: running(watcher, "pg_sleep(60)"), "the query")
    report = pool.close(0.1)
    with pytest.raises(psycopg.errors.QueryCanceled):
        worker.result()
    assert [leak.outcome for leak in report.leaked] == [
        "given back after its statement was cancelled"
    ]
    assert (report.closed, report.waited) == (1, 1)


# -- many


def test_sixty_four_threads_on_eight_connections(pool, watcher):
    """Everybody gets the same number of turns, and the server never sees more than eight."""
    seen: list[int] = []

    def work() -> int:
        for _ in range(20):
            with pool.acquire(timeout=30.0) as conn:
                conn.execute("select 1")
        return 20

    crew = [in_thread(work) for _ in range(64)]
    while any(member.is_alive() for member in crew):
        seen.append(len(sessions(watcher)))
    assert [member.result() for member in crew] == [20] * 64
    assert max(seen) <= 8
    assert pool.stats().open <= 8
