"""The pool for asyncio: it does what `state` decides, in one event loop and without a thread.

The event loop is the lock: nothing awaits between a decision and its being carried out. What has to
be finished whatever happens to the task that began it (a connection on its way back, a dial, a
check) is a task of the pool's own, and its beginner only waits for it: so no cancellation loses a
connection, and none is given to two.
"""

# A pool and its leases are one thing in two classes:
# ruff: noqa: SLF001

from __future__ import annotations

__all__ = ["AsyncLease", "AsyncPool"]

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import nullcontext, suppress
from functools import partial
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Self, Unpack

from workers.pool import forks, words
from workers.pool.drivers import aio as drivers
from workers.pool.drivers.aio import AsyncDriver, Connect, settle
from workers.pool.drivers.base import Driver
from workers.pool.errors import WrongPoolError
from workers.pool.events import Listener
from workers.pool.loans import (
    CANCEL_PATIENCE,
    CANCEL_TIMEOUT,
    PAUSE,
    PAUSE_MAX,
    check,
)
from workers.pool.protocols import ContextLike
from workers.pool.reports import CloseReport, Leak
from workers.pool.settings import Settings
from workers.pool.shell import (
    CLOSE_TIMEOUT,
    CMAP_REASON,
    LAST_GRACE,
    NESTED_AFTER,
    WAITED,
    Closing,
    Options,
    Shell,
    borrowed,
    draw,
    failure_word,
    is_out,
)
from workers.pool.stacks import Stack, capture
from workers.pool.state import (
    LOOK,
    RESET_TIMEOUT,
    Action,
    Check,
    Close,
    Cut,
    Dial,
    Overdue,
    PoolState,
    Reason,
    Request,
    Slot,
    SlotState,
    Wake,
)

_LENT = SlotState.LENT
_CHECKING = SlotState.CHECKING


