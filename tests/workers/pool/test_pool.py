"""The thread shell on a server in memory: real threads, real locks, real clocks."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from tests.workers.pool.fake import (
    FakeConnection,
    FakeServer,
    OperationalError,
    eventually,
    in_thread,
)
from workers.context import Cancelled, Context, DeadlineExceeded, _End
from workers.pool import (
    CloseReport,
    ConnectError,
    ForkedPoolError,
    Pool,
    PoolClosed,
    PoolDeadlock,
    PoolEvent,
    PoolTimeout,
    WrongPoolError,
)
from workers.pool.shell import NESTED_AFTER


@pytest.fixture
def server() -> FakeServer:
    """A server of the test's own."""
    return FakeServer()


@pytest.fixture
def make(server: FakeServer) -> Iterator[Any]:
    """Make pools that are closed at the end of the test."""
    pools: list[Pool] = []

    def build(**settings: Any) -> Pool:
        pool = Pool(server.connect, **settings)
        pools.append(pool)
        return pool

    yield build
    server.gate.set()
    for pool in pools:
        pool.close(0.0)
    eventually(lambda: not server.dialling, "the end of the dials")


def waiting(pool: Pool, count: int) -> None:
    """Wait until so many wait."""
    eventually(lambda: pool.stats().waiting == count, f"a queue of {count}")


# -- borrowing and giving back


def test_a_connection_is_used_again(make, server):
    """What comes back is lent again, the one that was used last first."""
    pool = make()
    first, second = pool.get(), pool.get()
    pool.put(first)
    pool.put(second)
    with pool.acquire() as conn:
        assert conn is second
    assert len(server.open) == 2
    assert server.dials == 2


def test_an_open_transaction_is_rolled_back(make):
    """A transaction left open ends on the way back."""
    pool = make()
    with pool.acquire() as conn:
        conn.begin()
    with pool.acquire() as again:
        assert again is conn
        assert not again.dirty


def test_the_block_gives_back_when_it_raises(make):
    """An exception leaves the block as it is, and the connection is back."""
    pool = make(max_open=1)
    with pytest.raises(KeyError), pool.acquire() as conn:
        conn.begin()
        raise KeyError("the borrower's")
    assert not conn.dirty
    assert pool.stats().in_use == 0


def test_first_come_first_served(make):
    """Waiters are served in the order in which they came."""
    pool = make(max_open=1)
    conn = pool.get()
    served: list[int] = []

    def wait(number: int) -> None:
        mine = pool.get(timeout=10)
        served.append(number)
        pool.put(mine)

    crew = []
    for number in range(20):
        crew.append(in_thread(functools.partial(wait, number)))
        waiting(pool, number + 1)
    pool.put(conn)
    for member in crew:
        member.result()
    assert served == list(range(20))


def test_never_above_max_open_and_all_are_served(make, server):
    """Thirty threads on three connections: three are opened, each thread gets its turns."""
    pool = make(max_open=3, acquire_timeout=10.0)

    def work() -> int:
        for _ in range(50):
            with pool.acquire() as conn:
                assert isinstance(conn, FakeConnection)
        return 50

    assert [member.result() for member in [in_thread(work) for _ in range(30)]] == [50] * 30
    assert server.most_open <= 3
    assert pool.stats().in_use == 0


def test_giving_back_twice_or_elsewhere_is_refused(make, server):
    """What is not lent by this pool cannot be given back to it."""
    pool = make()
    conn = pool.get()
    pool.put(conn)
    with pytest.raises(WrongPoolError):
        pool.put(conn)
    with pytest.raises(WrongPoolError):
        pool.put(server.connect())
    assert pool.stats().idle == 1


def test_a_broken_connection_is_closed_and_makes_the_others_prove_themselves(make, server):
    """One that cannot roll back is closed; the idle ones are tried before they are lent."""
    pool = make()
    first, second = pool.get(), pool.get()
    pool.put(first)
    second.broken = first.broken = True
    pool.put(second)
    assert second.closed
    with pool.acquire() as third:
        assert third not in (first, second)
    assert first.closed
    assert pool.stats().broken_closed == 2


