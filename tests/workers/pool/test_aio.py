"""The asyncio shell: on a server in memory, on a real PostgreSQL, on a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.servers import PostgreSQLServer, own_postgresql, postgresql
from tests.servers_mysql_redis import redis_server
from tests.workers.pool.fake import OperationalError
from tests.workers.pool.proxy import Proxy, SlowProxy
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.pool import (
    ConnectError,
    ForkedPoolError,
    Leak,
    PoolClosed,
    PoolDeadlock,
    PoolEvent,
    PoolTimeout,
    WrongPoolError,
)
from workers.pool.aio import AsyncPool

__all__ = ["own_postgresql", "postgresql", "redis_server"]  # fixtures are taken by name

PATIENCE = 20.0


def looped(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in a loop of its own; what the loop complains of, and a task left, fail it."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        complaints: list[dict[str, Any]] = []

        async def listened() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _loop, complaint: complaints.append(complaint))
            async with asyncio.timeout(PATIENCE * 2):
                await test(*args, **kwargs)
            await eventually(lambda: len(asyncio.all_tasks()) == 1, "the end of every task")

        asyncio.run(listened())
        assert complaints == []

    return run


async def eventually(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until the condition holds; fail where it does not in time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        await asyncio.sleep(0.001)


async def turns(count: int) -> None:
    """Let the loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


class FakeConnection:
    """A connection of a driver for asyncio that counts, and breaks on demand."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.holder: object = None
        self.dirty = self.broken = self.closed = False

    async def rollback(self) -> None:
        """End the transaction, when the gate is open."""
        await self.server.turn()
        if self.broken or self.closed:
            raise OperationalError("server closed the connection")
        self.dirty = False

    async def close(self) -> None:
        """Close it: the server sees that."""
        await asyncio.sleep(0)
        assert not self.closed, "closed twice"
        self.closed = True
        self.server.open.discard(self)


@dataclass
class FakeServer:
    """Counts what is open, and the most that ever was."""

    open: set[FakeConnection] = field(default_factory=set)
    most_open: int = 0
    dials: int = 0
    rollbacks: int = 0
    error: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def turn(self) -> None:
        """Answer when the gate is open, and not at once."""
        self.rollbacks += 1
        await asyncio.sleep(0)
        await self.gate.wait()

    async def connect(self) -> FakeConnection:
        """Open a connection: when the gate is open, and unless there is an error to raise."""
        self.dials += 1
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        conn = FakeConnection(self)
        self.open.add(conn)
        self.most_open = max(self.most_open, len(self.open))
        return conn


@pytest.fixture
def server() -> FakeServer:
    """A server of the test's own."""
    return FakeServer()


# -- borrowing and giving back


@looped
async def test_a_connection_is_used_again(server):
    """What comes back is lent again, the one that was used last first, and rolled back."""
    async with AsyncPool(server.connect) as pool:
        first, second = await pool.get(), await pool.get()
        second.dirty = True
        await pool.put(first)
        await pool.put(second)
        async with pool.acquire() as conn:
            assert conn is second
            assert not conn.dirty
        assert server.dials == 2


@looped
async def test_first_come_first_served(server):
    """Waiters are served in the order in which they came."""
    async with AsyncPool(server.connect, max_open=1) as pool:
        conn = await pool.get()
        served: list[int] = []

        async def wait(number: int) -> None:
            async with pool.acquire(timeout=10):
                served.append(number)

        async with asyncio.TaskGroup() as crew:
            for number in range(20):
                crew.create_task(wait(number))
            await eventually(lambda: pool.stats().waiting == 20)
            await pool.put(conn)
        assert served == list(range(20))


@looped
async def test_never_above_max_open_and_all_are_served(server):
    """Thirty tasks on three connections: three are opened, none is lent to two at once."""
    async with AsyncPool(server.connect, max_open=3, acquire_timeout=PATIENCE) as pool:

        async def work(name: int) -> int:
            for _ in range(20):
                async with pool.acquire() as conn:
                    assert conn.holder is None
                    conn.holder = name
                    await asyncio.sleep(0)
                    conn.holder = None
            return name

        assert await asyncio.gather(*(work(name) for name in range(30))) == list(range(30))
        assert server.most_open <= 3
        assert pool.stats().in_use == 0