class AsyncPool(Shell):
    """A pool of connections for asyncio, first come first served: the twin of `Pool`.

        async with AsyncPool.from_url("postgresql://app@/orders", max_open=20) as pool:
            async with pool.acquire(ctx) as conn:
                await conn.execute("select 1")

    The connection is the driver's own (psycopg's AsyncConnection, a client of redis.asyncio,
    aiosqlite's Connection). It belongs to the event loop that it is first used in, and every method
    is called there, but `stats`, `histograms` and `holders`, which any thread may call. The contexts
    that it is given may end in any thread.

    Attributes:
        on_leak: Told of each loan that passes `leak_threshold`, once, in the event loop; it must be
            quick. It may be set at any time; without it, and without a listener, the log is told.
        on_crowded: Called, in the event loop, for each task that has to wait because `max_open` is
            reached, before it waits; it must not block.
        on_outage: Called, in the event loop, with the driver's error when it cannot connect for a
            reason that may pass, and with None when it can again; it must not block.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        name: str = "pool",
        setup: Callable[[Any], object] | None = None,
        listener: Listener | None = None,
        **settings: Unpack[Options],
    ) -> None:
        """Make a pool of what *connect* returns.

        Args:
            connect: Opens a connection: an `async def`, or anything that is to be awaited. Of a
                connection of psycopg or redis.asyncio the pool knows all that `from_url` knows;
                of another one, that it may have `rollback` and has `close`.
            name: For errors, events and the names of tasks.
            setup: Called, and awaited if need be, with each new connection before it is lent for
                the first time. Settings of the driver that it makes are restored when a borrower
                has changed them.
            listener: Told every event, see `PoolEvent`. Without one, leaks go to the log.
            **settings: See `Settings`.

        Raises:
            ValueError: a setting cannot be meant.
        """
        self._init(connect, None, name=name, setup=setup, listener=listener, settings=settings)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        application_name: str | None = None,
        name: str = "pool",
        setup: Callable[[Any], object] | None = None,
        listener: Listener | None = None,
        **settings: Unpack[Options],
    ) -> Self:
        """Make a pool for `sqlite:///…`, `postgresql://…`, `redis://…`, `rediss://…` or `unix://…`.

        Args:
            url: No part of it but its scheme is ever in an error, an event or a repr.
            application_name: What the server's list of sessions shows, where it has one.
            name: As for `AsyncPool`.
            setup: As for `AsyncPool`.
            listener: As for `AsyncPool`.
            **settings: As for `AsyncPool`.

        Raises:
            ValueError: the URL or a setting cannot be meant, or the driver for it can only block
                (MySQL).
            MissingDriverError: the driver is not installed; it says what brings it.
        """
        connect, driver = drivers.from_url(url, application_name)
        self = cls.__new__(cls)
        self._init(connect, driver, name=name, setup=setup, listener=listener, settings=settings)
        return self

    def _init(
        self,
        connect: Connect,
        driver: AsyncDriver | None,
        *,
        name: str,
        setup: Callable[[Any], object] | None,
        listener: Listener | None,
        settings: Options,
    ) -> None:
        self.name = name
        self._connect = connect
        self._setup = setup
        self._listener = listener
        self._driver_known = driver is not None
        self._pid = os.getpid()
        self._forked = False
        self._nested_told = False
        self._closing: _Closing | None = None
        self._lock = nullcontext()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._dials: set[asyncio.Task[Any]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = inf
        self._sparing = asyncio.Lock()
        self._use_state(PoolState(Settings(**settings)))
        self._use_driver(driver or AsyncDriver())
        forks.register(self)
        if listener is not None:
            self._emit("PoolCreated")
            self._emit("PoolReady")
        with suppress(RuntimeError):  # made before there is a loop: the first use is early enough
            asyncio.get_running_loop()
            self._enter_loop()

    def _use_driver(self, driver: AsyncDriver) -> None:
        if driver.knows.spares:
            driver.with_spare = self._with_spare
        self._driver = driver
        self._state.glance_after(driver.knows.glance_after)

    def _use_state(self, state: PoolState) -> None:
        self._state = state
        self._take = state.take
        self._give = state.give
        self._by_conn = state.by_conn

    @property
    def _knows(self) -> Driver:
        return self._driver.knows

    @property
    def _closed(self) -> Closing | None:
        return self._closing

    def _enter_loop(self) -> None:
        """Belong to the running loop, once and for all.

        Raises:
            RuntimeError: it belongs to another one; or none runs.
        """
        self._refuse_fork()
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None:
            raise RuntimeError(f"pool {self.name!r} belongs to another event loop: make one here")
        self._loop = loop
        if self._state.settings.min:
            self._run(self._state.resize(self._state.settings, monotonic()))
            self._attend()

    # -- borrowing

    def acquire(
        self,
        ctx: ContextLike | None = None,
        *,
        timeout: float | None = None,
        leak_threshold: float | None = None,
    ) -> AsyncLease:
        """Return an `async with` block that borrows a connection and gives it back on every way out.

        Args:
            ctx: Bounds the waiting, and the loan: at its end the statement that runs on the
                connection is cancelled, and leaving the block raises `ctx.err` with the driver's
                error as `__cause__`.
            timeout: Seconds to wait at most; default `acquire_timeout`.
            leak_threshold: Seconds after which this loan counts as leaked; 0: never; default the
                pool's.

        Entering raises what `get` raises. A task that is cancelled while it waits leaves the queue;
        what it has been given at that very moment goes to the next one.
        """
        return AsyncLease(self, ctx, timeout, leak_threshold)

    async def get(
        self,
        ctx: ContextLike | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 (it bounds more than this await)
        leak_threshold: float | None = None,
    ) -> Any:
        """Borrow a connection; `put` gives it back. The arguments are those of `acquire`.

        Raises:
            PoolTimeout: none within the time-out; it says who has them.
            PoolClosed: the pool is closed, or was while this waited.
            ConnectError: the server refused for good (a wrong password).
            ForkedPoolError: this process inherited the pool.
            Cancelled: the context was cancelled (`ctx.err`).
            DeadlineExceeded: the context's deadline has passed (`ctx.err`).
            RuntimeError: the pool belongs to another event loop.
        """
        stack = capture()
        slot = await self._borrow(ctx, timeout, leak_threshold, stack, bound=False)
        return slot.conn

    async def put(self, conn: Any, *, broken: bool = False) -> None:
        """Give a connection back that `get` returned; exactly once, from any task.

        It comes back also when the task that gives it back is cancelled meanwhile.

        Args:
            conn: What was borrowed.
            broken: It is of no more use: close it instead of lending it again.

        Raises:
            WrongPoolError: it is not lent by this pool.
            ForkedPoolError: this process inherited the pool.
        """
        try:
            slot = self._by_conn[id(conn)]
        except KeyError:
            self._refuse_fork()
            raise WrongPoolError(f"pool {self.name!r} has not lent this connection") from None
        await self._give_back(slot, broken=broken)

    # -- borrowing, step by step

    async def _borrow(
        self,
        ctx: ContextLike | None,
        seconds: float | None,
        leak_threshold: float | None,
        stack: Stack,
        *,
        bound: bool,
    ) -> Slot:
        if self._loop is not asyncio.get_running_loop():
            self._enter_loop()
        owner = _current_task()
        slot = None
        if leak_threshold is None and (ctx is None or not ctx.done):
            slot = self._take(monotonic(), owner, stack)
        if slot is None or slot.state is not _LENT:
            now = monotonic()
            limit = self._state.settings.acquire_timeout if seconds is None else seconds
            request = Request(
                owner, stack, now + limit, signal=asyncio.Event(), leak_after=leak_threshold,
                bound=bound,
            )  # fmt: skip
            slot = await self._borrow_slowly(request, slot, ctx, now)
        elif self._listener is not None:
            self._emit_check_out(slot)
        slot.bound = bound
        if ctx is not None:
            self._begin_loan(slot, ctx)
        return slot

    async def _borrow_slowly(
        self, request: Request, slot: Slot | None, ctx: ContextLike | None, started: float
    ) -> Slot:
        """Borrow with a wait, a check or a dial."""
        if self._listener is not None:
            self._emit("ConnectionCheckOutStarted")
        try:
            if ctx is not None:
                check(ctx)
                if ctx.deadline is not None:
                    request.deadline = min(request.deadline, ctx.deadline)
            if slot is None:
                actions = self._state.ask(request, started)
            else:
                actions = self._state.second_look(slot, request, started)
            waits = not request.done
            if waits and self.on_crowded is not None and self._state.crowded:
                self.on_crowded()
            self._run(actions)
            self._attend()
            slot = await self._await_slot(request, ctx)
        except BaseException as exc:
            self._forsake(request)
            if self._listener is not None:
                self._emit("ConnectionCheckOutFailed", reason=failure_word(exc), error=exc)
            if self.tracing is not None:
                self.tracing.acquired(self, ctx, started, exc)
            raise
        if self._listener is not None:
            seconds = monotonic() - started
            self._emit("ConnectionCheckedOut", connection=slot.number, seconds=seconds)
        if self.tracing is not None and (waits or monotonic() - started > WAITED):
            self.tracing.acquired(self, ctx, started, None, opened=slot.born_at >= started)
        return slot

    async def _await_slot(self, request: Request, ctx: ContextLike | None) -> Slot:
        """Wait for the answer, and try what needs trying, until there is a sound connection."""
        while True:
            if not request.done:
                await self._await_answer(request, ctx)
            if request.failure is not None:
                raise self._failure(request)
            slot = request.slot
            assert slot is not None
            if slot.state is _CHECKING:
                await self._try_out(slot, request)
                continue  # it may have turned out dead, or the pool has closed meanwhile
            if ctx is not None:
                check(ctx)  # `_forsake` hands the connection on
            return slot

    async def _await_answer(self, request: Request, ctx: ContextLike | None) -> None:
        """Sleep until the request is answered; raise where it is withdrawn instead."""
        stop = None if ctx is None else ctx.on_done(lambda: self._soon(request.signal.set))
        try:
            patience = NESTED_AFTER
            while not request.done and (ctx is None or not ctx.done):
                left = request.deadline - monotonic()
                if left <= 0:
                    break
                await self._rung(request.signal, min(left, patience))
                if not request.done and left > patience:
                    patience = inf
                    self._look_for_nesting(request)
        finally:
            if stop is not None:
                stop()
        if request.done:
            return
        ended = ctx is not None and ctx.done
        position = self._state.place(request)
        self._state.withdraw(request, monotonic(), timed_out=not ended)
        if ctx is not None:
            check(ctx)
        raise self._timed_out(request, position)

    async def _try_out(self, slot: Slot, request: Request | None) -> None:
        """Try a connection in state CHECKING."""
        quiet = False
        with suppress(Exception):  # whatever it is: a round trip tells
            lately = not self._state.must_answer(slot, monotonic())
            quiet = lately and self._knows.is_quiet(slot.conn)
        if quiet:
            self._conclude(slot, request, sound=True)
            return
        deadline = inf if request is None else request.deadline
        trial = self._spawn("check", self._answers(slot, deadline))
        try:
            sound, deaf = await asyncio.shield(trial)
        except BaseException:
            if request is not None:
                request.slot = None  # the asker goes; the check goes on, for whoever is next
            trial.add_done_callback(lambda _: self._conclude(slot, None, *_outcome(trial)))
            raise
        self._conclude(slot, request, sound, deaf)

    def _conclude(
        self, slot: Slot, request: Request | None, sound: bool, deaf: bool = False
    ) -> None:
        self._run(self._state.checked(slot, request, monotonic(), sound=sound, deaf=deaf))
        self._attend()

    async def _answers(self, slot: Slot, deadline: float) -> tuple[bool, bool]:
        """Make a round trip; return whether that went well, and whether there was no answer."""
        self._state.guard(slot, monotonic(), deadline)
        cut_at = slot.cut_at
        self._attend()
        try:
            await self._bounded(self._driver.check(slot.conn), cut_at)
        except Exception:
            return False, monotonic() >= cut_at
        return True, False

    async def _bounded(self, work: Coroutine[Any, Any, object], until: float) -> None:
        """Await it; where nothing can be cut, let it be cancelled when it takes too long."""
        if self._knows.cuts:
            await work
        else:
            async with asyncio.timeout(max(0.0, until - monotonic())):
                await work

    def _forsake(self, request: Request) -> None:
        """Leave nothing behind of a request whose asker goes away with an exception."""
        now = monotonic()
        if self._state.withdraw(request, now):
            return
        slot = request.slot
        if slot is None or slot.state is not _LENT:
            return
        heir = self._give(slot, now)
        if isinstance(heir, Request):
            heir.signal.set()
        elif heir is LOOK and self._state.begin_return(slot, now):
            self._run(self._state.returned(slot, now, sound=True))

    async def _give_back(self, slot: Slot, *, broken: bool = False, doubtful: bool = False) -> None:
        """Give it back; *doubtful*: its last call was interrupted, so it has to prove itself."""
        loan: _Loan | None = slot.loan
        if loan is not None:
            loan.end()
            self._knows.bind(slot.conn, None)
        if self._listener is not None and slot.state is _LENT:
            self._emit("ConnectionCheckedIn", connection=slot.number)
        try:
            dirty: object = self._driver.tidy(slot.conn)
        except Exception:
            dirty = broken = True  # the driver cannot even look at it: it does so to broken ones
        cancelled = loan is not None and loan.canceller is not None
        if not dirty and not broken and not doubtful and not cancelled:
            slot.loan = None
            heir = self._give(slot, monotonic())
            if heir is None:
                return
            if isinstance(heir, Request):
                heir.signal.set()
                return
        if not self._state.begin_return(slot, monotonic(), guarded=self._knows.cuts):
            raise WrongPoolError(f"connection {slot.number} was given back before")
        self._attend()
        cleaning = self._spawn("clean", self._clean(slot, loan, broken, doubtful or cancelled))
        await asyncio.shield(cleaning)

    async def _clean(self, slot: Slot, loan: _Loan | None, broken: bool, doubtful: bool) -> None:
        """Make it as new, and let the next one have it: the second half of a return."""
        driver = self._driver
        conn = slot.conn
        until = monotonic() + RESET_TIMEOUT
        sound = False
        try:
            if loan is not None:
                broken = not await loan.is_over() or broken
                self._trace_cancels(loan)
            if not broken and not driver.knows.is_broken(conn):
                if driver.tidy(conn):
                    await self._bounded(driver.reset(conn), until)
                if doubtful:
                    await self._bounded(driver.check(conn), until)
                sound = True
        except Exception:  # noqa: S110 (whatever it is: the connection is not lent again)
            pass
        finally:
            self._run(self._state.returned(slot, monotonic(), sound=sound))
            self._attend()

    # -- a context that ends while a connection is lent under it

    def _begin_loan(self, slot: Slot, ctx: ContextLike) -> None:
        """Have the statements of this loan cancelled when the context ends."""
        loan = slot.loan = _Loan(ctx)
        self._knows.bind(slot.conn, ctx)
        if self._knows.cancels:
            loan.stop = ctx.on_done(lambda: self._soon(self._start_cancel, slot, loan))

    def _start_cancel(self, slot: Slot, loan: _Loan) -> None:
        if not loan.over and loan.canceller is None:
            work = loan.cancel_until_over(self._driver, slot.conn)
            loan.canceller = self._spawn("cancel", work)

    def _soon(self, call: Callable[..., object], *args: Any) -> None:
        """Have it called in the loop, from any thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended, and everything in it
            self._loop.call_soon_threadsafe(call, *args)

    async def _rung(self, bell: asyncio.Event, seconds: float) -> None:
        """Wait for the bell, so many seconds at most."""
        assert self._loop is not None
        alarm = None if seconds == inf else self._loop.call_later(seconds, bell.set)
        try:
            await bell.wait()
        finally:
            if alarm is not None:
                alarm.cancel()
        bell.clear()

    async def _with_spare(self, use: Callable[[Any], Awaitable[object]], seconds: float) -> bool:
        """Use a connection that nobody has; see `Driver.with_spare`."""
        used = False

        async def use_it(conn: Any) -> None:
            nonlocal used
            await use(conn)
            used = True

        async with asyncio.timeout(seconds):
            await self._sparing.acquire()
        try:
            slot = self._state.spare(monotonic(), seconds)
            self._attend()
            if slot is None:
                return False
            if slot.state is SlotState.DIALLING:
                self._run(await self._dial_once(slot, use_it, seconds))
                self._attend()
                return used
            try:
                await use_it(slot.conn)
            finally:
                self._conclude(slot, None, sound=used)
        finally:
            self._sparing.release()
        return True

    # -- carrying out what was decided

    def _run(self, actions: Iterable[Action]) -> list[asyncio.Task[Any]]:
        """Carry out actions; return the tasks that close connections."""
        closes: list[asyncio.Task[Any]] = []
        for action in actions:
            match action:
                case Wake(request):
                    request.signal.set()
                case Dial(slot):
                    dial = self._spawn("dial", self._dial(slot))
                    self._dials.add(dial)
                    dial.add_done_callback(partial(self._end_dial, slot))
                case Close(slot, reason):
                    closes.append(self._spawn("close", self._close_slot(slot, reason)))
                case Check(slot):
                    self._spawn("keepalive", self._try_out(slot, None))
                case Cut(slot):
                    with suppress(Exception):
                        self._knows.cut(slot.conn)
                case Overdue():
                    self._report_leak(action)
        return closes

    def _spawn(self, what: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Do it in a task of the pool's own."""
        assert self._loop is not None
        task = self._loop.create_task(work, name=f"pool-{self.name}-{what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _dial(self, slot: Slot) -> None:
        """Dial, and go on with the next dial that this one gives rise to."""
        todo: Slot | None = slot
        while todo is not None:
            actions = await self._dial_once(todo)
            todo = None
            for action in actions:
                if todo is None and isinstance(action, Dial):
                    todo = action.slot
                else:
                    self._run([action])
            self._attend()

    def _end_dial(self, slot: Slot, dial: asyncio.Task[Any]) -> None:
        self._dials.discard(dial)
        if dial.cancelled() and slot.state is SlotState.DIALLING:  # before it had begun
            error = asyncio.CancelledError()
            self._run(self._state.dial_failed(slot, error, monotonic(), draw(), final=False))

    async def _dial_once(
        self,
        slot: Slot,
        use: Callable[[Any], Awaitable[object]] | None = None,
        limit: float = inf,
    ) -> list[Action]:
        """Dial. *use*: what is done with it before anybody else gets it; *limit*: seconds."""
        conn = None
        if self._listener is not None:
            self._emit("ConnectionCreated", connection=slot.number)
        limit = min(self._state.settings.connect_timeout, limit)
        try:
            bound = asyncio.timeout(limit)
            try:
                async with bound:
                    conn = await self._connect()
                    self._learn(conn)
                    if self._setup is not None:
                        await settle(self._setup(conn))
                    await self._driver.adopt(conn)
                    if use is not None:
                        await use(conn)
            except TimeoutError as exc:
                if not bound.expired():
                    raise
                raise TimeoutError(f"not connected within {limit:g} s") from exc
        except BaseException as exc:
            return await self._fail_dial(slot, conn, exc)
        now = monotonic()
        self._tell_outage(None)
        if self._listener is not None:
            seconds = now - slot.born_at
            self._emit("ConnectionReady", connection=slot.number, seconds=seconds)
        return self._state.dialled(slot, conn, now, draw())

    async def _fail_dial(self, slot: Slot, conn: Any, exc: BaseException) -> list[Action]:
        self._learn(exc)
        if self._listener is not None:
            self._emit("ConnectionClosed", connection=slot.number, reason="error", error=exc)
        interrupted = not isinstance(exc, Exception)
        transient = interrupted or isinstance(exc, TimeoutError)
        final = not transient and self._knows.is_final(exc)
        actions = self._state.dial_failed(slot, exc, monotonic(), draw(), final=final)
        if interrupted:
            self._run(actions)
        elif not (final or self._knows.is_momentary(exc)):
            self._tell_outage(exc)
        if conn is not None:
            with suppress(Exception):
                await self._driver.close(conn)
        if interrupted:
            raise exc
        return actions

    def _learn(self, thing: object) -> None:
        """Find out from the first connection or error which driver `connect` belongs to."""
        if self._driver_known:
            return
        driver = drivers.driver_of(thing)
        if driver is not None:
            self._driver_known = True
            self._use_driver(driver)

    async def _close_slot(self, slot: Slot, reason: Reason) -> None:
        try:
            with suppress(Exception):  # it is gone either way, and the slot has to become free
                await self._driver.close(slot.conn)
        finally:
            if self._listener is not None:
                self._emit("ConnectionClosed", connection=slot.number, reason=CMAP_REASON[reason])
            slot.conn = None
            actions = self._state.closed(slot, monotonic())
            closing = self._closing
            if closing is not None and not self._state.outstanding:
                closing.bell.set()
            self._run(actions)
            self._attend()

    def _attend(self) -> None:
        """See to it that what is due is done in time."""
        due = self._state.due
        if due < self._alarm_at:
            self._set_alarm(due)

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_at = at
        if at < inf:
            assert self._loop is not None
            self._alarm = self._loop.call_later(max(0.0, at - monotonic()), self._turn)

    def _turn(self) -> None:
        """Do what is due."""
        actions = self._state.tick(monotonic())
        self._set_alarm(self._state.due)
        self._run(actions)

    # -- changing and ending

    async def resize(self, **settings: Unpack[Options]) -> None:
        """Change settings while the pool runs: `max_open`, `max_idle` and every other one.

        When it returns, the idle surplus is physically closed; what is lent above the new
        `max_open` is closed as it comes back, and `stats().open` shows it.

        Raises:
            ValueError: a setting cannot be meant. Nothing has changed.
            ForkedPoolError: this process inherited the pool.
        """
        self._enter_loop()
        changed = self._state.settings.changed(**settings)
        closes = self._run(self._state.resize(changed, monotonic()))
        self._attend()
        await _all_of(closes)

    async def clear(self) -> None:
        """Replace every connection: the idle ones now, the lent ones as they come back.

        For a fail-over, or credentials that have changed.
        """
        self._enter_loop()
        if self._listener is not None:
            self._emit("PoolCleared")
        closes = self._run(self._state.clear())
        self._attend()
        await _all_of(closes)

    async def close(
        self, limit: float | ContextLike | None = None, *, last_grace: float = LAST_GRACE
    ) -> CloseReport:
        """Close the pool in three steps, and report: as `Pool.close`.

        A second close returns the same report; while the first one waits, a second one with an
        earlier limit shortens it. When it returns, no task of the pool's is left but those that
        wait for what was reported as leaked.

        Args:
            limit: Seconds to wait for what is lent, or a context that ends the waiting; default 5.
            last_grace: Seconds for a borrower to give back what was cancelled.

        Raises:
            ForkedPoolError: this process inherited the pool.
            RuntimeError: the pool belongs to another event loop.
        """
        self._enter_loop()
        now = monotonic()
        ctx: ContextLike | None = None
        deadline = now + CLOSE_TIMEOUT
        if isinstance(limit, int | float):
            deadline = now + limit
        elif limit is not None:
            ctx = limit
            deadline = inf if ctx.deadline is None else ctx.deadline
        closing = self._closing
        if closing is not None:
            closing.hasten(deadline)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, closing.deadline - now) + 2 * LAST_GRACE):
                    await closing.ended.wait()
            return closing.report or self._report(closing, [])
        task = asyncio.current_task()
        by = "a callback" if task is None else task.get_name()
        cause = None if ctx is None or not ctx.done else ctx.cause
        closing = self._closing = _Closing(by, now, cause, deadline, last_grace)
        closing.closed_before = self._state.closed_count
        actions = self._state.close()
        closing.lent = sum(1 for slot in self._state.slots if is_out(slot))
        return await self._close(closing, actions, ctx)

    async def _close(
        self, closing: _Closing, actions: list[Action], ctx: ContextLike | None
    ) -> CloseReport:
        leaked: list[Leak] = []
        stop = None if ctx is None else ctx.on_done(lambda: self._soon(closing.hasten, -inf))
        try:
            closes = self._run(actions)
            for dial in self._dials:
                dial.cancel()
            await self._await_return(closing)
            late = [slot for slot in self._state.slots if is_out(slot)]
            if late:
                leaked = await self._end_loans(closing, late)
            if closes:  # also where nobody is waited for: a good-bye takes no time
                await asyncio.wait(closes, timeout=closing.last_grace)
            await _all_of(self._dials)
        finally:
            if stop is not None:
                stop()
            closing.report = self._report(closing, leaked)
            closing.ended.set()
            self._set_alarm(inf)
            if self._listener is not None:
                self._emit("PoolClosed")
        return closing.report

    async def _await_return(self, closing: _Closing) -> None:
        while self._state.outstanding:
            left = closing.deadline - monotonic()
            if left <= 0:
                return
            await self._rung(closing.bell, left)

    async def _end_loans(self, closing: _Closing, late: list[Slot]) -> list[Leak]:
        """Step 3: cancel, a last grace, cut. Say of each loan what became of it."""
        now = monotonic()
        loans = {slot: borrowed(slot, now) for slot in late}
        if self._knows.cancels:
            for slot in late:
                if slot.state is _LENT:
                    slot.loan = slot.loan or _Loan()
                    self._start_cancel(slot, slot.loan)
            closing.deadline = monotonic() + closing.last_grace
            await self._await_return(closing)
        leaks: list[Leak] = []
        for slot, loan in loans.items():
            self._state.given_up(slot)
            if not is_out(slot):
                outcome = "given back after its statement was cancelled"
            elif self._knows.cuts:
                self._knows.cut(slot.conn)
                outcome = "cut off from the server, and left to its borrower"
            else:
                outcome = "left to its borrower: closed when it comes back"
            if slot.loan is not None:
                slot.loan.end()
            leaks.append(words.leak_of(loan, outcome))
        return leaks

    def owns(self, task: asyncio.Task[Any]) -> bool:
        """Whether this is a task of the pool's own, which ends by itself or with `close`."""
        return task in self._tasks

    async def __aenter__(self) -> Self:
        self._enter_loop()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncLease:
    """One loan as an `async with` block. Made by `AsyncPool.acquire`, used once."""

    __slots__ = ("_ctx", "_leak_threshold", "_pool", "_seconds", "_slot")

    def __init__(
        self,
        pool: AsyncPool,
        ctx: ContextLike | None,
        seconds: float | None,
        leak_threshold: float | None,
    ) -> None:
        self._pool = pool
        self._ctx = ctx
        self._seconds = seconds
        self._leak_threshold = leak_threshold

    async def __aenter__(self) -> Any:
        stack = capture()
        self._slot = slot = await self._pool._borrow(
            self._ctx, self._seconds, self._leak_threshold, stack, bound=True
        )
        return slot.conn

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pool = self._pool
        slot = self._slot
        slot.bound = False
        if pool._forked:
            return  # a child leaves its parent's block: the parent has the connection still
        if exc is None:
            await pool._give_back(slot)
            return
        interrupted = isinstance(exc, asyncio.CancelledError)
        broken = pool._knows.is_disconnect(exc) or (interrupted and not pool._driver.settles)
        await pool._give_back(slot, broken=broken, doubtful=interrupted)
        ctx = self._ctx
        if ctx is not None and ctx.done and pool._knows.is_error(exc):
            err = ctx.err
            assert err is not None
            raise err from exc


