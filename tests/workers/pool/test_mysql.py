"""The pool on a real MariaDB: cancel, restart, deaf peers, a full server, forks, close."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.servers_mysql_redis import MariaDBServer, mariadb, own_mariadb
from tests.workers.pool.fake import eventually, in_thread
from tests.workers.pool.proxy import Proxy
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.pool import ConnectError, ForkedPoolError, Pool, PoolTimeout

pymysql = pytest.importorskip("pymysql")
__all__ = ["mariadb", "own_mariadb"]  # fixtures are taken by name

INTERRUPTED = 1317


@pytest.fixture
def pool(mariadb: MariaDBServer) -> Iterator[Pool]:
    """A pool on the server, by its Unix socket."""
    with Pool.from_url(mariadb.url(), max_open=8) as pool:
        yield pool


@pytest.fixture
def watcher(mariadb: MariaDBServer) -> Iterator[Any]:
    """A connection of the test's own, to see what the server sees."""
    with mariadb.connect() as conn:
        yield conn


def ask(conn: Any, query: str) -> Any:
    """Return the first row of a query."""
    with conn.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()


def number(error: BaseException | None) -> Any:
    """Return the server's number of an error."""
    assert isinstance(error, pymysql.MySQLError)
    return error.args[0]


def sessions(watcher: Any, user: str = "app") -> int:
    """Count the user's sessions that the server knows of, but for the watcher's."""
    (count,) = ask(
        watcher,
        f"select count(*) from information_schema.processlist where user = '{user}' "
        "and id <> connection_id()",
    )
    return int(count)


def running(watcher: Any, text: str) -> int:
    """Count the queries with this text that run now."""
    (count,) = ask(
        watcher,
        "select count(*) from information_schema.processlist where command = 'Query' "
        f"and info like '%{text}%' and id <> connection_id()",
    )
    return int(count)


# -- the connection


def test_a_url_holds_all_that_pymysql_needs(mariadb):
    """User, database, charset and a SQL mode of the URL are the session's."""
    url = f"{mariadb.url()}&charset=utf8mb4&autocommit=1&sql_mode=ANSI"
    with Pool.from_url(url, application_name="pool-test") as pool, pool.acquire() as conn:
        assert ask(conn, "select database(), substring_index(user(), '@', 1)") == ("test", "app")
        assert ask(conn, "select @@character_set_client, @@autocommit") == ("utf8mb4", 1)
        assert "ANSI" in ask(conn, "select @@sql_mode")[0]


@pytest.mark.parametrize(
    "url",
    [
        "mysql://app:s3cr3t@host:s3cr3t/db",
        "mysql://app:s3cr3t@host/db?nonsense=s3cr3t",
        "mysql://app:s3cr3t@host/db?autocommit=s3cr3t",
        "mysql://app:s3cr3t@[host/db",
    ],
)
def test_a_url_that_is_none_is_refused_without_showing_it(url):
    """The error names the option, and nothing that may be a secret."""
    with pytest.raises(ValueError, match="MySQL URL") as caught:
        Pool.from_url(url)
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_what_is_not_committed_is_rolled_back(pool, watcher):
    """A transaction left open ends on the way back; a commit lasts."""
    with pool.acquire() as conn:
        conn.query("create or replace table t (i int primary key)")
        conn.query("insert into t values (1)")
        conn.commit()
    with pool.acquire() as conn:
        conn.query("insert into t values (2)")
    with pool.acquire() as conn:
        assert ask(conn, "select count(*) from t") == (1,)
    assert pool.stats().open == 1


def test_a_failed_statement_leaves_no_lock_behind(pool, watcher):
    """Its error does not say that it has opened a transaction; it is rolled back all the same."""
    with pool.acquire() as conn:
        conn.query("create or replace table t (i int primary key)")
        conn.query("insert into t values (1)")
        conn.commit()
    with pool.acquire() as conn, pytest.raises(pymysql.IntegrityError):
        conn.query("insert into t values (1)")
    assert ask(watcher, "select count(*) from information_schema.innodb_trx") == (0,)


def test_changed_settings_do_not_reach_the_next_borrower(mariadb):
    """Autocommit and the cursor class are as `setup` left them."""
    with Pool.from_url(mariadb.url(), setup=lambda conn: conn.autocommit(True)) as pool:
        with pool.acquire() as conn:
            conn.autocommit(False)
            conn.cursorclass = pymysql.cursors.DictCursor
        with pool.acquire() as again:
            assert again is conn
            assert ask(again, "select @@autocommit") == (1,)
        with pool.acquire() as conn:
            conn.query("set autocommit = 0")
        with pool.acquire() as again:
            assert again is conn
            assert ask(again, "select @@autocommit") == (1,)