@looped
async def test_giving_back_twice_or_elsewhere_is_refused(server):
    """A connection is given back once, and to the pool that has lent it."""
    async with AsyncPool(server.connect) as pool, AsyncPool(server.connect) as other:
        conn = await pool.get()
        with pytest.raises(WrongPoolError):
            await other.put(conn)
        await pool.put(conn)
        with pytest.raises(WrongPoolError):
            await pool.put(conn)
        assert pool.stats().idle == 1


@looped
async def test_a_broken_connection_is_closed(server):
    """Said by the borrower, or found by the roll-back."""
    async with AsyncPool(server.connect) as pool:
        await pool.put(await pool.get(), broken=True)
        async with pool.acquire() as conn:
            conn.broken = True
        await eventually(lambda: not server.open)
        assert pool.stats().broken_closed == 2


@looped
async def test_a_timeout_explains_itself_and_is_never_early(server):
    """It names the holding task and where it borrowed, and the last dial's error."""
    async with AsyncPool(server.connect, max_open=2, name="orders") as pool:

        async def hold() -> None:
            async with pool.acquire():
                await done.wait()

        done = asyncio.Event()
        holder = asyncio.create_task(hold(), name="the holder")
        await eventually(lambda: pool.stats().in_use == 1)
        server.error = OperationalError("too many connections")
        began = time.monotonic()
        with pytest.raises(
            PoolTimeout, match=r"'orders'.*the holder in .*hold.*too many"
        ) as caught:
            await pool.get(timeout=0.05)
        assert time.monotonic() - began >= 0.05
        assert caught.value.holders[0].thread == "the holder"
        assert "done.wait" in caught.value.holders[0].now
        assert pool.stats().timeouts == 1
        done.set()
        await holder


@looped
async def test_a_refusal_for_good_is_told_at_once(server):
    """A dial that no waiting helps fails its asker with the driver's error as cause."""
    server.error = ValueError("no such host")
    async with AsyncPool(server.connect, acquire_timeout=PATIENCE) as pool:
        with pytest.raises(ConnectError, match="no such host") as caught:
            await pool.get()
        assert caught.value.__cause__ is server.error


@looped
async def test_what_cannot_be_awaited_is_refused():
    """A connect that blocks is told from one that is for asyncio."""
    async with AsyncPool(object) as pool:  # type: ignore[arg-type]
        with pytest.raises(ConnectError, match="await"):
            await pool.get()


@pytest.mark.parametrize("url", ["mysql://host/db", "mariadb://host/db"])
def test_a_driver_that_can_only_block_is_refused(url):
    """For MySQL the error says what to do instead."""
    with pytest.raises(ValueError, match=r"no driver for asyncio.*to_thread"):
        AsyncPool.from_url(url)


@looped
async def test_a_dial_that_takes_too_long_is_given_up(server):
    """connect_timeout bounds any dial, and the waiter reads so."""
    server.gate.clear()
    async with AsyncPool(server.connect, connect_timeout=0.02) as pool:
        with pytest.raises(PoolTimeout, match=r"not connected within 0\.02 s"):
            await pool.get(timeout=0.1)
        server.gate.set()


@looped
async def test_setup_may_await(server):
    """A coroutine function is awaited, a plain one is called."""

    async def setup(conn: FakeConnection) -> None:
        await conn.rollback()
        conn.holder = "setup"

    async with AsyncPool(server.connect, setup=setup) as pool, pool.acquire() as conn:
        assert conn.holder == "setup"
    plain: list[FakeConnection] = []
    async with AsyncPool(server.connect, setup=plain.append) as pool, pool.acquire() as conn:
        assert plain == [conn]


# -- cancellation: at every turn of the loop


@pytest.mark.parametrize("turn", range(8))
@looped
async def test_a_cancelled_waiter_loses_no_connection(server, turn):
    """Cancelled before, at and after the moment in which it is given one: it goes to the next."""
    async with AsyncPool(server.connect, max_open=1) as pool:
        conn = await pool.get()
        waiter = asyncio.create_task(pool.get())
        await turns(3)
        giving = asyncio.create_task(pool.put(conn))
        await turns(turn)
        waiter.cancel()
        await giving
        with contextlib.suppress(asyncio.CancelledError):
            await pool.put(await waiter)
        assert await pool.get() is conn
        await pool.put(conn)
        assert pool.stats().waiting == 0


