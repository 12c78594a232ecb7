"""MongoDB's CMAP cases on this pool: what is told of a pool's life, and in which order.

Of the 33 cases of the specification's `cmap-format` folder, those that apply, each under its file's
name and retold in words of our own. Two things are different here. A pool has no "paused" state, so
`ready` is left out, and eight cases with it (LEFT_OUT). And a dial is held up by a gate, where the
originals tell a server to be slow and sleep.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.workers.pool.fake import Outcome, eventually, in_thread
from workers.pool import Pool, PoolClosed, PoolEvent, PoolTimeout

PATIENCE = 10.0

OUT = "ConnectionCheckOutStarted"
DONE = "ConnectionCheckedOut"
FAILED = "ConnectionCheckOutFailed"
IN = "ConnectionCheckedIn"
NEW = "ConnectionCreated"
READY = "ConnectionReady"
GONE = "ConnectionClosed"


@dataclass
class Case:
    """A script, and what the listener is told while it runs.

    The steps: `out A [SECONDS]` borrows and calls it A; `in A` gives it back; `T: out A` does that
    in a thread; `join T` waits for its end, `fails T KIND` for its error; `fails out KIND` borrows
    in vain; `heard EVENT N` waits until that was told N times; `waiting N` until N are in the queue;
    `slow` holds up every dial from now on, `let N` lets the Nth end; `clear`; `close [SECONDS]`.
    """

    name: str
    steps: str
    told: list[str]
    """Event, number of the connection and reason, as far as they matter; in this order."""
    deaf: tuple[str, ...] = ()
    """Events that do not matter."""
    settings: dict[str, Any] = field(default_factory=dict)


CASES = [
    # -- a connection
    Case(
        "connection-must-have-id",
        "out a; out b",
        [OUT, f"{NEW} 1", f"{DONE} 1", OUT, f"{NEW} 2", f"{DONE} 2"],
        deaf=("PoolCreated", "PoolReady", READY),
    ),
    Case(
        "connection-must-order-ids",
        "out a; out b; out c",
        [f"{NEW} 1", f"{NEW} 2", f"{NEW} 3"],
        deaf=("PoolCreated", "PoolReady", READY, OUT, DONE),
    ),
    # -- giving back
    Case(
        "pool-checkin",
        "out a; in a",
        [f"{IN} 1"],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT, DONE),
    ),
    Case(
        "pool-checkin-make-available",
        "out a; in a; out b",
        [f"{DONE} 1", f"{IN} 1", f"{DONE} 1"],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT),
    ),
    Case(
        "pool-checkin-destroy-stale",
        "out a; clear; in a",
        [f"{DONE} 1", "PoolCleared", f"{IN} 1", f"{GONE} 1 stale"],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT),
    ),
    Case(
        "pool-checkin-destroy-closed",
        "out a; close 0; in a",
        [f"{DONE} 1", "PoolClosed", f"{IN} 1", f"{GONE} 1 poolClosed"],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT),
    ),
    # -- borrowing
    Case(
        "pool-checkout-connection",
        "out a",
        ["PoolCreated", "PoolReady", OUT, f"{NEW} 1", f"{READY} 1", f"{DONE} 1"],
    ),
    Case(
        "pool-checkout-multiple",
        "t1: out a; t2: out b; t3: out c; join t1; join t2; join t3",
        [DONE, DONE, DONE],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT),
    ),
    Case(
        "pool-checkout-error-closed",
        "out a; in a; close; fails out PoolClosed",
        ["PoolCreated", OUT, f"{DONE} 1", f"{IN} 1", "PoolClosed", OUT, f"{FAILED} poolClosed"],
        deaf=("PoolReady", NEW, READY, GONE),
    ),
    Case(
        "pool-checkout-no-idle",
        f"out a; in a; heard {GONE} 1; out b",
        [f"{DONE} 1", f"{IN} 1", f"{GONE} 1 idle", f"{DONE} 2"],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT),
        settings={"max_idle_time": 0.01},
    ),
    Case(
        "pool-checkout-no-stale",
        "out a; in a; clear; out b",
        [f"{DONE} 1", f"{IN} 1", "PoolCleared", f"{GONE} 1 stale", f"{DONE} 2"],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT),
    ),
    # -- dials at once
    Case(
        "pool-checkout-maxConnecting-is-enforced",
        f"slow; t1: out a; heard {NEW} 1; t2: out b; t3: out c; heard {NEW} 2; waiting 3; let 1;"
        f"heard {NEW} 3; let 2; let 3; heard {READY} 3; join t1; join t2; join t3",
        [f"{NEW} 1", f"{NEW} 2", f"{READY} 1", f"{NEW} 3", READY, READY],
        deaf=("PoolCreated", "PoolReady", OUT, DONE),
    ),
    Case(
        "pool-checkout-custom-maxConnecting-is-enforced",
        f"slow; t1: out a; heard {NEW} 1; t2: out b; waiting 2; let 1; heard {NEW} 2; let 2;"
        "join t1; join t2",
        [f"{NEW} 1", f"{READY} 1", f"{NEW} 2", f"{READY} 2"],
        deaf=("PoolCreated", "PoolReady", OUT, DONE),
        settings={"max_connecting": 1, "max_open": 2},
    ),
    Case(
        "pool-checkout-maxConnecting-timeout",
        f"slow; t1: out a; t2: out b; heard {NEW} 2; t3: out c 0.05; fails t3 PoolTimeout;"
        "let 1; let 2; join t1; join t2",
        [OUT, OUT, OUT, f"{FAILED} timeout", DONE, DONE],
        deaf=("PoolCreated", "PoolReady", NEW, READY),
    ),
    Case(
        "pool-checkout-returned-connection-maxConnecting",
        f"out a; slow; t1: out b; t2: out c; t3: out d; waiting 3; heard {NEW} 3; in a;"
        f"heard {DONE} 2; let 2; let 3; join t1; join t2; join t3",
        [f"{NEW} 1", f"{DONE} 1", NEW, NEW, f"{IN} 1", f"{DONE} 1", DONE, DONE],
        deaf=("PoolCreated", "PoolReady", READY, OUT),
    ),
    Case(
        "pool-checkout-minPoolSize-connection-maxConnecting",
        f"heard {NEW} 2; t1: out a; t2: out b; waiting 2; let 1; let 2; join t1; join t2",
        [NEW, NEW, DONE, DONE],
        deaf=("PoolCreated", "PoolReady", READY, OUT),
        settings={"min": 2, "max_open": 3, "slow": True},
    ),
    # -- clear and close
    Case(
        "pool-clear-schedule-run-interruptInUseConnections-false",
        f"out a; out b; in b; clear; heard {GONE} 1; close 0",
        [f"{DONE} 1", f"{DONE} 2", f"{IN} 2", "PoolCleared", f"{GONE} 2 stale", "PoolClosed"],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT),
    ),
    Case(
        "pool-close-destroy-conns",
        f"out a; out b; out c; in b; t1: close; heard {GONE} 1; in a; in c; join t1",
        [
            *(f"{IN} 2", f"{GONE} 2 poolClosed"),
            *(f"{IN} 1", f"{GONE} 1 poolClosed", f"{IN} 3", f"{GONE} 3 poolClosed"),
            "PoolClosed",
        ],
        deaf=("PoolCreated", "PoolReady", NEW, READY, OUT, DONE),
    ),
    Case("pool-close", "close", ["PoolCreated", "PoolClosed"], deaf=("PoolReady",)),
    # -- its size
    Case("pool-create", "", ["PoolCreated"], deaf=("PoolReady",)),
    Case(
        "pool-create-with-options",
        "",
        ["PoolCreated"],
        deaf=("PoolReady", NEW, READY),
        settings={"max_open": 50, "min": 5, "max_idle_time": 0.1},
    ),
    Case(
        "pool-create-max-size",
        "out a; out b; out c; in c; out c; t1: out d; waiting 1; in a; join t1",
        [
            "PoolCreated",
            *(OUT, f"{NEW} 1", f"{DONE} 1"),
            *(OUT, f"{NEW} 2", f"{DONE} 2"),
            *(OUT, f"{NEW} 3", f"{DONE} 3", f"{IN} 3"),
            *(OUT, f"{DONE} 3"),
            *(OUT, f"{IN} 1", f"{DONE} 1"),
        ],
        deaf=("PoolReady", READY),
        settings={"max_open": 3},
    ),
    Case(
        "pool-create-min-size",
        f"heard {READY} 3; out a",
        ["PoolCreated", "PoolReady", NEW, NEW, NEW, DONE],
        deaf=(READY, OUT),
        settings={"min": 3},
    ),
    # -- the queue
    Case(
        "wait-queue-fairness",
        "out a; t1: out b; waiting 1; t2: out c; waiting 2; t3: out d; waiting 3; t4: out e;"
        "waiting 4; in a; join t1; in b; join t2; in c; join t3; in d; join t4",
        [
            *(OUT, f"{DONE} 1", OUT, OUT, OUT, OUT),
            *(f"{IN} 1", f"{DONE} 1", f"{IN} 1", f"{DONE} 1"),
            *(f"{IN} 1", f"{DONE} 1", f"{IN} 1", f"{DONE} 1"),
        ],
        deaf=("PoolCreated", "PoolReady", NEW, READY),
        settings={"max_open": 1},
    ),
    Case(
        "wait-queue-timeout",
        "out a; t1: out b 0.05; fails t1 PoolTimeout; in a",
        [OUT, f"{DONE} 1", OUT, f"{FAILED} timeout", f"{IN} 1"],
        deaf=("PoolCreated", "PoolReady", NEW, READY),
        settings={"max_open": 1},
    ),
]

LEFT_OUT = {
    "pool-ready": "no paused state: a pool is ready from the start",
    "pool-ready-ready": "no paused state",
    "pool-clear-paused": "no paused state",
    "pool-clear-ready": "no paused state: clear replaces connections, and the pool lends on",
    "pool-clear-min-size": "no paused state: the minimum is opened anew after a clear",
    "pool-clear-clears-waitqueue": "who waits gets one of the new connections instead of an error",
    "pool-clear-interrupting-pending-connections": "clear interrupts nobody; a context does",
    "pool-create-min-size-error": "a failed dial condemns no connection that works",
}


class GatedServer:
    """Connections that do nothing, dialled one by one where that is wanted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.slow = False
        self.dials = 0
        self.gates = [threading.Event() for _ in range(8)]

    def connect(self) -> Any:
        """Open a connection, when its gate is open."""
        with self.lock:
            self.dials += 1
            number, slow = self.dials, self.slow
        if slow:
            assert self.gates[number].wait(PATIENCE), "the case forgot to let it"
        return Connection()