def test_the_borrower_can_say_that_it_is_broken(make):
    """`put(conn, broken=True)` closes it."""
    pool = make()
    conn = pool.get()
    pool.put(conn, broken=True)
    assert conn.closed
    assert pool.stats().open == 0


def test_setup_sees_each_new_connection_once(server):
    """`setup` is called before a connection is lent for the first time, and never again."""
    seen: list[Any] = []
    with Pool(server.connect, setup=seen.append) as pool:
        for _ in range(3):
            with pool.acquire() as conn:
                assert seen == [conn]


# -- waiting


def test_a_timeout_explains_itself(make):
    """PoolTimeout says how long, which place, what is open, and who has it from where."""
    pool = make(max_open=1, name="orders")
    conn = pool.get()
    began = time.monotonic()
    with pytest.raises(PoolTimeout) as caught:
        pool.get(timeout=0.05)
    assert time.monotonic() - began >= 0.05
    error = caught.value
    assert error.waited >= 0.05
    assert (error.place, error.waiting) == (1, 1)
    assert (error.max_open, error.open, error.idle, error.in_use) == (1, 1, 0, 1)
    assert error.holders[0].thread == threading.current_thread().name
    assert "test_a_timeout_explains_itself" in error.holders[0].stack
    assert re.search(
        r"'orders' within 0\.\d+ s: place 1 of 1 .* 1 of 1 open, 0 idle, 1 in use; "
        r"longest held: .* in test_a_timeout_explains_itself .*1 of them by this thread itself",
        str(error),
    )
    assert pool.stats().timeouts == 1
    pool.put(conn)


def test_a_timeout_shows_the_last_dial_error(make, server):
    """`too many connections` is the cause of the timeout, not hidden behind it."""
    pool = make()
    server.error = OperationalError("FATAL: sorry, too many connections already")
    with pytest.raises(PoolTimeout, match="too many connections") as caught:
        pool.get(timeout=0.05)
    assert caught.value.__cause__ is server.error
    assert caught.value.last_dial_error is server.error


def test_a_refusal_for_good_is_told_at_once(make, server):
    """An error that waiting does not change does not wait for the timeout."""
    pool = make(acquire_timeout=10.0)
    server.error = TypeError("connect() got an unexpected keyword argument")
    with pytest.raises(ConnectError, match="unexpected keyword") as caught:
        pool.get()
    assert caught.value.__cause__ is server.error


def test_the_timeout_bounds_the_dial_and_the_dial_survives_its_asker(make, server):
    """A slow dial does not hold its asker, and the next one gets what it brings."""
    pool = make()
    server.gate.clear()
    with pytest.raises(PoolTimeout):
        pool.get(timeout=0.05)
    later = in_thread(lambda: pool.get(timeout=10))
    waiting(pool, 1)
    server.gate.set()
    later.result()
    assert server.dials == 1


def test_a_failed_dial_does_not_leave_the_waiters_asleep(make, server):
    """When the server is back, whoever waits is served without a timeout having to pass."""
    pool = make(max_open=2, acquire_timeout=10.0)
    server.error = OperationalError("the server is starting up")
    crew = [in_thread(pool.get) for _ in range(2)]
    waiting(pool, 2)
    eventually(lambda: server.dials >= 3, "several dials")
    server.error = None
    for member in crew:
        member.result()


def test_after_a_failure_one_probe_at_a_time(make, server):
    """While the server is away there is one dial in flight, however many wait."""
    pool = make(max_open=8, max_connecting=4, acquire_timeout=10.0)
    server.error = OperationalError("away")
    crew = [in_thread(pool.get) for _ in range(8)]
    waiting(pool, 8)
    eventually(lambda: server.dials > 8, "probes")
    server.most_dialling = 0
    dials = server.dials
    eventually(lambda: server.dials > dials + 5, "more probes")
    assert server.most_dialling == 1
    server.error = None
    for member in crew:
        member.result()
    assert server.most_open == 8