@pytest.mark.parametrize("turn", range(8))
@looped
async def test_a_cancelled_return_is_a_return(server, turn):
    """Whenever the task is cancelled that gives it back: it comes back, clean."""
    async with AsyncPool(server.connect, max_open=1) as pool:
        conn = await pool.get()
        conn.dirty = True
        giving = asyncio.create_task(pool.put(conn))
        await turns(turn + 1)
        giving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await giving
        assert await pool.get() is conn
        assert not conn.dirty
        await pool.put(conn)


@pytest.mark.parametrize("turn", range(8))
@looped
async def test_a_cancelled_asker_does_not_waste_its_check(server, turn):
    """The check of a connection goes on without its asker, and serves the next one."""
    async with AsyncPool(server.connect, max_open=1, validate_after_idle=0.0) as pool:
        conn = await pool.get()
        await pool.put(conn)
        server.gate.clear()
        asker = asyncio.create_task(pool.get())
        await turns(turn)
        asker.cancel()
        server.gate.set()
        with contextlib.suppress(asyncio.CancelledError):
            await pool.put(await asker)
        assert await pool.get() is conn
        await pool.put(conn)
        assert pool.stats().broken_closed == 0


@looped
async def test_a_dial_survives_its_asker(server):
    """Whoever comes next gets what the cancelled one had dialled."""
    async with AsyncPool(server.connect) as pool:
        server.gate.clear()
        asker = asyncio.create_task(pool.get())
        await eventually(lambda: server.dials == 1)
        asker.cancel()
        server.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await asker
        async with pool.acquire():
            pass
        assert server.dials == 1


@looped
async def test_an_interrupted_borrowers_connection_is_not_trusted(server):
    """Of an unknown driver nobody knows what a cancelled call has left: it is closed."""
    async with AsyncPool(server.connect) as pool:

        async def work() -> None:
            async with pool.acquire():
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await eventually(lambda: pool.stats().in_use == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: not server.open)
        assert pool.stats().broken_closed == 1


@looped
async def test_two_hundred_tasks_cancelled_at_random(server):
    """Nothing is lost, nothing is lent twice, whatever is cancelled when."""
    chance = random.Random(3)
    async with AsyncPool(server.connect, max_open=4, acquire_timeout=PATIENCE) as pool:

        async def work() -> None:
            for _ in range(10):
                async with pool.acquire() as conn:
                    assert conn.holder is None
                    conn.holder = asyncio.current_task()
                    conn.dirty = True
                    try:
                        await turns(chance.randrange(4))
                    finally:
                        conn.holder = None

        crew = [asyncio.create_task(work()) for _ in range(200)]
        for task in chance.sample(crew, 120):
            await turns(chance.randrange(5))
            task.cancel()
        outcomes = await asyncio.gather(*crew, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError | None) for end in outcomes)
        await eventually(lambda: pool.stats().in_use == 0)
        assert server.most_open <= 4
        conns = [await pool.get() for _ in range(4)]
        assert len(set(conns)) == 4
        for conn in conns:
            await pool.put(conn)


# -- contexts


@looped
async def test_a_waiter_obeys_its_context(server):
    """Cancelled from another thread, or past its deadline, it raises the context's error."""
    async with AsyncPool(server.connect, max_open=1) as pool:
        conn = await pool.get()
        ctx = Context.background().with_cancel()
        waiter = asyncio.create_task(pool.get(ctx))
        await eventually(lambda: pool.stats().waiting == 1)
        canceller = threading.Thread(target=ctx.cancel, args=("stop",))
        canceller.start()
        with pytest.raises(Cancelled, match="stop"):
            await waiter
        canceller.join()
        with pytest.raises(DeadlineExceeded):
            await pool.get(Context.background().with_timeout(0.02))
        assert pool.stats().timeouts == 0
        with pytest.raises(Cancelled):
            await pool.get(ctx)
        await pool.put(conn)


@looped
async def test_everybody_waiting_for_each_other_is_a_deadlock(server):
    """Two tasks that hold one and want another: the younger fails, the older goes on."""
    async with AsyncPool(server.connect, max_open=2, acquire_timeout=PATIENCE) as pool:
        both = asyncio.Barrier(2)

        async def work() -> None:
            async with pool.acquire():
                await both.wait()
                async with pool.acquire():
                    pass

        outcomes = await asyncio.gather(work(), work(), return_exceptions=True)
        assert sum(isinstance(end, PoolDeadlock) for end in outcomes) == 1
        assert outcomes.count(None) == 1


