"""The pool on real SQLite files."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers.pool.fake import eventually, in_thread
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.pool import ConnectError, ForkedPoolError, Pool
from workers.pool.stacks import where_is

ENDLESS = "with recursive r(i) as (select 1 union all select i + 1 from r) select max(i) from r"
LONG = (
    "with recursive r(i) as (select 1 union all select i + 1 from r where i < 8000) "
    "select max(i) from r"
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A file of the test's own, with a table."""
    url = f"sqlite:///{tmp_path}/test.db"
    with Pool.from_url(url) as pool, pool.acquire() as conn:
        conn.execute("create table t (i integer)")
        conn.commit()
    return url


@pytest.fixture
def pool(url: str) -> Iterator[Pool]:
    """A pool on it."""
    with Pool.from_url(url, max_open=4) as pool:
        yield pool


# -- URLs


def test_relative_and_absolute_files(tmp_path, monkeypatch):
    """Three slashes are relative to the working folder, four are absolute, as in SQLAlchemy."""
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite:///one.db", f"sqlite:////{tmp_path}/two%20and%3F.db"):
        with Pool.from_url(url) as pool, pool.acquire() as conn:
            conn.execute("create table t (i)")
    assert (tmp_path / "one.db").exists()
    assert (tmp_path / "two and?.db").exists()


def test_the_file_is_in_wal_mode_unless_said_otherwise(tmp_path):
    """Readers and a writer in several processes do not block each other."""
    for query, mode in (("", "wal"), ("?journal_mode=delete", "delete")):
        url = f"sqlite:///{tmp_path}/{mode}.db{query}"
        with Pool.from_url(url) as pool, pool.acquire() as conn:
            assert conn.execute("pragma journal_mode").fetchone() == (mode,)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "another one in each connection"),
        ("sqlite:///a.db?cache=shared", "unknown in a SQLite URL: cache; known are mode"),
        ("sqlite:///a.db?mode=rx", "must be ro, rw or rwc"),
        ("sqlite:///a.db?timeout=soon", "must be a number of seconds"),
        ("sqlite:///a.db?journal_mode=off", "must be wal, delete"),
        ("oracle://app:s3cr3t@db", "no driver for a URL that begins with oracle://"),
        ("s3cr3t", "no driver for a text that is no URL"),
    ],
)
def test_a_wrong_url_is_refused_with_its_reason(url, what):
    """At once, by name, and without its password."""
    with pytest.raises(ValueError, match=what) as caught:
        Pool.from_url(url)
    assert "s3cr3t" not in str(caught.value)


def test_a_missing_folder_is_told_at_once(tmp_path):
    """It does not wait for the timeout: the folder stays missing."""
    with Pool.from_url(f"sqlite:///{tmp_path}/no/such/file.db", acquire_timeout=30.0) as pool:
        with pytest.raises(ConnectError, match="unable to open database file"):
            pool.get()
        with pytest.raises(ConnectError):
            pool.get()
        assert pool.stats().open == 0


def test_the_files_own_folder_is_made(tmp_path):
    """As the file itself is; a folder above it has to be there."""
    with Pool.from_url(f"sqlite:///{tmp_path}/var/new.db") as pool, pool.acquire():
        assert (tmp_path / "var" / "new.db").exists()


def test_a_read_only_pool_cannot_write(url):
    """mode=ro neither creates nor changes anything."""
    with Pool.from_url(f"{url}?mode=ro") as pool, pool.acquire() as conn:
        assert conn.execute("select count(*) from t").fetchone() == (0,)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            conn.execute("insert into t values (1)")


# -- the connection


def test_the_asker_opens_it_himself(pool):
    """A file needs no thread to be opened."""
    before = set(threading.enumerate())
    with pool.acquire():
        assert set(threading.enumerate()) == before


def test_what_is_not_committed_is_rolled_back(pool):
    """A transaction left open ends on the way back; a commit lasts."""
    with pool.acquire() as conn:
        conn.execute("insert into t values (1)")
        assert conn.in_transaction
    with pool.acquire() as again:
        assert again is conn
        assert not again.in_transaction
        assert again.execute("select count(*) from t").fetchone() == (0,)
        again.execute("insert into t values (2)")
        again.commit()
    with pool.acquire() as conn:
        assert conn.execute("select i from t").fetchall() == [(2,)]