def test_dials_in_flight_are_bounded(make, server):
    """No more than max_connecting dials at once."""
    pool = make(max_open=10, max_connecting=3, acquire_timeout=10.0)
    server.gate.clear()
    crew = [in_thread(pool.get) for _ in range(10)]
    waiting(pool, 10)
    eventually(lambda: server.dialling == 3, "three dials")
    server.gate.set()
    for member in crew:
        member.result()
    assert server.most_dialling == 3


def test_timeouts_are_never_early(make):
    """Thirty-two waiters with a timeout of 100 ms: none gives up before it."""
    pool = make(max_open=1)
    conn = pool.get()

    def wait() -> float:
        began = time.monotonic()
        with contextlib.suppress(PoolTimeout):
            pool.get(timeout=0.1)
        return time.monotonic() - began

    assert min(member.result() for member in [in_thread(wait) for _ in range(32)]) >= 0.1
    assert pool.stats().timeouts == 32
    pool.put(conn)


def test_an_interrupt_while_waiting_leaves_nothing_behind(make):
    """An exception out of a signal handler takes the waiter out of the queue."""
    pool = make(max_open=1)
    conn = pool.get()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            pool.get(timeout=10)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert pool.stats().waiting == 0
    pool.put(conn)
    assert pool.stats().idle == 1


# -- contexts


def test_a_context_that_has_ended_gets_nothing(make, server):
    """An ended context raises its error, and nothing is opened for it."""
    pool = make()
    ctx = Context.background().with_cancel()
    ctx.cancel("stop")
    with pytest.raises(Cancelled) as caught:
        pool.get(ctx)
    assert caught.value.cause == "stop"
    assert server.dials == 0


def test_a_waiter_obeys_its_context(make):
    """Cancelled while it waits: the context's error at once, and its place is free."""
    pool = make(max_open=1)
    conn = pool.get()
    ctx = Context.background().with_cancel()
    waiter = in_thread(lambda: pool.get(ctx, timeout=10))
    waiting(pool, 1)
    ctx.cancel("stop")
    with pytest.raises(Cancelled):
        waiter.result()
    assert pool.stats().waiting == 0
    assert pool.stats().timeouts == 0
    pool.put(conn)


def test_the_earlier_of_deadline_and_timeout_counts(make):
    """A context's deadline before the timeout raises its error; after it, PoolTimeout."""
    pool = make(max_open=1)
    conn = pool.get()
    with pytest.raises(DeadlineExceeded):
        pool.get(Context.background().with_timeout(0.05), timeout=10)
    with pytest.raises(PoolTimeout):
        pool.get(Context.background().with_timeout(10), timeout=0.05)
    pool.put(conn)


def test_cancel_and_hand_over_race(make):
    """However a cancel and a return meet, the connection is not lost and nobody has two."""
    pool = make(max_open=1)
    for _ in range(200):
        conn = pool.get()
        ctx = Context.background().with_cancel()

        def wait(ctx: Context = ctx) -> bool:
            try:
                with pool.acquire(ctx, timeout=10):
                    return True
            except Cancelled:
                return False

        waiter = in_thread(wait)
        waiting(pool, 1)
        canceller = in_thread(ctx.cancel)
        pool.put(conn)
        canceller.result()
        waiter.result()
        assert pool.stats().in_use == 0
        assert pool.stats().idle == 1


def test_what_is_handed_to_an_ended_context_goes_on(make):
    """Served and cancelled at once: the context's error, and the connection is back."""

    class Ended(Context):
        """Ends without a word: only who looks finds out."""

        @property
        def done(self) -> bool:
            return ended.is_set()

    ended = threading.Event()
    pool = make(max_open=1)
    conn = pool.get()
    ctx = Ended(None, math.inf, None, None)
    waiter = in_thread(lambda: pool.get(ctx, timeout=10))
    waiting(pool, 1)
    ended.set()
    ctx._ends.append(_End("stop", 0.0, None))
    pool.put(conn)
    with pytest.raises(Cancelled):
        waiter.result()
    assert pool.stats().idle == 1