def test_what_is_clean_goes_back_without_a_round_trip(mariadb, watcher):
    """In autocommit, and after a commit, the way back says nothing to the server."""

    def rollbacks() -> int:
        return int(ask(watcher, "show global status like 'Com_rollback'")[1])

    with Pool.from_url(f"{mariadb.url()}&autocommit=1") as pool:
        before = rollbacks()
        for _ in range(3):
            with pool.acquire() as conn:
                conn.query("select 1")
        assert rollbacks() == before
        with pool.acquire() as conn:
            conn.begin()
        assert rollbacks() == before + 1


def test_a_connection_in_the_middle_of_something_is_replaced(pool):
    """Closed by its borrower, or with rows that nobody has fetched: it is not lent again."""
    with pool.acquire() as conn:
        conn.close()
    with pool.acquire() as conn:
        cursor = conn.cursor(pymysql.cursors.SSCursor)
        cursor.execute("select seq from seq_1_to_100000")
        assert cursor.fetchone() == (1,)
    with pool.acquire() as again:
        assert again is not conn
        assert ask(again, "select 2") == (2,)
    assert pool.stats().broken_closed == 2


def test_an_answer_that_was_not_read_is_nobody_elses(mariadb):
    """Interrupted between question and answer: the next answer would be the last question's."""

    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with Pool.from_url(f"{mariadb.url()}&autocommit=1") as pool:
        with pytest.raises(KeyboardInterrupt), pool.acquire() as conn:
            conn._read_query_result = interrupt
            conn.query("do 0")
        with pool.acquire() as again:
            assert again is not conn
            assert ask(again, "select 3") == (3,)
        assert pool.stats().broken_closed == 1


def test_rows_that_were_not_read_are_nobody_elses(pool):
    """A value that cannot be converted leaves the rest of its answer: the connection is closed."""

    def broken(_value: bytes) -> Any:
        raise ArithmeticError

    with pytest.raises(ArithmeticError), pool.acquire() as conn:
        conn.decoders[pymysql.constants.FIELD_TYPE.LONG] = broken
        ask(conn, "select 1 union all select 2")
    with pool.acquire() as again:
        assert again is not conn
        assert ask(again, "select 3") == (3,)
    assert pool.stats().broken_closed == 1


def test_any_pymysql_connect_is_known(mariadb):
    """A pool of somebody's own `pymysql.connect` cancels like one of a URL."""
    with Pool(lambda: pymysql.connect(unix_socket=mariadb.socket, user="app")) as pool:
        with pool.acquire() as conn:
            conn.query("select 1")
        with (
            pytest.raises(DeadlineExceeded),
            pool.acquire(Context.background().with_timeout(0.1)) as again,
        ):
            again.query("select sleep(60)")
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
            conn.query("select sleep(60)")

    worker = in_thread(work)
    eventually(lambda: running(watcher, "sleep(60)"), "the query")
    ctx.cancel("stop")
    with pytest.raises(Cancelled) as caught:
        worker.result()
    assert caught.value.cause == "stop"
    assert number(caught.value.__cause__) == INTERRUPTED
    assert not running(watcher, "sleep(60)")
    with pool.acquire() as conn:
        assert conn is seen[0]
        assert ask(conn, "select 1") == (1,)


def test_a_second_query_under_an_ended_context_is_cancelled_too(pool):
    """The borrower who swallows the first error and goes on is cancelled again."""
    with pool.acquire(Context.background().with_timeout(0.1)) as conn:
        for _ in range(3):
            with pytest.raises(pymysql.OperationalError, match="interrupted"):
                conn.query("select sleep(60)")
            conn.rollback()


def test_a_borrower_that_is_not_in_a_call_is_left_alone(pool, monkeypatch):
    """An ended context cuts nobody's connection while its borrower computes."""
    monkeypatch.setattr("workers.pool.loans.CANCEL_PATIENCE", 0.05)
    ctx = Context.background().with_cancel()
    with pool.acquire(ctx) as conn:
        ctx.cancel()
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            pass
        assert conn.open
    with pool.acquire() as again:
        assert again is conn


def test_rows_that_come_one_by_one_are_cancelled_too(pool):
    """A result that is fetched from the server row by row ends with the context."""
    ctx = Context.background().with_cancel()
    with pytest.raises(Cancelled), pool.acquire(ctx) as conn:
        cursor = conn.cursor(pymysql.cursors.SSCursor)
        cursor.execute("select repeat('x', 50000), sleep(seq > 3) from seq_1_to_100000")
        ctx.cancel()
        with contextlib.closing(cursor):
            cursor.fetchall()


