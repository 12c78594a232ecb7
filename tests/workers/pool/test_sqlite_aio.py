"""SQLite in asyncio: real files, and statements that take as long as nobody interrupts them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.workers.pool.test_aio import eventually, looped
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.pool import Leak, MissingDriverError, PoolTimeout
from workers.pool.aio import AsyncPool
from workers.pool.drivers import aio as drivers

ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"


@pytest.fixture
def path(tmp_path):
    """A file with a table."""
    path = tmp_path / "app.db"
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("create table t (x)")
    return path


def opened(path: Path, **keys: Any) -> AsyncPool:
    """Make a pool for a file."""
    return AsyncPool.from_url(f"sqlite:///{path}", name="main", **keys)


async def count(pool: AsyncPool) -> int:
    """Return how many rows are there for others to see."""
    async with pool.acquire() as conn, conn.execute("select count(*) from t") as cursor:
        (rows,) = await cursor.fetchone()
    return int(rows)


@looped
async def test_what_is_not_committed_is_rolled_back_and_settings_are_taken_back(path):
    """The connection is aiosqlite's own, and as it was new for each borrower."""
    async with opened(path, max_open=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("insert into t values (1)")
            await conn.commit()
            await conn.execute("insert into t values (2)")
            conn.row_factory = sqlite3.Row
        async with pool.acquire() as again:
            assert again is conn
            assert again.row_factory is None
            assert not again.in_transaction
        assert await count(pool) == 1
        assert pool.stats().open == 1


@looped
async def test_the_end_of_a_context_interrupts_the_statement(path):
    """The block raises the context's error; the connection is as good as before."""
    async with opened(path, max_open=1) as pool:
        ctx = Context.background().with_cancel()
        with pytest.raises(Cancelled) as caught:
            async with pool.acquire(ctx) as conn:
                asyncio.get_running_loop().call_later(0.05, ctx.cancel)
                await conn.execute_fetchall(ENDLESS)
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        assert await count(pool) == 0
        assert pool.stats().open == 1


@looped
async def test_what_a_cancelled_task_leaves_running_is_interrupted(path):
    """In the block or out of it: whoever is next waits for nothing, and finds no transaction."""
    async with opened(path, max_open=1, acquire_timeout=10.0) as pool:
        for sql in (ENDLESS, f"insert into t {ENDLESS}"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), pool.acquire() as conn:
                    await conn.execute_fetchall(sql)
            async with pool.acquire() as conn:
                assert not conn.in_transaction
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(conn.execute(sql), 0.05)
        assert await count(pool) == 0


@looped
async def test_a_context_ends_the_wait_for_anothers_lock(path):
    """Which SQLite itself does not let go of."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin immediate")
        async with AsyncPool.from_url(f"sqlite:///{path}?timeout=100") as pool:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                async with pool.acquire(Context.background().with_timeout(0.1)) as conn:
                    await conn.execute("insert into t values (1)")
            assert time.monotonic() - began < 50.0  # half of its busy time-out
            other.execute("rollback")
            async with pool.acquire() as conn:
                await conn.execute("insert into t values (1)")
                await conn.commit()
            assert await count(pool) == 1


@looped
async def test_a_close_interrupts_and_names_who_did_not_give_back(path):
    """The leak is told with its task; a statement that runs on ends with the last grace."""
    pool = opened(path)
    leaks: list[Leak] = []
    pool.on_leak = leaks.append
    taken = asyncio.Event()

    async def leaker() -> None:
        conn = await pool.get(leak_threshold=0.05)
        taken.set()
        with contextlib.suppress(sqlite3.OperationalError):
            await conn.execute_fetchall(ENDLESS)
        try:
            await asyncio.Event().wait()
        finally:
            await pool.put(conn)

    task = asyncio.create_task(leaker(), name="leaker")
    await taken.wait()
    await eventually(lambda: leaks, "a leak is told")
    report = await pool.close(0.05, last_grace=0.05)
    (leak,) = report.leaked
    assert (leak.thread, leaks[0].thread) == ("leaker", "leaker")
    assert "leaker" in leak.stack
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@looped
async def test_sixty_four_tasks_on_four_connections(path):
    """Never above max_open, and everybody is served."""
    async with opened(path, max_open=4, acquire_timeout=30.0) as pool:

        async def work(number: int) -> None:
            async with pool.acquire() as conn:
                await conn.execute("insert into t values (?)", (number,))
                await conn.commit()

        await asyncio.gather(*(work(number) for number in range(64)))
        assert await count(pool) == 64
        assert pool.stats().open <= 4


@looped
async def test_a_connection_that_its_borrower_has_closed_is_replaced(path):
    async with opened(path, max_open=1) as pool:
        async with pool.acquire() as conn:
            await conn.close()
        assert await count(pool) == 0


@looped
async def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    async with opened(tmp_path / "no" / "folder" / "app.db") as pool:
        with pytest.raises(Exception, match="unable to open database file"):
            await pool.get()


@looped
async def test_who_waits_is_crowded_and_who_cannot_connect_is_an_outage(path):
    """Both are told in the loop; a lock that passes is no outage."""
    crowded: list[int] = []
    outages: list[BaseException | None] = []
    async with opened(path, max_open=1) as pool:
        pool.on_crowded = lambda: crowded.append(pool.stats().in_use)
        pool.on_outage = outages.append
        async with pool.acquire():
            with pytest.raises(PoolTimeout):
                await pool.get(timeout=0.05)
    assert crowded == [1]
    assert outages == []


def test_without_aiosqlite_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiosqlite", None)
    monkeypatch.delitem(sys.modules, "workers.pool.drivers.sqlite_aio", raising=False)
    with pytest.raises(MissingDriverError, match=r'pip install "ackvisor\[sqlite\]"'):
        drivers.module_of("sqlite:///x.db")