# -- closing


def test_close_waits_for_what_is_lent(make):
    """Given back in time: closed, waited for, not leaked."""
    pool = make()
    pool.put(pool.get(), broken=True)  # closed before: not the close's doing
    conns = [pool.get() for _ in range(3)]
    pool.put(conns.pop())
    closing = in_thread(lambda: pool.close(10))
    eventually(lambda: conns[0].server.dials and pool.stats().idle == 0, "the close")
    for conn in conns:
        pool.put(conn)
    assert closing.result() == CloseReport(closed=3, waited=2, leaked=[])


def test_close_reports_what_was_not_given_back(make, server):
    """Three borrowed and a waiter: the waiter fails at once, the close ends at its limit."""
    pool = make(max_open=3)
    conns = [pool.get() for _ in range(3)]
    waiter = in_thread(lambda: pool.get(timeout=10))
    waiting(pool, 1)
    began = time.monotonic()
    report = pool.close(0.2)
    assert time.monotonic() - began >= 0.2
    with pytest.raises(PoolClosed, match=r"was closed by MainThread 0\.\d+ s ago"):
        waiter.result()
    assert waiter.ended_at < began + 0.2
    assert (report.closed, report.waited, len(report.leaked)) == (0, 0, 3)
    for leak in report.leaked:
        assert leak.held_seconds >= 0.2
        assert leak.thread == "MainThread"
        assert "test_close_reports_what_was_not_given_back" in leak.stack
        assert "left to its borrower" in leak.outcome
    for conn in conns:
        assert not conn.closed
        pool.put(conn)
        assert conn.closed
    assert pool.stats().open == 0


def test_after_close_nothing_is_lent(make):
    """A closed pool says so, and a second close returns the same report."""
    pool = make()
    with pool.acquire():
        pass
    report = pool.close()
    assert report == CloseReport(closed=1, waited=0, leaked=[])
    assert pool.close(0) is report
    with pytest.raises(PoolClosed):
        pool.get()


def test_a_second_close_can_shorten_the_first(make):
    """Whoever needs it over sooner gets that."""
    pool = make()
    conn = pool.get()
    first = in_thread(lambda: pool.close(60))
    eventually(lambda: pool.stats().idle == 0 and pool._closing is not None, "the first close")
    second = pool.close(0.05)
    assert first.result() == second
    assert len(second.leaked) == 1
    pool.put(conn)


def test_a_context_ends_the_waiting_of_a_close(make):
    """A close under a context waits until that ends."""
    pool = make()
    conn = pool.get()
    ctx = Context.background().with_cancel()
    closing = in_thread(lambda: pool.close(ctx))
    eventually(lambda: pool._closing is not None, "the close")
    ctx.cancel("stop")
    assert len(closing.result().leaked) == 1
    pool.put(conn)


def test_a_dial_in_flight_is_abandoned_by_close(make, server):
    """Close does not wait for a dial, and what the dial brings is closed."""
    pool = make()
    server.gate.clear()
    asker = in_thread(lambda: pool.get(timeout=10))
    eventually(lambda: server.dialling == 1, "the dial")
    assert pool.close(10) == CloseReport(closed=0, waited=0, leaked=[])
    with pytest.raises(PoolClosed):
        asker.result()
    server.gate.set()
    eventually(lambda: pool.stats().open == 0, "the end of the dial")
    assert not server.open


def test_a_close_that_hangs_in_the_driver_does_not_hold_the_pool(server):
    """Step 1 is bounded too: a close() that never returns is left alone."""
    stuck = threading.Event()

    class Stuck(FakeConnection):
        def close(self) -> None:
            stuck.wait(10)
            super().close()

    def connect() -> FakeConnection:
        conn = Stuck(server, 1)
        server.open.add(conn)
        return conn

    pool = Pool(connect)
    with pool.acquire():
        pass
    began = time.monotonic()
    pool.close(0.1)
    assert time.monotonic() - began < 5
    stuck.set()
    eventually(lambda: pool.stats().open == 0, "the late close")