def test_changed_settings_do_not_reach_the_next_borrower(url):
    """Row factory, isolation level and text factory are as `setup` left them."""

    def setup(conn: sqlite3.Connection) -> None:
        conn.execute("pragma foreign_keys = on")
        conn.isolation_level = "IMMEDIATE"

    with Pool.from_url(url, setup=setup) as pool:
        with pool.acquire() as conn:
            conn.row_factory = sqlite3.Row
            conn.isolation_level = None
            conn.text_factory = bytes
        with pool.acquire() as again:
            assert again is conn
            assert again.row_factory is None
            assert again.isolation_level == "IMMEDIATE"
            assert again.execute("select 'a'").fetchone() == ("a",)
            assert again.execute("pragma foreign_keys").fetchone() == (1,)


def test_a_connection_closed_by_its_borrower_is_replaced(pool):
    """It is noticed on the way back."""
    with pool.acquire() as conn:
        conn.close()
    with pool.acquire() as fresh:
        assert fresh.execute("select 1").fetchone() == (1,)
    assert pool.stats().broken_closed == 1


def test_any_sqlite_connect_is_known(tmp_path):
    """A pool of somebody's own `sqlite3.connect` cancels like one of a URL."""
    path = tmp_path / "own.db"
    with Pool(lambda: sqlite3.connect(path, check_same_thread=False)) as pool:
        with (
            pytest.raises(DeadlineExceeded),
            pool.acquire(Context.background().with_timeout(0.1)) as conn,
        ):
            conn.execute(ENDLESS)
        with pool.acquire() as again:
            assert again is conn


# -- cancel


def test_the_end_of_a_context_ends_the_statement(pool):
    """The block raises the context's error with the driver's as cause; the connection lives on."""
    ctx = Context.background().with_cancel()
    inside = threading.Event()

    def work() -> None:
        with pool.acquire(ctx) as conn:
            inside.set()
            conn.execute(ENDLESS)

    worker = in_thread(work)
    assert inside.wait(10)
    ctx.cancel("stop")
    with pytest.raises(Cancelled) as caught:
        worker.result()
    assert caught.value.cause == "stop"
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    with pool.acquire() as conn:
        assert conn.execute("select 1").fetchone() == (1,)
    assert pool.stats().open == 1


def test_a_cancelled_write_leaves_no_transaction(pool):
    """An interrupted INSERT is undone whole, and the next borrower can write."""
    with (
        pytest.raises(DeadlineExceeded),
        pool.acquire(Context.background().with_timeout(0.1)) as conn,
    ):
        conn.execute("insert into t values (1)")
        conn.execute(f"insert into t {ENDLESS.replace('max(i)', 'i')}")
    with pool.acquire() as conn:
        assert not conn.in_transaction
        conn.execute("insert into t values (2)")
        conn.commit()
        assert conn.execute("select i from t").fetchall() == [(2,)]


def test_a_cancel_never_hits_the_next_borrower(url):
    """300 cancels, each racing the end of its statement: none hits what runs there afterwards."""
    with Pool.from_url(url, max_open=1) as pool:
        hits = cancelled = 0
        for turn in range(300):
            ctx = Context.background().with_cancel()
            canceller = threading.Timer(turn % 15 * 0.0001, ctx.cancel)
            canceller.start()
            try:
                with pool.acquire(ctx) as conn:
                    conn.execute(LONG).fetchone()
            except Cancelled:
                cancelled += 1
            try:
                with pool.acquire() as conn:
                    conn.execute(LONG).fetchone()
            except sqlite3.Error:
                hits += 1
            canceller.join()
        assert hits == 0
        assert cancelled > 0
        assert pool.stats().open == 1
        assert pool.stats().broken_closed == 0, "a cancelled connection is used again"


# -- another's lock


def lock(url: str) -> sqlite3.Connection:
    """Take the write lock, from outside the pool."""
    holder = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("begin immediate")
    return holder


def test_a_wait_for_anothers_lock_obeys_the_context(pool, url):
    """SQLite's own wait cannot be interrupted; under a context it can."""
    holder = lock(url)
    began = time.monotonic()
    with (
        pytest.raises(DeadlineExceeded) as caught,
        pool.acquire(Context.background().with_timeout(0.5)) as conn,
    ):
        conn.execute("insert into t values (1)")
    assert 0.5 <= time.monotonic() - began < 4.0, "not as long as SQLite alone would wait"
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    holder.close()