def test_a_cancel_never_hits_the_next_borrower(mariadb):
    """300 cancels, each racing the end of its query on a slow way: none hits what runs later."""
    # Not SLEEP: MariaDB now and then takes a second to end that, and holds up every other one.
    work = "sum(seq) from seq_1_to_20000"
    chance = random.Random(7)
    with Pool.from_url(mariadb.url(), max_open=2) as pool:
        cancel = pool._driver.cancel

        def cancel_late(conn: Any, timeout: float) -> None:
            time.sleep(chance.random() * 0.003)
            cancel(conn, timeout)

        pool._driver.cancel = cancel_late  # type: ignore[method-assign]
        hits = cancelled = 0
        for turn in range(300):
            ctx = Context.background().with_cancel()
            canceller = threading.Timer(chance.random() * 0.003, ctx.cancel)
            canceller.start()
            try:
                with pool.acquire(ctx) as conn:
                    ask(conn, f"select {turn}, {work}")
            except Cancelled:
                cancelled += 1
            try:
                with pool.acquire() as conn:
                    hits += ask(conn, f"select {turn}, {work}")[0] != turn
            except pymysql.MySQLError:
                hits += 1
            canceller.join()
        assert hits == 0
        assert cancelled > 0
        assert pool.stats().open <= 2
        assert pool.stats().broken_closed <= 3, "a cancelled connection is used again"


def test_many_cancels_stay_within_max_open(mariadb, watcher):
    """What cancels is one of the pool's connections: the server never sees more than max_open."""
    watcher.query("create or replace user small identified by '' with max_user_connections 5")
    url = mariadb.url(tcp=True, user="small").replace("/test", "/information_schema")
    ctx = Context.background().with_cancel()
    with Pool.from_url(url, max_open=5, acquire_timeout=10.0) as pool:

        def work() -> None:
            with pool.acquire(ctx) as conn:
                conn.query("select sleep(60)")

        crew = [in_thread(work) for _ in range(4)]
        eventually(lambda: running(watcher, "sleep(60)") == 4, "four queries")
        ctx.cancel("stop")
        for member in crew:
            with pytest.raises(Cancelled) as caught:
                member.result()
            assert number(caught.value.__cause__) == INTERRUPTED
        assert pool.stats().open <= 5
        assert pool.stats().broken_closed == 0
    watcher.query("drop user small")


def test_with_all_connections_lent_the_query_ends_on_the_server_too(mariadb, watcher):
    """None is left to cancel with: the connection is given up, and its place ends its query."""
    ctx = Context.background().with_cancel()
    with Pool.from_url(mariadb.url(), max_open=1) as pool:

        def work() -> None:
            with pool.acquire(ctx) as conn:
                conn.query("select benchmark(1000000000000, md5('x'))")  # it never looks up

        worker = in_thread(work)
        eventually(lambda: running(watcher, "benchmark"), "the query")
        ctx.cancel("stop")
        with pytest.raises(Cancelled):
            worker.result()
        eventually(lambda: not running(watcher, "benchmark"), "its end on the server")
        assert pool.stats().broken_closed == 1
        with pool.acquire() as conn:
            assert ask(conn, "select 1") == (1,)
    eventually(lambda: sessions(watcher) == 0, "the end of all sessions")


# -- servers that go away


def test_a_restart_costs_each_thread_one_query_at_most(own_mariadb):
    """Eight threads, a restart: at most what was in flight fails, and all go on by themselves."""
    failed: list[BaseException] = []
    good: list[float] = []
    end = threading.Event()
    with Pool.from_url(own_mariadb.url(), max_open=8, acquire_timeout=20.0) as pool:

        def work() -> None:
            while not end.is_set():
                try:
                    with pool.acquire() as conn:
                        conn.query("select 1")
                        good.append(time.monotonic())
                except (pymysql.MySQLError, PoolTimeout) as exc:
                    failed.append(exc)

        crew = [in_thread(work) for _ in range(8)]
        eventually(lambda: len(good) > 200, "work")
        own_mariadb.stop()
        own_mariadb.start()
        up = time.monotonic()
        eventually(lambda: good[-1] > up, "work again")
        end.set()
        for member in crew:
            member.result()
        assert len(failed) <= 8
        assert not any(isinstance(exc, PoolTimeout) for exc in failed)
        assert next(at for at in good if at > up) - up < 1.0