# -- leaks, nesting, deadlock


def test_a_leak_is_told_once_with_its_stack(server):
    """Longer than the threshold: one event with the borrower's stack, and it counts."""
    events: list[PoolEvent] = []
    with Pool(server.connect, leak_threshold=0.05, listener=events.append) as pool:
        conn = pool.get()
        eventually(lambda: [event for event in events if event.leak], "the leak")
        pool.put(conn)
        with pool.acquire():
            pass
        leaks = [event.leak for event in events if event.leak is not None]
        assert pool.stats().leaks == len(leaks) == 1
        assert leaks[0].held_seconds >= 0.05
        assert "test_a_leak_is_told_once_with_its_stack" in leaks[0].stack
        assert "test_a_leak_is_told_once_with_its_stack" in leaks[0].now


def test_a_loan_may_have_a_threshold_of_its_own(server):
    """Longer than the pool's for slow work, or 0 for none."""
    events: list[PoolEvent] = []
    with Pool(server.connect, leak_threshold=0.05, listener=events.append) as pool:
        patient, unlimited, plain = pool.get(leak_threshold=30), pool.get(leak_threshold=0), None
        plain = pool.get()
        eventually(lambda: pool.stats().leaks == 1, "the leak")
        for conn in (patient, unlimited, plain):
            pool.put(conn)
        hasty = pool.get(leak_threshold=0.01)
        eventually(lambda: pool.stats().leaks == 2, "the second leak")
        pool.put(hasty)


def test_without_a_listener_a_leak_goes_to_the_log(make, caplog):
    """A library's user finds it where warnings are found."""
    pool = make(leak_threshold=0.02, name="orders")
    with caplog.at_level(logging.WARNING), pool.acquire():
        eventually(lambda: caplog.records, "the warning")
    assert "'orders'" in caplog.text
    assert "test_without_a_listener_a_leak_goes_to_the_log" in caplog.text


def test_holders_are_known_without_a_threshold(make):
    """Who has what since when, longest first."""
    pool = make(leak_threshold=0)
    first = pool.get()
    release = threading.Event()

    def hold() -> None:
        with pool.acquire():
            release.wait(10)

    holder = in_thread(hold)
    eventually(lambda: len(pool.holders()) == 2, "two holders")
    oldest, newest = pool.holders()
    assert oldest.held_seconds >= newest.held_seconds
    assert oldest.thread == "MainThread"
    assert newest.thread == holder.name
    assert "in test_holders_are_known_without_a_threshold.<locals>.hold" in newest.stack
    eventually(lambda: "release.wait" in pool.holders()[1].now, "the wait in its stack")
    release.set()
    holder.result()
    pool.put(first)
    assert pool.holders() == []


def test_a_nested_acquire_that_waits_is_noticed_once(server):
    """A thread that waits for a second connection is told of, once per pool."""
    events: list[str] = []
    with Pool(server.connect, max_open=2, listener=lambda e: events.append(e.name)) as pool:
        conns = [pool.get(), pool.get()]
        for _ in range(2):
            with pytest.raises(PoolTimeout):
                pool.get(timeout=0.1)
        for conn in conns:
            pool.put(conn)
    assert events.count("CheckOutNested") == 1


def test_a_wait_cycle_fails_the_youngest_with_both_stacks(make):
    """Every holder waits for this pool: the last of them is told at once, the others go on."""
    pool = make(max_open=2, acquire_timeout=30.0)
    both = threading.Barrier(2)

    def outer() -> str:
        with pool.acquire():
            both.wait(10)
            return inner()

    def inner() -> str:
        with pool.acquire():
            return "served"

    crew = [in_thread(outer), in_thread(outer)]
    for member in crew:
        member.join(10)
    errors = [member.error for member in crew if member.error is not None]
    assert len(errors) == 1
    assert isinstance(errors[0], PoolDeadlock)
    text = str(errors[0])
    assert text.index("in test_a_wait_cycle_fails_the_youngest_with_both_stacks.<locals>.outer")
    assert "got its own here" in text
    assert ".inner" in text.partition("wants another one here")[2]
    assert pool.stats().in_use == 0