@looped
async def test_a_leak_is_reported_once_with_its_task(server, caplog):
    """The threshold's warning names the task and where it borrowed."""
    caplog.set_level(logging.WARNING, "workers.pool")
    async with AsyncPool(server.connect, leak_threshold=0.02) as pool:
        asyncio.current_task().set_name("forgetful")  # type: ignore[union-attr]
        async with pool.acquire():
            await eventually(lambda: pool.stats().leaks == 1)
            await asyncio.sleep(0.05)
        assert pool.stats().leaks == 1
    assert len(caplog.records) == 1
    assert "forgetful" in caplog.text
    assert "test_a_leak_is_reported_once" in caplog.text


@looped
async def test_a_leak_can_be_told_to_somebody(server):
    """Whoever has set `on_leak` is told instead of the log."""
    async with AsyncPool(server.connect, leak_threshold=0.02) as pool:
        leaks: list[Leak] = []
        pool.on_leak = leaks.append
        async with pool.acquire():
            await eventually(lambda: leaks)
        assert [leak.outcome for leak in leaks] == ["still lent"]


# -- time, settings, events


@looped
async def test_what_is_idle_for_too_long_is_closed(server):
    """The pool's own timer closes it; the minimum stays."""
    async with AsyncPool(server.connect, min=1, max_idle_time=0.02) as pool:
        await eventually(lambda: pool.stats().idle == 1, "the minimum")
        conns = [await pool.get() for _ in range(3)]
        for conn in conns:
            await pool.put(conn)
        await eventually(lambda: len(server.open) == 1)
        assert pool.stats().max_idle_time_closed == 2


@looped
async def test_resize_closes_now_and_on_return(server):
    """When it returns the idle surplus is closed; what is lent follows as it comes back."""
    async with AsyncPool(server.connect, max_open=4) as pool:
        conns = [await pool.get() for _ in range(4)]
        for conn in conns[:2]:
            await pool.put(conn)
        await pool.resize(max_open=1)
        assert len(server.open) == 2
        for conn in conns[2:]:
            await pool.put(conn)
        await eventually(lambda: len(server.open) == 1)
        assert pool.stats().max_open == 1
        with pytest.raises(ValueError, match="max_open"):
            await pool.resize(max_open=0)


@looped
async def test_clear_replaces_every_connection(server):
    """The idle ones now, the lent ones as they come back."""
    async with AsyncPool(server.connect) as pool:
        lent, idle = await pool.get(), await pool.get()
        await pool.put(idle)
        await pool.clear()
        assert idle.closed
        await pool.put(lent)
        async with pool.acquire() as conn:
            assert conn not in (lent, idle)


@looped
async def test_events_are_told_in_their_order(server):
    """The same words as the pool for threads."""
    events: list[PoolEvent] = []
    pool = AsyncPool(server.connect, listener=events.append)
    async with pool.acquire():
        pass
    await pool.close()
    assert [event.name for event in events] == [
        "PoolCreated",
        "PoolReady",
        "ConnectionCheckOutStarted",
        "ConnectionCreated",
        "ConnectionReady",
        "ConnectionCheckedOut",
        "ConnectionCheckedIn",
        "ConnectionClosed",
        "PoolClosed",
    ]


# -- loops and forks


def test_it_belongs_to_one_loop(server):
    """Made before any loop; used in the first, refused in the second."""
    pool = AsyncPool(server.connect, min=1)

    async def use() -> None:
        async with pool.acquire():
            pass

    async def use_and_close() -> None:
        await use()
        await pool.close()

    asyncio.run(use_and_close())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(use())


@looped
async def test_a_forked_child_gets_an_error(server):
    """A child has no use for its parent's pool, and does no harm to it."""
    async with AsyncPool(server.connect) as pool:
        async with pool.acquire() as conn:
            child = os.fork()
            if child == 0:
                try:
                    pool.put(conn).send(None)
                except ForkedPoolError:
                    os._exit(7)
                os._exit(1)
            _, status = os.waitpid(child, 0)  # noqa: ASYNC222 (it ends at once)
            assert os.waitstatus_to_exitcode(status) == 7
        assert pool.stats().idle == 1


# -- close