def test_a_connection_that_the_server_has_ended_is_not_handed_out(pool, watcher):
    """Five at rest, all killed: not one borrower sees a dead one."""
    conns = [pool.get() for _ in range(5)]
    for conn in conns:
        pool.put(conn)
    for conn in conns:
        watcher.query(f"kill {conn.thread_id()}")
    eventually(lambda: sessions(watcher) == 0, "their end")
    idle_since = time.monotonic()
    eventually(lambda: time.monotonic() > idle_since + 0.01, "a time worth a look")
    for _ in range(5):
        with pool.acquire() as conn:
            assert ask(conn, "select 1") == (1,)
    assert pool.stats().timeouts == 0


def test_a_query_that_the_server_kills_costs_its_connection(pool, watcher):
    """A lost connection in mid-query is told as it is, and the connection is closed."""
    worker = in_thread(lambda: lost(pool))
    eventually(lambda: running(watcher, "sleep(61)"), "the query")
    (number,) = ask(
        watcher,
        "select id from information_schema.processlist where info like '%sleep(61)%' "
        "and id <> connection_id()",
    )
    watcher.query(f"kill {number}")
    with pytest.raises(pymysql.OperationalError):
        worker.result()
    assert pool.stats().broken_closed == 1


def lost(pool: Pool) -> None:
    """Be in a query for a long time."""
    with pool.acquire() as conn:
        conn.query("select sleep(61)")


def test_a_server_that_only_reads_from_now_on_is_left(mariadb, watcher):
    """After a fail-over the write's error closes the connection: a new dial may go elsewhere."""
    watcher.query("create or replace table t (i int)")
    watcher.query("create or replace user reader identified by ''")
    watcher.query("grant select, insert on test.* to reader")
    with Pool.from_url(mariadb.url(tcp=True, user="reader")) as pool:
        watcher.query("set global read_only = 1")
        try:
            with (
                pytest.raises(pymysql.OperationalError, match="read-only"),
                pool.acquire() as conn,
            ):
                conn.query("insert into t values (1)")
        finally:
            watcher.query("set global read_only = 0")
        assert pool.stats().broken_closed == 1
    watcher.query("drop user reader")


def test_a_deaf_peer_is_found_within_a_second(mariadb):
    """A proxy that keeps the connections and passes nothing on costs one check, not ten."""
    with (
        Proxy(mariadb.port) as proxy,
        Pool.from_url(mariadb.url(port=proxy.port), max_open=5, validate_after_idle=0.0) as pool,
    ):
        for conn in [pool.get() for _ in range(5)]:
            pool.put(conn)
        proxy.deafen()
        with pytest.raises(PoolTimeout):
            pool.get(timeout=2.0)
        eventually(lambda: pool.stats().broken_closed == 1, "the first's end")
        assert pool.stats().idle == 0, "the others of its time went with it"
        proxy.cut()
        with pool.acquire(timeout=10.0) as conn:
            assert ask(conn, "select 1") == (1,)


def test_a_dial_to_a_deaf_peer_is_bounded(mariadb):
    """A server that accepts and says nothing holds a dial no longer than connect_timeout."""
    with (
        Proxy(mariadb.port) as proxy,
        Pool.from_url(mariadb.url(port=proxy.port), connect_timeout=0.2) as pool,
    ):
        proxy.deafen()
        with pytest.raises(PoolTimeout, match="timed out"):
            pool.get(timeout=0.6)


def test_a_query_on_a_deaf_connection_ends_with_its_context(mariadb, monkeypatch):
    """Where the server cannot be told, the connection is cut: its borrower is free."""
    monkeypatch.setattr("workers.pool.loans.CANCEL_TIMEOUT", 0.2)
    with Proxy(mariadb.port) as proxy:
        pool = Pool.from_url(mariadb.url(port=proxy.port), max_open=2)
        ctx = Context.background().with_cancel()
        lent, deaf = threading.Event(), threading.Event()

        def work() -> None:
            with pool.acquire(ctx) as conn:
                lent.set()
                deaf.wait(10)
                conn.query("select 1")

        worker = in_thread(work)
        assert lent.wait(10)
        proxy.deafen()
        deaf.set()
        ctx.cancel("stop")
        with pytest.raises(Cancelled):
            worker.result()
        eventually(lambda: pool.stats().broken_closed >= 1, "its end")
        assert pool.close(0).leaked == []
        eventually(lambda: pool.stats().open == 0, "the end of every dial")