def test_one_connection_and_a_nested_acquire_is_a_cycle(make):
    """The simplest cycle needs one thread."""
    pool = make(max_open=1, acquire_timeout=30.0)
    with pool.acquire(), pytest.raises(PoolDeadlock), pool.acquire():
        pass
    assert pool.stats().idle == 1


def test_a_cycle_through_a_context_manager_is_seen(make):
    """A block of the borrower's own `@contextmanager` is his block."""
    pool = make(max_open=1, acquire_timeout=30.0)

    @contextlib.contextmanager
    def session() -> Iterator[Any]:
        with pool.acquire() as conn:
            yield conn

    with session(), pytest.raises(PoolDeadlock), session():
        pass
    assert pool.stats().idle == 1


def test_a_loan_that_another_thread_will_end_is_no_cycle(make):
    """get and put may be in two threads: a waiter with such a loan is not accused."""
    pool = make(max_open=1, acquire_timeout=10.0)
    conn = pool.get()

    def elsewhere() -> None:
        waiting(pool, 1)
        threading.Event().wait(4 * NESTED_AFTER)  # time enough for an accusation
        pool.put(conn)

    other = in_thread(elsewhere)
    with pool.acquire() as again:
        assert again is conn
    other.result()


def test_a_block_that_a_generator_keeps_open_is_no_cycle(make):
    """A dependency that yields its connection may be ended by any thread: not accused."""
    pool = make(max_open=1, acquire_timeout=10.0)

    def dependency() -> Iterator[Any]:
        with pool.acquire() as conn:
            yield conn

    kept = dependency()
    next(kept)

    def elsewhere() -> None:
        waiting(pool, 1)
        threading.Event().wait(4 * NESTED_AFTER)  # time enough for an accusation
        with contextlib.suppress(StopIteration):
            next(kept)

    other = in_thread(elsewhere)
    again = dependency()
    next(again)
    other.result()
    with contextlib.suppress(StopIteration):
        next(again)
    assert pool.stats().in_use == 0


# -- changing while running


def test_resize_down_closes_the_idle_now_and_the_lent_on_return(make, server):
    """A shrink that shrinks: open is at most the new maximum once the surplus is back."""
    pool = make(max_open=6)
    conns = [pool.get() for _ in range(6)]
    for conn in conns[:2]:
        pool.put(conn)
    pool.resize(max_open=3)
    assert pool.stats().open == 4
    assert all(conn.closed for conn in conns[:2])
    pool.put(conns[2])
    assert conns[2].closed
    for conn in conns[3:]:
        pool.put(conn)
    assert pool.stats().open == pool.stats().idle == 3
    assert len(server.open) == 3


def test_resize_up_serves_who_waits(make):
    """More room is used at once."""
    pool = make(max_open=1, acquire_timeout=10.0)
    pool.get()
    waiter = in_thread(pool.get)
    waiting(pool, 1)
    pool.resize(max_open=2)
    waiter.result()
    assert pool.stats().max_open == 2


def test_a_smaller_max_idle_closes_at_once(make):
    """And what comes back above it is closed too."""
    pool = make(max_open=4)
    conns = [pool.get() for _ in range(4)]
    for conn in conns[:3]:
        pool.put(conn)
    pool.resize(max_idle=1)
    assert pool.stats().idle == 1
    pool.put(conns[3])
    assert pool.stats().idle == 1
    assert pool.stats().max_idle_closed == 3


def test_a_setting_that_cannot_be_meant_changes_nothing(make):
    """It is refused with its name."""
    pool = make(max_open=4)
    with pytest.raises(ValueError, match="max_idle must be between 0 and max_open"):
        pool.resize(max_idle=9)
    with pytest.raises(ValueError, match="max_open must be a whole number"):
        Pool(FakeServer().connect, max_open=0)
    assert pool.stats().max_open == 4