@looped
async def test_close_waits_and_its_waiters_fail_at_once(server):
    """What is lent is waited for; whoever waits gets PoolClosed now, and is told by whom."""
    pool = AsyncPool(server.connect, max_open=1)
    conn = await pool.get()
    waiter = asyncio.create_task(pool.get(timeout=PATIENCE))
    await eventually(lambda: pool.stats().waiting == 1)
    closing = asyncio.create_task(pool.close(PATIENCE), name="the closer")
    with pytest.raises(PoolClosed, match="the closer"):
        await waiter
    assert not closing.done()
    await pool.put(conn)
    report = await closing
    assert (report.closed, report.waited, report.leaked) == (1, 1, [])
    assert await pool.close() == report
    with pytest.raises(PoolClosed):
        await pool.get()


@looped
async def test_close_reports_what_was_not_given_back(server):
    """The borrower's task and place, and that it keeps the connection."""
    pool = AsyncPool(server.connect)
    conn = await pool.get()
    began = time.monotonic()
    report = await pool.close(0.05)
    assert time.monotonic() - began >= 0.05
    (leak,) = report.leaked
    assert "test_close_reports_what" in leak.stack
    assert leak.outcome == "left to its borrower: closed when it comes back"
    await pool.put(conn)
    await eventually(lambda: conn.closed)


@looped
async def test_a_second_close_shortens_the_first(server):
    """The earlier limit holds, and both return the same report."""
    pool = AsyncPool(server.connect)
    conn = await pool.get()
    first = asyncio.create_task(pool.close(PATIENCE))
    await turns(3)
    second = await pool.close(0.01)
    assert await first == second
    assert len(second.leaked) == 1
    await pool.put(conn)


@pytest.mark.parametrize("turn", range(1, 5))
@looped
async def test_close_abandons_the_dials(server, turn):
    """A dial that hangs, or has not begun, holds up no close and leaves nothing behind."""
    server.gate.clear()
    pool = AsyncPool(server.connect, connect_timeout=PATIENCE * 2)
    asker = asyncio.create_task(pool.get())
    await turns(turn)
    report = await pool.close(PATIENCE)
    assert report.leaked == []
    with pytest.raises(PoolClosed):
        await asker
    assert not server.open
    assert pool.stats().open == 0


@looped
async def test_a_context_ends_the_waiting_of_a_close(server):
    """Its end, from any thread, is the limit."""
    pool = AsyncPool(server.connect)
    conn = await pool.get()
    ctx = Context.background().with_cancel()
    closing = asyncio.create_task(pool.close(ctx))
    await turns(3)
    canceller = threading.Thread(target=ctx.cancel)
    canceller.start()
    report = await closing
    canceller.join()
    assert len(report.leaked) == 1
    await pool.put(conn)


# -- PostgreSQL


def sessions(server: PostgreSQLServer, name: str) -> int:
    """Count the sessions of an application that the server knows of."""
    with server.connect() as watcher:
        row = watcher.execute(
            "select count(*) from pg_stat_activity where application_name = %s", [name]
        ).fetchone()
    return int(row[0])


async def fetch(conn: Any, query: str) -> Any:
    """Return the first row of a query."""
    return await (await conn.execute(query)).fetchone()


@looped
async def test_postgresql_by_its_url(postgresql):
    """psycopg's AsyncConnection, rolled back, with the settings that it had."""
    psycopg = pytest.importorskip("psycopg")
    async with AsyncPool.from_url(postgresql.url(), application_name="async") as pool:
        async with pool.acquire() as conn:
            assert isinstance(conn, psycopg.AsyncConnection)
            await conn.execute("create temporary table t (i int)")
            await conn.commit()
            await conn.set_autocommit(True)
            await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
            conn.row_factory = psycopg.rows.dict_row
        async with pool.acquire() as again:
            assert again is conn
            assert (again.autocommit, again.isolation_level) == (False, None)
            await again.execute("insert into t values (1)")
        async with pool.acquire() as again:
            assert await fetch(again, "select count(*) from t") == (0,)
        assert sessions(postgresql, "async") == 1
    await eventually(lambda: sessions(postgresql, "async") == 0, "the end of the session")


@looped
async def test_postgresql_of_somebodys_own_connect(postgresql):
    """A pool of `AsyncConnection.connect` cancels like one of a URL."""
    psycopg = pytest.importorskip("psycopg")
    async with AsyncPool(lambda: psycopg.AsyncConnection.connect(postgresql.url())) as pool:
        async with pool.acquire() as conn:
            await conn.execute("select 1")
        with pytest.raises(DeadlineExceeded) as caught:
            async with pool.acquire(Context.background().with_timeout(0.05)) as again:
                await again.execute("select pg_sleep(60)")
        assert isinstance(caught.value.__cause__, psycopg.errors.QueryCanceled)
        async with pool.acquire() as again:
            assert again is conn


