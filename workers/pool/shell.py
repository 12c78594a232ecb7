"""What the two shells of a pool have in common: what they tell, and what a fork does to them.

A shell carries out what `state` decides. It serialises the calls with `_lock`; in the asyncio shell
the event loop does that, and the lock is none.
"""

from __future__ import annotations

__all__ = [
    "CLOSE_TIMEOUT",
    "CMAP_REASON",
    "LAST_GRACE",
    "NESTED_AFTER",
    "WAITED",
    "Closing",
    "Options",
    "Shell",
    "borrowed",
    "draw",
    "failure_word",
    "is_out",
    "log",
]

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from time import monotonic
from typing import Any, ClassVar, Protocol, TypedDict

from workers.pool import forks, words
from workers.pool.drivers.base import Driver
from workers.pool.errors import (
    ConnectError,
    ForkedPoolError,
    PoolClosed,
    PoolDeadlock,
    PoolError,
    PoolTimeout,
)
from workers.pool.events import Listener, PoolEvent
from workers.pool.protocols import ContextLike, Tracing
from workers.pool.reports import CloseReport, Holder, Leak
from workers.pool.stacks import describe, is_under, thread_name
from workers.pool.state import (
    Action,
    Failure,
    Overdue,
    PoolState,
    Reason,
    Request,
    Slot,
    SlotState,
)
from workers.pool.stats import Histogram, PoolStats
from workers.pool.words import Borrowed

# Seconds. How long a close waits where the caller does not say, and how long a borrower then still
# has after its query was cancelled.
CLOSE_TIMEOUT = 5.0
LAST_GRACE = 0.5
# After this long a waiter is asked whether it has a connection itself.
NESTED_AFTER = 0.05

# An acquire that took longer has waited for something, if only for an idle connection's answer.
WAITED = 0.001

# CMAP's words for why a connection is closed.
CMAP_REASON = {
    Reason.BROKEN: "error",
    Reason.CLEARED: "stale",
    Reason.IDLE_TIME: "idle",
    Reason.LIFETIME: "stale",
    Reason.MAX_IDLE: "idle",
    Reason.SHRUNK: "stale",
    Reason.POOL_CLOSED: "poolClosed",
}


class Options(TypedDict, total=False):
    """The settings as keywords; see `workers.pool.Settings` for what each means."""

    max_open: int
    max_idle: int | None
    min: int
    max_lifetime: float
    max_idle_time: float
    acquire_timeout: float
    leak_threshold: float
    connect_timeout: float
    max_connecting: int
    validate_after_idle: float
    keepalive: float


class LoanLike(Protocol):
    """What the loans of both shells tell of their cancels."""

    ctx: ContextLike | None
    cancels: int
    first: float
    cut: bool


class Closing:
    """A close in progress or done."""

    def __init__(
        self, by: str, at: float, cause: object, deadline: float, last_grace: float
    ) -> None:
        self.by = by
        self.at = at
        self.cause = cause
        self.deadline = deadline
        self.last_grace = last_grace
        self.lent = 0
        self.closed_before = 0
        self.report: CloseReport | None = None


