"""A worker's leases: real pools, a link of the test's own, and what is said over it."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from supervisor.protocol import Allowance, PoolSettings, Usage
from tests.supervised import wait_until
from workers.context import Cancelled, Context
from workers.leases import PAUSE, Leases
from workers.pool import Pool

QUIET = 1.0  # seconds: several windows in which nobody may speak


class Connection:
    """A connection that a test counts; closing it may take until the test says so."""

    open = 0
    may_close = threading.Event()
    lock = threading.Lock()

    def __init__(self) -> None:
        with Connection.lock:
            Connection.open += 1

    def rollback(self) -> None:
        """Be a DB-API connection."""

    def close(self) -> None:
        Connection.may_close.wait(10.0)
        with Connection.lock:
            Connection.open -= 1


class Wire:
    """The link's thread, and what was sent over it."""

    def __init__(self) -> None:
        self.sent: list[Usage] = []
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def call_at(self, when: float, action: Callable[[], object]) -> None:
        with self._changed:
            heapq.heappush(self._timers, (when, next(self._numbers), action))
            self._changed.notify()

    def call(self, action: Callable[[], object]) -> None:
        """Run it on the link's thread, and return when it has returned."""
        done = threading.Event()

        def run() -> None:
            action()
            done.set()

        self.call_at(0.0, run)
        assert done.wait(0.5), "the link's thread is blocked"

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                if self._over:
                    return
                left = self._timers[0][0] - time.monotonic() if self._timers else None
                if left is None or left > 0:
                    self._changed.wait(left)
                    continue
                _, _, action = heapq.heappop(self._timers)
            action()


class Worker:
    """One worker with one pool under a budget."""

    def __init__(self, allowance: int, max_open: int = 10) -> None:
        self.wire = Wire()
        settings = PoolSettings(
            url="x", max_open=max_open, max_idle=max_open, allowance=allowance, serial=1
        )
        self.leases = Leases(
            {"main": settings}, self.wire.sent.append, self.wire.call_at, Pool.resize
        )
        self.ctx = Context.background().with_cancel()
        self.pool: Pool | None = None
        self.serial = 1

    def open(self) -> Pool:
        def make(max_open: int, max_idle: int) -> Pool:
            return Pool(
                Connection, max_open=max_open, max_idle=max_idle, leak_threshold=0, max_idle_time=0
            )

        self.pool = self.leases.open("main", make, self.ctx)
        return self.pool

    def tell(self, allowance: int, *, unused_only: bool = False) -> int:
        """Tell it, as the supervisor would; return the serial."""
        self.serial += 1
        message = Allowance("main", allowance, self.serial, unused_only)
        self.wire.call(lambda: self.leases.told(message))
        return self.serial

    def answer(self, serial: int) -> Usage:
        wait_until(lambda: any(u.serial == serial for u in self.wire.sent), "an answer")
        return next(u for u in self.wire.sent if u.serial == serial)

    def is_silent(self, since: int) -> bool:
        deadline = time.monotonic() + QUIET
        while time.monotonic() < deadline:
            if len(self.wire.sent) > since:
                return False
            time.sleep(PAUSE)
        return True


@contextlib.contextmanager
def worker(allowance: int, **keys: Any) -> Iterator[Worker]:
    """Run a worker; nothing of it is left."""
    Connection.may_close.set()
    it = Worker(allowance, **keys)
    try:
        yield it
    finally:
        Connection.may_close.set()
        if it.pool is not None:
            it.pool.close(1.0)
        it.wire.end()
        wait_until(
            lambda: not any(t.name == "ackvisor-leases" for t in threading.enumerate()),
            "its threads have ended",
        )
    assert Connection.open == 0


def test_the_pool_begins_with_its_allowance_and_says_nothing():
    """Whoever finds what he needs costs no message and no timer."""
    with worker(3) as it:
        pool = it.open()
        assert pool.stats().max_open == 3
        for conn in [pool.get() for _ in range(3)]:
            pool.put(conn)
        assert it.is_silent(0)
        assert not it.wire._timers