@looped
async def test_no_cancel_hits_the_next_borrower(postgresql):
    """300 ends of a context or of a task, each racing its query: none hits what runs later."""
    psycopg = pytest.importorskip("psycopg")
    chance = random.Random(5)
    async with AsyncPool.from_url(postgresql.url(), max_open=1) as pool:
        hits = cancelled = 0
        for turn in range(300):
            ctx = Context.background().with_cancel()
            loop = asyncio.get_running_loop()

            async def work(ctx: Context) -> None:
                async with pool.acquire(ctx) as conn:
                    await conn.execute("select pg_sleep(0.002)")

            task = asyncio.create_task(work(ctx))
            end = ctx.cancel if turn % 2 else task.cancel
            alarm = loop.call_later(0.001 + chance.random() * 0.002, end)
            try:
                await task
            except (Cancelled, asyncio.CancelledError):
                cancelled += 1
            try:
                async with pool.acquire() as conn:
                    hits += await fetch(conn, f"select {turn}, pg_sleep(0.002)") != (turn, "")
            except psycopg.Error:
                hits += 1
            alarm.cancel()
        assert hits == 0
        assert cancelled > 0
        assert pool.stats().broken_closed <= 3, "a cancelled connection is used again"


@looped
async def test_a_query_on_a_deaf_connection_ends_with_its_context(postgresql, monkeypatch):
    """Where the server cannot be told, the connection is cut: its task is free."""
    monkeypatch.setattr("workers.pool.aio.CANCEL_TIMEOUT", 0.2)
    with Proxy(postgresql.port) as proxy:
        pool = AsyncPool.from_url(postgresql.url(port=proxy.port), max_open=1)
        ctx = Context.background().with_cancel()
        with pytest.raises(Cancelled):
            async with pool.acquire(ctx) as conn:
                proxy.deafen()
                asyncio.get_running_loop().call_later(0.01, ctx.cancel)
                await conn.execute("select 1")
        await eventually(lambda: pool.stats().broken_closed == 1, "its end")
        assert (await pool.close(0)).leaked == []


@looped
async def test_a_restart_costs_each_task_one_query_at_most(own_postgresql):
    """Eight tasks, a restart: at most what was in flight fails, and all go on by themselves."""
    psycopg = pytest.importorskip("psycopg")
    failed: list[BaseException] = []
    good: list[float] = []
    url = own_postgresql.url()
    async with AsyncPool.from_url(url, max_open=8, acquire_timeout=PATIENCE) as pool:
        end = asyncio.Event()

        async def work() -> None:
            while not end.is_set():
                try:
                    async with pool.acquire() as conn:
                        await conn.execute("select 1")
                        good.append(time.monotonic())
                except (psycopg.Error, PoolTimeout) as exc:
                    failed.append(exc)

        crew = [asyncio.create_task(work()) for _ in range(8)]
        await eventually(lambda: len(good) > 100, "work")
        await asyncio.to_thread(own_postgresql.stop)
        await asyncio.to_thread(own_postgresql.start)
        up = time.monotonic()
        await eventually(lambda: good[-1] > up, "work again")
        end.set()
        await asyncio.gather(*crew)
        assert len(failed) <= 8
        assert not any(isinstance(exc, PoolTimeout) for exc in failed)
        assert next(at for at in good if at > up) - up < 1.0
    await asyncio.get_running_loop().shutdown_default_executor()


@looped
async def test_close_with_three_borrowed(postgresql):
    """One in a query, one idle in a transaction, one forgotten: each is named, none stays open."""
    psycopg = pytest.importorskip("psycopg")
    pool = AsyncPool.from_url(postgresql.url(), application_name="closing", max_open=3)
    query, transaction, forgotten = [await pool.get() for _ in range(3)]
    querying = asyncio.create_task(query.execute("select pg_sleep(60)"))
    await transaction.execute("select 1")
    began = time.monotonic()
    report = await pool.close(0.1)
    assert time.monotonic() - began >= 0.1
    with pytest.raises(psycopg.Error):
        await querying
    assert len(report.leaked) == 3
    assert all("cut off from the server" in leak.outcome for leak in report.leaked)
    await eventually(lambda: sessions(postgresql, "closing") == 0, "the end of the sessions")
    for conn in (query, transaction, forgotten):
        await pool.put(conn)
    await eventually(lambda: pool.stats().open == 0)