class Shell:
    """A pool, but for how it waits."""

    tracing: ClassVar[Tracing | None] = None
    """Of every pool in the process; set by `workers.tracing`."""

    on_leak: Callable[[Leak], object] | None = None
    on_crowded: Callable[[], object] | None = None
    on_outage: Callable[[BaseException | None], object] | None = None
    _is_out = False  # as `on_outage` was told

    name: str
    _state: PoolState
    _lock: AbstractContextManager[Any]
    _listener: Listener | None
    _pid: int
    _forked: bool
    _nested_told: bool

    @property
    def _knows(self) -> Driver:
        """The driver, as far as it can be asked without waiting."""
        raise NotImplementedError

    @property
    def system(self) -> str:
        """What kind of database it is for: its driver's name."""
        return self._knows.name

    @property
    def is_local(self) -> bool:
        """Whether its database is a matter of this machine."""
        return self._knows.local

    def is_outage(self, exc: BaseException) -> bool:
        """Whether this error, in itself, says that the pool's server is away for now. Any thread.

        True for a time-out after dials that failed, or while nobody had a connection, and for what the
        driver raises when the server goes away; not for a wrong password, which waiting does not mend.
        """
        if isinstance(exc, PoolTimeout):
            if exc.pool != self.name or isinstance(exc, PoolDeadlock):
                return False
            if exc.last_dial_error is None:
                return exc.in_use == 0
            return not self._knows.is_final(exc.last_dial_error)
        return self._knows.is_error(exc) and self._knows.is_outage(exc)

    @property
    def _closed(self) -> Closing | None:
        """Its close, in progress or done."""
        raise NotImplementedError

    def _use_state(self, state: PoolState) -> None:
        raise NotImplementedError

    def _run(self, actions: Iterable[Action]) -> object:
        """Carry out what has been decided."""
        raise NotImplementedError

    # -- asking

    def stats(self) -> PoolStats:
        """Return a snapshot of the figures. Any thread."""
        with self._lock:
            return self._state.stats()

    def histograms(self) -> dict[str, Histogram]:
        """Return the histograms `wait`, `use` and `create`, in seconds, since the pool was made."""
        with self._lock:
            return self._state.histograms()

    def holders(self) -> list[Holder]:
        """Return who has a connection now, for how long and where from, the longest first."""
        return [loan.holder() for loan in self._loans()]

    def _loans(self) -> list[Borrowed]:
        now = monotonic()
        with self._lock:
            loans = [
                borrowed(slot, now)
                for slot in self._state.slots.copy()  # asyncio's shell has no lock, and any thread asks
                if slot.state is SlotState.LENT
            ]
        return sorted(loans, key=lambda loan: -loan.held)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self._knows.name} {self._state.stats()}>"

    def _report(self, closing: Closing, leaked: list[Leak]) -> CloseReport:
        with self._lock:
            out = sum(1 for slot in self._state.slots if is_out(slot))
            return CloseReport(
                closed=self._state.closed_count - closing.closed_before,
                waited=max(0, closing.lent - out),
                leaked=leaked,
            )

    # -- telling

    def _failure(self, request: Request) -> PoolError:
        if request.failure is Failure.CLOSED:
            closing = self._closed
            assert closing is not None
            return words.was_closed(self.name, closing.by, monotonic() - closing.at, closing.cause)
        if request.failure is Failure.DIAL:
            assert request.cause is not None
            return words.cannot_connect(self.name, request.cause)
        error = self._timed_out(request, len(self._state.waiting) + 1, PoolDeadlock)
        held = [slot.stack for slot, _ in request.holds]
        return words.deadlock(error, self.name, held, request.stack)

    def _timed_out(
        self, request: Request, position: int, kind: type[PoolTimeout] = PoolTimeout
    ) -> PoolTimeout:
        return words.timed_out(
            self.name,
            self.stats(),
            self._loans(),
            waited=monotonic() - request.since,
            position=position,
            asker=request.owner,
            dial_error=self._state.last_dial_error,
            kind=kind,
        )

    def _tell_outage(self, error: BaseException | None) -> None:
        """Tell when what a dial shows is news. Two dials may cross: the next one sets it right."""
        is_out = error is not None
        if is_out is not self._is_out and self.on_outage is not None:
            self._is_out = is_out
            self.on_outage(error)

    def _report_leak(self, loan: Overdue) -> None:
        slot = loan.slot
        held = monotonic() - loan.lent_at
        leak = words.leak_of(Borrowed(slot.number, held, loan.owner, loan.stack), "still lent")
        if self._listener is not None:
            self._emit("ConnectionLeaked", connection=slot.number, leak=leak)
        if self.on_leak is not None:
            self.on_leak(leak)
        if self._listener is not None or self.on_leak is not None:
            return
        log(
            "pool %r: connection %d is lent to %s for %.3f s, longer than its leak threshold; "
            "it was borrowed here:\n%s",
            self.name,
            leak.connection,
            leak.thread,
            leak.held_seconds,
            leak.stack,
        )

    def _look_for_nesting(self, request: Request) -> None:
        """Find out whether the asker waits while it keeps others waiting itself.

        Not before it has waited a while: nearly nobody does, and everybody would pay for it.
        """
        frame = sys._getframe(2)  # noqa: SLF001
        with self._lock:
            if request.done:
                return  # served a moment ago: what it has is what it asked for
            own = [
                slot
                for slot in self._state.slots
                if slot.owner == request.owner and slot.state is SlotState.LENT
            ]
            holds = [
                (slot, slot.lent_at) for slot in own if slot.bound and is_under(slot.stack, frame)
            ]
            actions = self._state.keeps(request, holds, monotonic())
            exhausted = self._state.exhausted
        self._run(actions)
        if own and exhausted:
            self._tell_nested(request)

    def _tell_nested(self, request: Request) -> None:
        if self._nested_told:
            return
        self._nested_told = True
        if self._listener is not None:
            self._emit("CheckOutNested")
            return
        log(
            "pool %r: %s has a connection already and waits for another one; when all holders do "
            "that, none can go on; it asks here:\n%s",
            self.name, thread_name(request.owner), describe(request.stack),
        )  # fmt: skip

    def _emit(self, name: str, **fields: Any) -> None:
        listener = self._listener
        if listener is None:
            return
        try:
            listener(PoolEvent(name, self.name, **fields))
        except Exception as exc:
            log("pool %r: the listener failed on %s: %r", self.name, name, exc)

    def _trace_cancels(self, loan: LoanLike) -> None:
        """Tell of a loan that is over whether it was cancelled."""
        if self.tracing is not None and loan.cancels:
            self.tracing.cancelled(self, loan.ctx, loan.first, loan.cancels, cut=loan.cut)

    def _emit_check_out(self, slot: Slot) -> None:
        self._emit("ConnectionCheckOutStarted")
        self._emit("ConnectionCheckedOut", connection=slot.number, seconds=0.0)

    # -- fork

    def _refuse_fork(self) -> None:
        if self._forked:
            raise ForkedPoolError(
                f"pool {self.name!r} was made in process {self._pid}: make one in this process"
            )

    def disinherit(self) -> None:
        """In a fork's child: have nothing, and keep the parent's connections from all harm."""
        self._forked = True
        for slot in self._state.slots:
            conn = slot.conn
            if conn is not None:
                forks.keep(conn)
                with suppress(Exception):
                    self._knows.disown(conn)
        state = PoolState(self._state.settings)
        state.closing = True
        self._use_state(state)


def borrowed(slot: Slot, now: float) -> Borrowed:
    """Note how a loan is now."""
    return Borrowed(slot.number, now - slot.lent_at, slot.owner, slot.stack)


def is_out(slot: Slot) -> bool:
    """Whether somebody has it, or is about to give it back."""
    return slot.state in (SlotState.LENT, SlotState.RETURNING, SlotState.CHECKING)


def failure_word(exc: BaseException) -> str:
    """Return CMAP's word for why a check-out failed."""
    if isinstance(exc, PoolTimeout):
        return "timeout"
    if isinstance(exc, PoolClosed):
        return "poolClosed"
    return "connectionError" if isinstance(exc, ConnectError) else "cancelled"


def draw() -> float:
    """Draw from [0, 1). The module random would cost each worker milliseconds and memory."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


def log(message: str, *args: object) -> None:
    """Warn, where there is no listener."""
    import logging

    logging.getLogger("workers.pool").warning(message, *args)