def test_who_is_short_says_so_once_and_again_when_that_is_over():
    """However many wait and for however long: one request, and one word of its end."""
    with worker(2, max_open=4) as it:
        pool = it.open()
        held = [pool.get(), pool.get()]
        got: list[Any] = []
        waiters = [threading.Thread(target=lambda: got.append(pool.get())) for _ in range(5)]
        for waiter in waiters:
            waiter.start()
        wait_until(lambda: it.wire.sent, "a request")
        wait_until(lambda: pool.stats().waiting == 5, "all wait")
        wait_until(lambda: it.wire.sent[-1].wanted == 4, "never above max_open")
        said = len(it.wire.sent)
        assert it.is_silent(said)
        it.tell(4)
        wait_until(lambda: len(got) == 2, "two more")
        for conn in held:
            pool.put(conn)
        while len(got) < 5 or got:
            wait_until(lambda: got, "the next one")
            pool.put(got.pop())
            if not any(waiter.is_alive() for waiter in waiters) and not got:
                break
        wait_until(lambda: it.wire.sent[-1].wanted == 0, "it wants nothing any more")
        for waiter in waiters:
            waiter.join()


def test_however_many_are_short_it_is_looked_after_once():
    """Threads that come to wait all the time do not add to the work of the link."""
    with worker(2) as it:
        pool = it.open()
        it.tell(2)
        end = time.monotonic() + QUIET

        def hammer() -> None:
            while time.monotonic() < end:
                with pool.acquire():
                    pass

        threads = [threading.Thread(target=hammer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert it.wire.sent
        assert len(it.wire._timers) <= 1


def test_idle_connections_are_closed_at_once_and_then_it_answers():
    """The answer comes when they are closed, not before; meanwhile the link is not held up."""
    with worker(4) as it:
        pool = it.open()
        for conn in [pool.get() for _ in range(4)]:
            pool.put(conn)
        Connection.may_close.clear()
        serial = it.tell(1)
        assert it.is_silent(0)
        it.wire.call(lambda: None)
        Connection.may_close.set()
        assert it.answer(serial) == Usage("main", serial, 1, 0)
        assert Connection.open == 1


def test_what_is_in_use_is_given_back_when_it_comes_back():
    """A tell that takes away is answered only when the last borrowed one above it is closed."""
    with worker(3) as it:
        pool = it.open()
        held = [pool.get() for _ in range(3)]
        serial = it.tell(1)
        pool.put(held.pop())
        assert it.is_silent(0)
        pool.put(held.pop())
        assert it.answer(serial).accepted == 1
        assert Connection.open == 1
        pool.put(held.pop())


def test_unused_only_takes_nothing_that_is_in_use():
    """It keeps what it uses, says so at once, and is held to that."""
    with worker(4) as it:
        pool = it.open()
        held = [pool.get() for _ in range(3)]
        serial = it.tell(1, unused_only=True)
        answer = it.answer(serial)
        assert (answer.accepted, answer.wanted) == (3, 3)
        assert pool.stats().max_open == 3
        for conn in held:
            pool.put(conn)


def test_more_is_there_at_once_and_needs_no_answer():
    """Idle ones are kept up to the new number as well."""
    with worker(1) as it:
        pool = it.open()
        it.tell(5)
        wait_until(lambda: pool.stats().max_open == 5, "the new allowance")
        for conn in [pool.get() for _ in range(5)]:
            pool.put(conn)
        assert pool.stats().idle == 5
        assert it.is_silent(0)


def test_old_and_foreign_tells_change_nothing():
    """A serial that was there before, and a pool that is not under a budget."""
    with worker(3) as it:
        pool = it.open()
        it.wire.call(lambda: it.leases.told(Allowance("main", 1, 1)))
        it.wire.call(lambda: it.leases.told(Allowance("nobody's", 1, 9)))
        assert it.is_silent(0)
        assert pool.stats().max_open == 3


def test_a_pool_without_a_lease_opens_when_the_first_one_comes():
    """Until then its worker waits; a stop ends the waiting."""
    with worker(0) as it:
        opener = threading.Thread(target=it.open)
        opener.start()
        assert it.is_silent(0)
        assert it.pool is None
        it.tell(2)
        opener.join(5.0)
        assert it.pool is not None
        assert it.pool.stats().max_open == 2
    with worker(0) as it:
        threading.Timer(0.05, it.ctx.cancel).start()
        for _ in range(2):  # and one that has come before
            with pytest.raises(Cancelled):
                it.open()