def test_clear_replaces_every_connection(make):
    """The idle ones now, the lent ones as they come back."""
    pool = make()
    lent, idle = pool.get(), pool.get()
    pool.put(idle)
    pool.clear()
    assert idle.closed
    assert not lent.closed
    pool.put(lent)
    assert lent.closed
    with pool.acquire() as fresh:
        assert fresh not in (lent, idle)


# -- time


def test_an_idle_connection_leaves_after_its_time_but_the_minimum_stays(make, server):
    """Idle longer than max_idle_time: closed down to min."""
    pool = make(max_idle_time=0.05, min=1)
    conns = [pool.get() for _ in range(3)]
    for conn in conns:
        pool.put(conn)
    eventually(lambda: pool.stats().open == 1, "the idle ones' end")
    assert pool.stats().max_idle_time_closed == 2
    assert len(server.open) == 1


def test_an_old_connection_is_replaced(make):
    """Older than max_lifetime: closed, on its way back or at rest."""
    pool = make(max_lifetime=0.05)
    old = pool.get()
    eventually(lambda: time.monotonic() and pool.holders()[0].held_seconds > 0.06, "its age")
    pool.put(old)
    eventually(lambda: old.closed, "its end")
    with pool.acquire() as fresh:
        pass
    eventually(lambda: fresh.closed, "the end of a resting one")
    assert pool.stats().max_lifetime_closed == 2


def test_the_minimum_is_opened_in_the_background(make, server):
    """`min` connections are there without anybody asking, and again after they broke."""
    pool = make(min=2)
    eventually(lambda: pool.stats().idle == 2, "the minimum")
    pool.clear()
    eventually(lambda: pool.stats().idle == 2 and server.dials == 4, "the minimum again")


def test_keepalive_finds_a_dead_connection_at_rest(make):
    """An idle connection is tried every so often, and closed where it does not answer."""
    pool = make(keepalive=0.05)
    with pool.acquire() as conn:
        pass
    eventually(lambda: conn.rollbacks >= 4, "a few tries")
    conn.broken = True
    eventually(lambda: conn.closed, "its end")
    assert pool.stats().broken_closed == 1


def test_an_idle_connection_is_tried_before_it_is_lent(make):
    """Idle longer than validate_after_idle and broken meanwhile: not lent."""
    pool = make(validate_after_idle=0)
    with pool.acquire() as conn:
        pass
    conn.broken = True
    with pool.acquire() as fresh:
        assert fresh is not conn
    assert conn.closed


def threads(name: str) -> set[str]:
    """Return the names of a pool's threads, without its own; a keeper is of any pool."""
    prefix = f"pool-{name}-"
    names = {thread.name for thread in threading.enumerate()}
    found = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    stacks = "".join(
        "".join(traceback.format_stack(frame)) for frame in sys._current_frames().values()
    )
    return found | {"keeper" for _ in range(stacks.count("keeper.py"))}


def test_no_thread_while_nothing_needs_one(make):
    """A pool that was not used has none; one at rest has its keeper; a closed one has none."""
    pool = make(name="quiet")
    assert threads("quiet") == set()
    with pool.acquire():
        pass
    eventually(lambda: threads("quiet") == {"keeper"}, "the dial's end")
    pool.close()
    eventually(lambda: threads("quiet") == set(), "the keeper's end")


def test_a_forgotten_pool_ends_its_thread(server):
    """Nothing of the pool keeps it alive once nobody refers to it."""
    pool = Pool(server.connect, name="forgotten")
    with pool.acquire():
        pass
    eventually(lambda: threads("forgotten") == {"keeper"}, "the dial's end")
    del pool
    gc.collect()
    eventually(lambda: threads("forgotten") == set(), "the keeper's end")


def test_a_pool_at_rest_does_not_wake_up(make):
    """Once nothing is lent, the keeper sleeps until an idle connection has to leave."""
    pool = make(leak_threshold=0.05, validate_after_idle=0.01)
    with pool.acquire():
        pass
    eventually(lambda: pool._keeper.wakes_at > time.monotonic() + 60, "the keeper's long sleep")