def test_a_wait_for_anothers_lock_ends_with_the_lock(pool, url):
    """Under a context as without one, and everything that was given is written once."""
    for ctx in (None, Context.background().with_timeout(30)):
        for write in (
            lambda conn: conn.execute("insert into t values (?)", (1,)),
            lambda conn: conn.executemany("insert into t values (?)", iter([(2,), (3,)])),
            lambda conn: conn.cursor().execute("begin immediate"),
        ):
            holder = lock(url)

            def work(ctx: Any = ctx, write: Any = write) -> None:
                with pool.acquire(ctx) as conn:
                    write(conn)
                    conn.commit()

            worker = in_thread(work)
            worker.join(0.15)
            assert worker.is_alive(), "it waits for the lock"
            holder.close()
            worker.result()
    with pool.acquire() as conn:
        assert conn.execute("select i from t order by i").fetchall() == [
            (1,), (1,), (2,), (2,), (3,), (3,),
        ]  # fmt: skip


def test_a_lock_that_stays_is_busy_after_the_urls_timeout(url):
    """Under a context the wait is still no longer than SQLite's own would be."""
    holder = lock(url)
    with Pool.from_url(f"{url}?timeout=0.2") as pool:
        for ctx in (None, Context.background().with_timeout(30)):
            began = time.monotonic()
            with pytest.raises(sqlite3.OperationalError, match="locked"), pool.acquire(ctx) as conn:
                conn.execute("insert into t values (1)")
            assert 0.2 <= time.monotonic() - began < 5.0
    holder.close()


def test_a_stale_snapshot_is_not_waited_for(pool, url):
    """A read transaction that wants to write after somebody else wrote can never: at once."""
    with (
        pytest.raises(sqlite3.OperationalError) as caught,
        pool.acquire(Context.background().with_timeout(30)) as conn,
    ):
        conn.execute("begin")
        conn.execute("select count(*) from t").fetchone()
        other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("insert into t values (9)")
        other.close()
        began = time.monotonic()
        conn.execute("insert into t values (1)")
    assert time.monotonic() - began < 2.0
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_BUSY_SNAPSHOT


# -- close, fork, many


def test_close_leaves_a_connection_in_use_to_its_borrower(pool):
    """It interrupts, and never closes under a call: that would end the interpreter."""
    forgotten = pool.get()
    busy = pool.get()
    worker = in_thread(lambda: busy.execute(ENDLESS))
    eventually(lambda: "execute(ENDLESS)" in where_is(worker.ident), "the statement")
    report = pool.close(0.1)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        worker.result()
    assert len(report.leaked) == 2
    assert {leak.outcome for leak in report.leaked} == {
        "left to its borrower: closed when it comes back"
    }
    assert forgotten.execute("select 1").fetchone() == (1,)
    pool.put(busy)
    pool.put(forgotten)
    with pytest.raises(sqlite3.ProgrammingError):
        forgotten.execute("select 1")


def test_closing_under_load_does_not_crash(tmp_path):
    """Thirty closes while eight threads are in the middle of a statement; the process lives."""
    program = f"""
import sqlite3, threading
from workers.pool import Pool, PoolClosed
LONG = {LONG!r}
def work(pool):
    try:
        while True:
            with pool.acquire() as conn:
                conn.execute(LONG).fetchone()
    except (PoolClosed, sqlite3.OperationalError):
        pass
for turn in range(30):
    pool = Pool.from_url("sqlite:///{tmp_path}/crash.db", max_open=4)
    crew = [threading.Thread(target=work, args=(pool,)) for _ in range(8)]
    for thread in crew: thread.start()
    while pool.stats().in_use < 4: pass
    pool.close(0.001 * (turn % 3))
    for thread in crew: thread.join()
    assert pool.stats().open == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_touches_nothing(pool):
    """It is refused, and what the parent had in hand goes on."""
    with pool.acquire() as conn:
        conn.execute("insert into t values (1)")
        child = os.fork()
        if child == 0:
            try:
                pool.get()
            except ForkedPoolError:
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        conn.commit()
    with pool.acquire() as conn:
        assert conn.execute("select count(*) from t").fetchone() == (1,)


def test_sixty_four_threads_write_and_read(pool):
    """Every commit is there once, and no more than four connections were open."""

    def work() -> None:
        for _ in range(3):
            with pool.acquire(timeout=60.0) as conn:
                conn.execute("begin immediate")
                conn.execute("insert into t values (1)")
                conn.commit()

    for member in [in_thread(work) for _ in range(64)]:
        member.join(60)
        member.result()
    with pool.acquire() as conn:
        assert conn.execute("select count(*) from t").fetchone() == (192,)
    assert pool.stats().open <= 4