class _Loan:
    """A loan whose statements may be cancelled; see `loans.Loan`. Here a task is the fence."""

    __slots__ = ("bell", "canceller", "cancels", "ctx", "cut", "first", "over", "stop")

    def __init__(self, ctx: ContextLike | None = None) -> None:
        self.ctx = ctx  # its end is the loan's; None: only a close cancels
        self.cancels = 0  # of a statement that ran
        self.first = 0.0  # when the first of them began
        self.stop: Callable[[], bool] | None = None  # takes the context's callback back
        self.over = False  # being given back: no cancel begins any more
        self.canceller: asyncio.Task[Any] | None = None
        self.cut = False  # its connection is of no more use
        self.bell = asyncio.Event()  # wakes the canceller when the loan is over

    async def cancel_until_over(self, driver: AsyncDriver, conn: Any) -> None:
        """Cancel what runs, again and again, until the loan is over."""
        quiet_at = monotonic()
        pause = PAUSE
        while not self.over:
            reached = True
            try:
                if driver.knows.is_busy(conn):
                    self.first = self.first or monotonic()
                    self.cancels += 1
                    async with asyncio.timeout(CANCEL_TIMEOUT):
                        await driver.cancel(conn, CANCEL_TIMEOUT)
                else:
                    quiet_at = monotonic()
            except Exception:
                reached = False
            if driver.knows.cuts and not (reached and monotonic() < quiet_at + CANCEL_PATIENCE):
                self.cut = True
                driver.knows.cut(conn)
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.bell.wait()
            pause = min(pause * 2, PAUSE_MAX)

    def end(self) -> None:
        """Let no cancel begin any more."""
        self.over = True
        if self.stop is not None:
            self.stop()
        self.bell.set()

    async def is_over(self) -> bool:
        """Wait until no cancel is under way. False: that is not certain, or it has been cut."""
        if self.canceller is None:
            return True
        done, _ = await asyncio.wait({self.canceller}, timeout=2 * CANCEL_TIMEOUT)
        return bool(done) and not self.cut


class _Closing(Closing):
    def __init__(
        self, by: str, at: float, cause: object, deadline: float, last_grace: float
    ) -> None:
        super().__init__(by, at, cause, deadline, last_grace)
        self.bell = asyncio.Event()
        self.ended = asyncio.Event()

    def hasten(self, deadline: float) -> None:
        """Stop waiting then, if that is earlier."""
        self.deadline = min(self.deadline, deadline)
        self.bell.set()


def _current_task() -> object:
    """Return who borrows: the task, but not so that an idle connection keeps it alive."""
    task = asyncio.current_task()
    return None if task is None else weakref.ref(task)


def _outcome(trial: asyncio.Task[tuple[bool, bool]]) -> tuple[bool, bool]:
    if trial.cancelled() or trial.exception() is not None:
        return False, False
    return trial.result()


async def _all_of(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Wait until all of them have ended, however that was."""
    waited_for = set(tasks)
    if waited_for:
        await asyncio.wait(waited_for)