# -- events, figures


def test_the_events_of_a_life(server):
    """CMAP's events, in its words and order."""
    events: list[tuple[str, str | None]] = []
    pool = Pool(server.connect, listener=lambda e: events.append((e.name, e.reason)))
    with pool.acquire():
        pass
    pool.put(pool.get())
    pool.clear()
    server.error = TypeError("no")
    with pytest.raises(ConnectError):
        pool.get()
    pool.close()
    with pytest.raises(PoolClosed):
        pool.get()
    assert events == [
        ("PoolCreated", None),
        ("PoolReady", None),
        ("ConnectionCheckOutStarted", None),
        ("ConnectionCreated", None),
        ("ConnectionReady", None),
        ("ConnectionCheckedOut", None),
        ("ConnectionCheckedIn", None),
        ("ConnectionCheckOutStarted", None),
        ("ConnectionCheckedOut", None),
        ("ConnectionCheckedIn", None),
        ("PoolCleared", None),
        ("ConnectionClosed", "stale"),
        ("ConnectionCheckOutStarted", None),
        ("ConnectionCreated", None),
        ("ConnectionClosed", "error"),
        ("ConnectionCheckOutFailed", "connectionError"),
        ("PoolClosed", None),
        ("ConnectionCheckOutStarted", None),
        ("ConnectionCheckOutFailed", "poolClosed"),
    ]


def test_a_listener_that_raises_changes_nothing(make, server, caplog):
    """It is told of in the log, and the pool goes on."""

    def listener(_event: PoolEvent) -> None:
        raise ZeroDivisionError

    with Pool(server.connect, listener=listener) as pool, pool.acquire():
        pass
    assert "ZeroDivisionError" in caplog.text


def test_histograms_count_everything_once(make):
    """Each acquire is in `wait`, each return in `use`, each dial in `create`."""
    pool = make(max_open=1, acquire_timeout=10.0)
    for _ in range(5):
        with pool.acquire():
            pass
    conn = pool.get()
    waiter = in_thread(lambda: pool.put(pool.get()))
    waiting(pool, 1)
    pool.put(conn)
    waiter.result()
    histograms = pool.histograms()
    assert histograms["wait"].count == 7
    assert histograms["use"].count == 7
    assert histograms["create"].count == 1
    assert histograms["wait"].sum > 0
    assert pool.stats().wait_count == 1
    assert pool.stats().wait_seconds > 0


# -- fork and exit


def test_a_forked_child_is_refused_and_the_parent_goes_on(make):
    """The child gets ForkedPoolError from every verb, leaves the block in peace, closes nothing."""
    pool = make()
    kept = pool.get()
    read, write = os.pipe()
    child = 0
    with pool.acquire() as conn:
        child = os.fork()
        if child == 0:
            said = []
            for verb in (pool.get, lambda: pool.put(kept), pool.close, pool.clear, pool.resize):
                try:
                    verb()
                except ForkedPoolError:
                    said.append("refused")
            os.write(write, " ".join(said).encode())
    if child == 0:
        os.write(write, f" {conn.closed} {conn.rollbacks} {kept.closed}".encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode()
    assert status == 0
    assert told == "refused refused refused refused refused False 0 False"
    pool.put(kept)
    assert pool.stats().idle == 2


def test_a_child_forked_while_the_lock_is_held_is_refused(make):
    """The lock's holder does not exist in the child: it must not be waited for."""
    pool = make()
    with pool._lock:
        child = os.fork()
        if child == 0:
            try:
                pool.get()
            except ForkedPoolError:
                os._exit(7)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_the_interpreter_ends_with_a_pool_in_use():
    """A program that never closes its pool ends at once, and quietly."""
    program = """
import sqlite3, threading
from workers.pool import Pool
pool = Pool(lambda: sqlite3.connect(":memory:", check_same_thread=False), min=1)
held = pool.get()
threading.Thread(target=pool.get, daemon=True).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
