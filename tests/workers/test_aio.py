"""The event loop of a worker: what other threads hand over to it, and pools kept from outside."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from supervisor.protocol import Allowance, PoolSettings
from tests.supervised import wait_until
from tests.workers.pool.test_aio import eventually
from tests.workers.test_leases import Wire
from workers.aio import EventLoop
from workers.context import Context
from workers.entry import is_async
from workers.leases import Leases
from workers.pool.aio import AsyncPool


class InThread:
    """A call from another thread; it says what came of it."""

    def __init__(self, loop: EventLoop, work: Any) -> None:
        self.outcome: Any = None
        self._loop, self._work = loop, work
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        try:
            self.outcome = self._loop.call(self._work)
        except Exception as exc:
            self.outcome = exc

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def joined(self) -> Any:
        self._thread.join(10.0)
        assert not self.waits
        return self.outcome


@pytest.fixture
def loop():
    """A loop that a test may leave as a worker does: open, and never run again."""
    loop = EventLoop(asyncio.SelectorEventLoop)
    yield loop
    loop.end()
    loop._runner.close()


async def nothing() -> None: ...


async def for_ever() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise ValueError("on purpose")


def test_what_is_handed_over_before_the_loop_runs_is_done_when_it_does(loop):
    """In the order in which it came."""
    done: list[int] = []

    async def note(number: int) -> None:
        done.append(number)

    calls = []
    for number in range(5):
        calls.append(InThread(loop, lambda number=number: note(number)))
        wait_until(lambda: len(loop._handed_over) == len(calls), "it is handed over")
    assert all(call.waits for call in calls)
    assert done == []
    loop.run(asyncio.sleep(0.01))
    assert [call.joined() for call in calls] == [True] * 5
    assert done == list(range(5))


def test_who_has_handed_over_waits_no_longer_than_the_loop(loop):
    """Neither for what has begun, nor for what was never run; and afterwards for nothing."""
    begun = InThread(loop, for_ever)
    wait_until(lambda: loop._handed_over, "it is handed over")
    loop.run(asyncio.sleep(0.01))
    late = InThread(loop, nothing)
    wait_until(lambda: len(loop._handed_over) == 2, "it is handed over")
    assert begun.waits
    assert late.waits
    loop.end()
    assert begun.joined() is False
    assert late.joined() is False
    assert loop.call(nothing) is False


def test_what_was_handed_over_and_fails_is_told_to_who_did(loop):
    call = InThread(loop, fails)
    wait_until(lambda: loop._handed_over, "it is handed over")
    loop.run(asyncio.sleep(0.01))
    assert isinstance(call.joined(), ValueError)


class Connection:
    """A connection of a driver for asyncio, counted."""

    open = 0

    async def rollback(self) -> None: ...

    async def close(self) -> None:
        Connection.open -= 1


async def connect() -> Connection:
    await asyncio.sleep(0)
    Connection.open += 1
    return Connection()


def test_an_allowance_is_kept_by_a_pool_that_lives_in_a_loop(loop):
    """It waits for its first lease without blocking others, grows, shrinks, and answers when that is so."""
    wire = Wire()
    settings = PoolSettings(url="x", max_open=10, max_idle=10, allowance=0, serial=1)

    def resize(pool: AsyncPool, **changed: Any) -> None:
        loop.call(lambda: pool.resize(**changed))

    leases = Leases({"main": settings}, wire.sent.append, wire.call_at, resize)

    def tell(allowance: int, serial: int) -> None:
        wire.call(lambda: leases.told(Allowance("main", allowance, serial)))

    def make(max_open: int, max_idle: int) -> AsyncPool:
        return AsyncPool(connect, max_open=max_open, max_idle=max_idle, leak_threshold=0)

    async def life() -> None:
        opening = asyncio.create_task(
            leases.open_async("main", make, Context.background().with_cancel())
        )
        await asyncio.sleep(0.05)
        assert not opening.done()
        await asyncio.to_thread(tell, 1, 2)
        pool = await opening
        held = [await pool.get()]
        more = [asyncio.create_task(pool.get(timeout=10.0)) for _ in range(2)]
        await eventually(lambda: wire.sent and wire.sent[-1].wanted == 3, "it says what it wants")
        await asyncio.to_thread(tell, 3, 3)
        held += await asyncio.gather(*more)
        await asyncio.to_thread(tell, 1, 4)
        await pool.put(held.pop())
        await asyncio.sleep(0.05)
        assert not any(usage.serial == 4 for usage in wire.sent)
        await pool.put(held.pop())
        await eventually(lambda: any(usage.serial == 4 for usage in wire.sent), "an answer")
        assert Connection.open == pool.stats().max_open == 1
        await pool.put(held.pop())
        await pool.close(1.0)

    try:
        loop.run(life())
        loop.end()
        tell(0, 5)  # the loop has ended: nobody is held up by that
        wait_until(lambda: any(usage.serial == 5 for usage in wire.sent), "an answer")
    finally:
        wire.end()
    assert Connection.open == 0


class Called:
    async def __call__(self, worker: Any) -> None: ...

    async def method(self, worker: Any) -> None: ...


def plain(worker: Any) -> None: ...


@pytest.mark.parametrize(
    ("entry", "expected"),
    [(fails, True), (Called(), True), (Called().method, True), (plain, False), (Called, False)],
)
def test_what_has_to_be_awaited(entry, expected):
    assert is_async(entry) is expected
