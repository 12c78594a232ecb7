"""A database server in memory, as slow, full or dead as a test wants it; and threads that report."""

from __future__ import annotations

__all__ = ["FakeConnection", "FakeServer", "Outcome", "eventually", "in_thread"]

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 10.0


class OperationalError(Exception):
    """What a driver raises for a server that is away: PEP 249's name."""


class FakeConnection:
    """A DB-API connection that counts, and breaks on demand."""

    def __init__(self, server: FakeServer, number: int) -> None:
        self.server = server
        self.number = number
        self.closed = False
        self.broken = False
        self.dirty = False
        self.rollbacks = 0

    def begin(self) -> None:
        """Open a transaction."""
        self.dirty = True

    def rollback(self) -> None:
        """End the transaction, or raise where the server is away."""
        if self.broken or self.closed:
            raise OperationalError("server closed the connection")
        self.rollbacks += 1
        self.dirty = False

    def close(self) -> None:
        """Close it: the server sees that."""
        assert not self.closed, "closed twice"
        self.closed = True
        with self.server.lock:
            self.server.open.discard(self)


@dataclass
class FakeServer:
    """Counts what is open, and the most that ever was."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    open: set[FakeConnection] = field(default_factory=set)
    most_open: int = 0
    dials: int = 0
    dialling: int = 0
    most_dialling: int = 0
    error: Exception | None = None
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def connect(self) -> FakeConnection:
        """Open a connection: when the gate is open, and unless there is an error to raise."""
        with self.lock:
            self.dials += 1
            number = self.dials
            self.dialling += 1
            self.most_dialling = max(self.most_dialling, self.dialling)
        try:
            if not self.gate.wait(PATIENCE):
                raise OperationalError("the test forgot to open the gate")
            if self.error is not None:
                raise self.error
            conn = FakeConnection(self, number)
            with self.lock:
                self.open.add(conn)
                self.most_open = max(self.most_open, len(self.open))
            return conn
        finally:
            with self.lock:
                self.dialling -= 1


class Outcome(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._value: Any = None
        self.error: BaseException | None = None
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        """Do it."""
        try:
            self._value = self._work()
        except BaseException as exc:
            self.error = exc
        self.ended_at = time.monotonic()

    def result(self) -> Any:
        """Wait for its end; return or raise what it did."""
        self.join(PATIENCE)
        assert not self.is_alive(), "the thread did not end"
        if self.error is not None:
            raise self.error
        return self._value


def in_thread(work: Callable[[], Any]) -> Outcome:
    """Do *work* in a thread of its own."""
    return Outcome(work)


def eventually(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until the condition holds; fail where it does not in time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.001)
