"""The cases of MongoDB's CMAP specification, told in our words and run against this pool.

Each is named after the published case, does its operations, and compares the events that it
names, in order; what a case does not name is left out of the comparison. Two of its rules are not
ours: a cleared pool is not paused (its waiters keep their place), and a failed dial is tried again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.workers.pool.fake import FakeServer, eventually, in_thread
from workers.pool import Pool, PoolClosed, PoolEvent, PoolTimeout


class Case:
    """A pool, its events, and connections by label."""

    def __init__(self) -> None:
        self.server = FakeServer()
        self.events: list[PoolEvent] = []
        self.pool: Any = None

    def open(self, **options: Any) -> Pool:
        """Make the pool."""
        pool = Pool(self.server.connect, listener=self.events.append, **options)
        self.pool = pool
        return pool

    def count(self, name: str) -> int:
        """Count the events of this name so far."""
        return sum(1 for event in self.events if event.name == name)

    def told(self, *names: str) -> list[Any]:
        """Return the events of these names: name and connection, and the reason where there is."""
        return [
            (event.name, event.connection, event.reason)
            if event.reason
            else (event.name, event.connection)
            for event in self.events
            if event.name in names
        ]


@pytest.fixture
def case() -> Iterator[Case]:
    """Return a case; its pool is closed afterwards."""
    case = Case()
    yield case
    case.server.gate.set()
    case.pool.close(0)
    eventually(lambda: not case.server.dialling, "the end of the dials")


def test_connection_must_have_id_and_must_order_ids(case):
    """Connections are numbered from one, in the order of their creation."""
    pool = case.open()
    for conn in [pool.get(), pool.get()]:
        pool.put(conn)
    created = case.told("ConnectionCreated")
    assert created == [("ConnectionCreated", 1), ("ConnectionCreated", 2)]


def test_pool_checkin_destroy_closed(case):
    """What comes back to a closed pool is closed."""
    pool = case.open()
    conn = pool.get()
    pool.close(0)
    pool.put(conn)
    assert case.told(
        "ConnectionCheckedOut", "PoolClosed", "ConnectionCheckedIn", "ConnectionClosed"
    ) == [
        ("ConnectionCheckedOut", 1),
        ("PoolClosed", None),
        ("ConnectionCheckedIn", 1),
        ("ConnectionClosed", 1, "poolClosed"),
    ]


def test_pool_checkin_destroy_stale(case):
    """What was lent before a clear is closed when it comes back."""
    pool = case.open()
    conn = pool.get()
    pool.clear()
    pool.put(conn)
    assert case.told(
        "ConnectionCheckedOut", "PoolCleared", "ConnectionCheckedIn", "ConnectionClosed"
    ) == [
        ("ConnectionCheckedOut", 1),
        ("PoolCleared", None),
        ("ConnectionCheckedIn", 1),
        ("ConnectionClosed", 1, "stale"),
    ]


def test_pool_checkin_make_available(case):
    """What comes back is what the next one gets."""
    pool = case.open()
    pool.put(pool.get())
    pool.put(pool.get())
    assert (
        case.told("ConnectionCheckedOut", "ConnectionCheckedIn")
        == [
            ("ConnectionCheckedOut", 1),
            ("ConnectionCheckedIn", 1),
        ]
        * 2
    )


def test_pool_checkout_no_idle(case):
    """One that was idle for too long is closed, and another one is made."""
    pool = case.open(max_idle_time=0.05)
    pool.put(pool.get())
    eventually(lambda: case.count("ConnectionClosed"), "its end")
    pool.put(pool.get())
    assert case.told("ConnectionCheckedOut", "ConnectionClosed")[:3] == [
        ("ConnectionCheckedOut", 1),
        ("ConnectionClosed", 1, "idle"),
        ("ConnectionCheckedOut", 2),
    ]


def test_pool_checkout_no_stale(case):
    """One from before a clear is never lent again."""
    pool = case.open()
    pool.put(pool.get())
    pool.clear()
    pool.put(pool.get())
    assert case.told("ConnectionCheckedOut", "ConnectionClosed", "PoolCleared") == [
        ("ConnectionCheckedOut", 1),
        ("PoolCleared", None),
        ("ConnectionClosed", 1, "stale"),
        ("ConnectionCheckedOut", 2),
    ]


def test_pool_checkout_error_closed(case):
    """A closed pool says so."""
    pool = case.open()
    pool.close()
    with pytest.raises(PoolClosed):
        pool.get()
    assert case.told("PoolClosed", "ConnectionCheckOutStarted", "ConnectionCheckOutFailed") == [
        ("PoolClosed", None),
        ("ConnectionCheckOutStarted", None),
        ("ConnectionCheckOutFailed", None, "poolClosed"),
    ]


def test_pool_checkout_max_connecting_is_enforced(case):
    """The third dial begins when one of the two before it has ended."""
    pool = case.open(max_connecting=2)
    case.server.gate.clear()
    crew = [in_thread(lambda: pool.get(timeout=10)) for _ in range(3)]
    eventually(lambda: pool.stats().waiting == 3, "three waiters")
    eventually(lambda: case.count("ConnectionCreated") == 2, "two dials")
    assert pool.stats().open == 2
    case.server.gate.set()
    conns = [member.result() for member in crew]
    created = [event.name for event in case.events if event.connection == 3]
    third = next(
        index
        for index, event in enumerate(case.events)
        if event.name == "ConnectionCreated" and event.connection == 3
    )
    assert created[0] == "ConnectionCreated"
    assert "ConnectionReady" in [event.name for event in case.events[:third]]
    for conn in conns:
        pool.put(conn)


def test_pool_checkout_max_connecting_timeout(case):
    """Who waits for room to dial waits no longer than its timeout."""
    pool = case.open(max_connecting=2)
    case.server.gate.clear()
    crew = [in_thread(lambda: pool.get(timeout=10)) for _ in range(2)]
    eventually(lambda: case.count("ConnectionCreated") == 2, "two dials")
    with pytest.raises(PoolTimeout):
        pool.get(timeout=0.05)
    assert case.told("ConnectionCheckOutFailed") == [("ConnectionCheckOutFailed", None, "timeout")]
    case.server.gate.set()
    for member in crew:
        pool.put(member.result())


def test_pool_checkout_returned_connection_max_connecting(case):
    """Who waits for room to dial takes what comes back before the dials have ended."""
    pool = case.open(max_connecting=2)
    kept = pool.get()
    case.server.gate.clear()
    crew = [in_thread(lambda: pool.get(timeout=10)) for _ in range(3)]
    eventually(lambda: pool.stats().waiting == 3, "three waiters")
    pool.put(kept)
    eventually(lambda: case.count("ConnectionCheckedOut") == 2, "the second check-out")
    assert case.told("ConnectionCheckedOut", "ConnectionCheckedIn") == [
        ("ConnectionCheckedOut", 1),
        ("ConnectionCheckedIn", 1),
        ("ConnectionCheckedOut", 1),
    ]
    case.server.gate.set()
    for member in crew:
        pool.put(member.result())


def test_pool_close_destroy_conns(case):
    """What is idle is closed before the pool says that it is."""
    pool = case.open()
    conns = [pool.get() for _ in range(3)]
    pool.put(conns[1])
    pool.close(0)
    assert case.told("ConnectionCheckedIn", "ConnectionClosed", "PoolClosed") == [
        ("ConnectionCheckedIn", 2),
        ("ConnectionClosed", 2, "poolClosed"),
        ("PoolClosed", None),
    ]
    for conn in (conns[0], conns[2]):
        pool.put(conn)


def test_pool_create_min_size(case):
    """The minimum is made without anybody asking."""
    case.open(min=3)
    eventually(lambda: case.count("ConnectionReady") == 3, "the minimum")
    assert case.events[0].name == "PoolCreated"


def test_pool_create_max_size(case):
    """The fourth waits until one of three comes back, and no fourth is made."""
    pool = case.open(max_open=3)
    conns = [pool.get() for _ in range(3)]
    waiter = in_thread(lambda: pool.get(timeout=10))
    eventually(lambda: pool.stats().waiting == 1, "the fourth")
    pool.put(conns.pop())
    conns.append(waiter.result())
    assert case.count("ConnectionCreated") == 3
    for conn in conns:
        pool.put(conn)


def test_wait_queue_timeout(case):
    """Who waits in vain is told so, and the connection is there for the next one."""
    pool = case.open(max_open=1)
    conn = pool.get()
    with pytest.raises(PoolTimeout):
        pool.get(timeout=0.05)
    pool.put(conn)
    assert case.told("ConnectionCheckOutFailed", "ConnectionCheckedIn") == [
        ("ConnectionCheckOutFailed", None, "timeout"),
        ("ConnectionCheckedIn", 1),
    ]