@looped
async def test_sixty_four_tasks(postgresql):
    """64 tasks on 8 connections: all are served, evenly."""
    async with AsyncPool.from_url(postgresql.url(), max_open=8, acquire_timeout=PATIENCE) as pool:

        async def work(number: int) -> int:
            good = 0
            for turn in range(5):
                async with pool.acquire() as conn:
                    good += await fetch(conn, f"select {number}, {turn}") == (number, turn)
            return good

        assert await asyncio.gather(*(work(number) for number in range(64))) == [5] * 64
        assert pool.stats().open <= 8


# -- Redis


@looped
async def test_redis_by_its_url(redis_server):
    """redis.asyncio's client on one connection, and its session as it was."""
    redis = pytest.importorskip("redis.asyncio")
    async with AsyncPool.from_url(redis_server.url(), application_name="async") as pool:
        async with pool.acquire() as client:
            assert isinstance(client, redis.Redis)
            await client.set("async", 1)
            async with client.pipeline() as pipe:
                assert await pipe.incr("async").get("async").execute() == [2, b"2"]
            await client.select(5)
        async with pool.acquire() as again:
            assert again is client
            assert (await again.client_info())["db"] == 0
            assert await again.client_getname() == "async"
            pipe = again.pipeline()
            await pipe.watch("async")
            with pytest.raises(redis.RedisError, match="one connection"):
                await again.get("async")
            await pipe.reset()
            await again.delete("async")
        assert pool.stats().broken_closed == 0


@looped
async def test_a_full_redis_is_named_in_the_timeout(redis_server):
    """The server's refusal is what the borrower reads, also where it hangs up at once."""
    pytest.importorskip("redis.asyncio")
    with redis_server.connect() as watcher:
        watcher.config_set("maxclients", 2)
        try:
            async with AsyncPool.from_url(redis_server.url()) as pool, pool.acquire():
                with pytest.raises(PoolTimeout, match="max number of clients reached"):
                    await pool.get(timeout=0.2)
        finally:
            watcher.config_set("maxclients", 1000)


@looped
async def test_a_blocked_command_is_unblocked(redis_server):
    """By the end of its context: the connection lives on. By its task's end: it does not."""
    redis = pytest.importorskip("redis.asyncio")
    url = redis_server.url(tcp=True)
    async with AsyncPool(lambda: made(redis.Redis.from_url(url)), max_open=2) as pool:
        async with pool.acquire() as client:
            await client.ping()
        with pytest.raises(DeadlineExceeded, match=r"timeout of 0\.05 s") as caught:
            async with pool.acquire(Context.background().with_timeout(0.05)) as again:
                await again.blpop(["nothing"], timeout=60)
        assert "UNBLOCKED" in str(caught.value.__cause__)
        assert pool.stats().broken_closed == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), pool.acquire() as again:
                assert again is client
                await again.blpop(["nothing"], timeout=60)
        assert pool.stats().broken_closed == 1
        async with pool.acquire() as another:
            assert await another.echo("mine") == b"mine"


async def made(client: Any) -> Any:
    """Be an `async def connect` of something that connects by itself."""
    return client


@looped
async def test_no_answer_on_its_way_is_ever_somebody_elses(redis_server):
    """300 cancelled tasks while answers are on a slow way (CVE-2023-28858): none is mixed up."""
    pytest.importorskip("redis.asyncio")
    chance = random.Random(13)
    with SlowProxy(redis_server.port, slowest=0.004) as proxy:
        async with AsyncPool.from_url(redis_server.url(port=proxy.port), max_open=2) as pool:
            async with pool.acquire() as client:
                for key in range(10):
                    await client.set(f"key {key}", f"value {key}")
            hits = cancelled = 0
            for turn in range(300):

                async def ask(key: int) -> bool:
                    async with pool.acquire() as client:
                        answer: bytes = await client.get(f"key {key}")
                    return answer != f"value {key}".encode()

                task = asyncio.create_task(ask(turn % 10))
                alarm = asyncio.get_running_loop().call_later(chance.random() * 0.004, task.cancel)
                try:
                    hits += await task
                except asyncio.CancelledError:
                    cancelled += 1
                alarm.cancel()
                hits += await ask(turn % 7)
            assert hits == 0
            assert cancelled > 0
            assert pool.stats().broken_closed > 0, "some were cut in the middle"