def test_a_full_server_is_named_in_the_timeout(mariadb, watcher):
    """The server's refusal is what the borrower reads, and room is used as it comes."""
    watcher.query("create or replace user small identified by '' with max_user_connections 2")
    url = mariadb.url(tcp=True, user="small").replace("/test", "/information_schema")
    pool = Pool.from_url(url, max_open=4)
    try:
        conns = [pool.get() for _ in range(2)]
        with pytest.raises(PoolTimeout, match="max_user_connections") as caught:
            pool.get(timeout=0.3)
        assert isinstance(caught.value.__cause__, pymysql.OperationalError)
        third = in_thread(lambda: pool.get(timeout=10.0))
        eventually(lambda: pool.stats().waiting == 1, "a waiter")
        pool.put(conns.pop(), broken=True)
        pool.put(third.result())
        pool.put(conns.pop())
    finally:
        pool.close(0)
        watcher.query("drop user small")


def test_a_wrong_password_is_told_at_once_and_never_shown(mariadb, watcher):
    """What waiting does not change does not wait, and no text has the password."""
    watcher.query("create or replace user closed identified by 'other'")
    url = f"mysql://closed:s3cr3t@127.0.0.1:{mariadb.port}/test?ssl_disabled=1"
    pool = Pool.from_url(url, acquire_timeout=10.0)
    with pytest.raises(ConnectError, match="Access denied") as caught:
        pool.get()
    texts = [str(caught.value), repr(caught.value), repr(caught.value.__cause__), repr(pool)]
    assert not any("s3cr3t" in text for text in texts)
    pool.close()
    watcher.query("drop user closed")


def test_a_missing_driver_names_its_extra():
    """One clear sentence says what to install."""
    program = """
import sys
sys.modules["pymysql"] = None
from workers.pool import MissingDriverError, Pool
try:
    Pool.from_url("mysql:///db")
except MissingDriverError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True
    )
    assert 'pip install "ackvisor[mysql]"' in done.stdout


# -- fork


def test_a_forked_child_cannot_hurt_the_parents_connections(pool, watcher):
    """Whatever the child does to what it inherited, the parent's session hears nothing of it."""
    lent = pool.get()
    lent.query("select 1")
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
    assert ask(lent, "select 2") == (2,)
    pool.put(lent)
    with pool.acquire() as conn:
        assert ask(conn, "select 3") == (3,)
    assert sessions(watcher) == 2
    assert pool.stats().broken_closed == 0


# -- close


def test_close_with_three_borrowed(mariadb, watcher):
    """One in a query, one idle in a transaction, one forgotten: each is named, none stays open."""
    pool = Pool.from_url(mariadb.url(), max_open=3)
    query = pool.get()
    querying = in_thread(lambda: query.query("select sleep(60)"))
    eventually(lambda: running(watcher, "sleep(60)"), "the query")
    transaction = pool.get()
    transaction.begin()
    forgotten = pool.get()
    began = time.monotonic()
    report = pool.close(0.2)
    assert time.monotonic() - began >= 0.2
    with pytest.raises(pymysql.OperationalError):
        querying.result()
    assert len(report.leaked) == 3
    assert all("cut off from the server" in leak.outcome for leak in report.leaked)
    eventually(lambda: sessions(watcher) == 0, "the end of the sessions")
    assert not running(watcher, "sleep(60)")
    for conn in (query, transaction, forgotten):
        pool.put(conn)
    assert pool.stats().open == 0


def test_a_query_that_close_cancels_in_time_is_not_cut(mariadb, watcher):
    """Its borrower gets half a second to give it back, and the report says so."""
    pool = Pool.from_url(mariadb.url(), max_open=3)

    def work() -> None:
        with pool.acquire() as conn:
            conn.query("select sleep(60)")

    worker = in_thread(work)
    eventually(lambda: running(watcher, "sleep(60)"), "the query")
    report = pool.close(0.1)
    with pytest.raises(pymysql.OperationalError, match="interrupted"):
        worker.result()
    assert [leak.outcome for leak in report.leaked] == [
        "given back after its statement was cancelled"
    ]
    assert report.waited == 1


def test_sixty_four_threads(mariadb):
    """64 threads on 8 connections: all are served, and nobody waits for ever."""
    with Pool.from_url(mariadb.url(), max_open=8, acquire_timeout=20.0) as pool:

        def work(number: int) -> int:
            good = 0
            for turn in range(10):
                with pool.acquire() as conn:
                    good += ask(conn, f"select {number}, {turn}") == (number, turn)
            return good

        crew = [in_thread(partial(work, number)) for number in range(64)]
        assert [member.result() for member in crew] == [10] * 64
        assert pool.stats().open <= 8