class Connection:
    """PEP 249's least."""

    def rollback(self) -> None:
        """Have nothing to roll back."""

    def close(self) -> None:
        """Have nothing to close."""


class Stage:
    """Plays a case."""

    def __init__(self, case: Case) -> None:
        self.lock = threading.Lock()
        self.told: list[PoolEvent] = []
        self.labels: dict[str, Any] = {}
        self.threads: dict[str, Outcome] = {}
        self.server = GatedServer()
        settings = dict(case.settings)
        self.server.slow = settings.pop("slow", False)
        self.pool = Pool(
            self.server.connect, listener=self.hear, **{"acquire_timeout": PATIENCE, **settings}
        )

    def hear(self, event: PoolEvent) -> None:
        """Keep what is told."""
        with self.lock:
            self.told.append(event)

    def play(self, step: str) -> None:
        """Do one step."""
        thread, colon, rest = step.partition(":")
        if colon:
            self.threads[thread] = in_thread(lambda: self.play(rest.strip()))
            return
        match step.split():
            case ["out", label, *seconds]:
                limit = float(seconds[0]) if seconds else None
                self.labels[label] = self.pool.get(timeout=limit)
            case ["in", label]:
                self.pool.put(self.labels[label])
            case ["join", thread]:
                self.threads[thread].result()
            case ["fails", "out", kind]:
                self.must_fail(kind, self.pool.get)
            case ["fails", thread, kind]:
                self.must_fail(kind, self.threads[thread].result)
            case ["heard", name, count]:
                eventually(lambda: self.count(name) >= int(count), step)
            case ["waiting", count]:
                eventually(lambda: self.pool.stats().waiting == int(count), step)
            case ["slow"]:
                self.server.slow = True
            case ["let", number]:
                self.server.gates[int(number)].set()
            case ["clear"]:
                self.pool.clear()
            case ["close", *seconds]:
                self.pool.close(float(seconds[0]) if seconds else PATIENCE)
            case _:
                pytest.fail(f"a case has a step that nobody knows: {step}")

    def must_fail(self, kind: str, call: Callable[[], object]) -> None:
        """Have it raise this kind of error."""
        kinds = {"PoolTimeout": PoolTimeout, "PoolClosed": PoolClosed}
        with pytest.raises(kinds[kind]):
            call()

    def count(self, name: str) -> int:
        """Count how often this was told."""
        with self.lock:
            return Counter(event.name for event in self.told)[name]


def matches(wanted: str, event: PoolEvent) -> bool:
    """Whether an event is what a case wants to be told."""
    name, *details = wanted.split()
    return event.name == name and all(
        event.connection == int(detail) if detail.isdigit() else event.reason == detail
        for detail in details
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case):
    """The listener is told what the specification says, in its order."""
    stage = Stage(case)
    try:
        for step in filter(None, map(str.strip, case.steps.split(";"))):
            stage.play(step)
        told = [event for event in stage.told if event.name not in case.deaf]
        shown = [f"{event.name} {event.connection or ''} {event.reason or ''}" for event in told]
        assert len(told) == len(case.told), shown
        assert all(map(matches, case.told, told)), shown
        assert all(event.pool == "pool" for event in told)
        lasting = [event for event in told if event.name in (READY, DONE)]
        assert all(event.seconds is not None and event.seconds >= 0 for event in lasting)
    finally:
        for gate in stage.server.gates:
            gate.set()
        stage.pool.close(0)
        for thread in stage.threads.values():
            thread.join(PATIENCE)


def test_every_case_is_played_or_left_out_for_a_reason():
    """33 cases, none twice."""
    names = [case.name for case in CASES] + list(LEFT_OUT)
    assert len(names) == len(set(names)) == 33
