"""The pool for threads: it does what `state` decides. Locks, clocks, threads and drivers are here.

One lock guards the state; no driver is called and nobody is woken under it. A waiter waits on a
lock of its own. There is no thread as long as nothing needs one: a dial has one of its own while
it lasts (SQLite none), and one keeper sleeps until something is due and ends when nothing is.
"""

# A pool and its leases are one thing in two classes:
# ruff: noqa: SLF001

from __future__ import annotations

__all__ = ["Lease", "Pool"]

import os
import threading
from _thread import allocate_lock, get_ident, start_new_thread
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Self, Unpack

from workers.pool import drivers, forks, words
from workers.pool.drivers.base import Driver
from workers.pool.errors import WrongPoolError
from workers.pool.events import Listener
from workers.pool.keeper import Keeper
from workers.pool.loans import Loan, check, ring
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


class Pool(Shell):
    """A pool of connections, first come first served.

    Every method may be called by any thread, but not by a signal handler or a finaliser: those may
    run on top of a thread that is in the pool already.

        pool = Pool.from_url("postgresql://app@/orders", max_open=20)
        with pool.acquire(ctx) as conn:
            conn.execute("select 1")
        report = pool.close(5.0)

    The connection is the driver's own. Whoever wants a transaction to last commits it: what is
    open when the connection comes back is rolled back. A pool opens nothing before it is asked,
    unless `min` says so. It belongs to the process that made it: a child that is forked with
    `os.fork` gets ForkedPoolError from it.

    Attributes:
        on_leak: Told of each loan that passes `leak_threshold`, once, in a thread of the pool's; it
            must be quick. It may be set at any time; without it, and without a listener, the log
            is told.
        on_crowded: Called by each thread that has to wait because `max_open` is reached, before
            it waits; it must not block.
        on_outage: Called with the driver's error when it cannot connect for a reason that may pass,
            and with None when it can again, by the thread that dials; it must not block.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        name: str = "pool",
        setup: Callable[[Any], object] | None = None,
        listener: Listener | None = None,
        **settings: Unpack[Options],
    ) -> None:
        """Make a pool of what *connect* returns.

        Args:
            connect: Opens a connection (any DB-API `connect`, with its arguments bound). It is
                called by threads of the pool's own. Of a connection of sqlite3, psycopg or
                PyMySQL and a client of redis-py the pool knows all that `from_url` knows; of
                another one it knows what PEP 249 says.
            name: For errors, events and thread names.
            setup: Called with each new connection before it is lent for the first time. Settings
                of the driver that it makes are restored when a borrower has changed them.
            listener: Told every event, see `PoolEvent`. Without one, leaks go to the log.
            **settings: See `Settings`.

        Raises:
            ValueError: a setting cannot be meant.
        """
        self._init(
            lambda _timeout: connect(),
            None,
            name=name,
            setup=setup,
            listener=listener,
            settings=settings,
        )

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
        """Make a pool for a URL: SQLite, PostgreSQL, MySQL or MariaDB, or Redis.

        `sqlite:///relative.db`, `sqlite:////absolute.db`, `postgresql://…`, `mysql://…` (also
        `mariadb://…`), `redis://…`, `rediss://…` or `unix://…` (Redis by a Unix socket).

        Args:
            url: No part of it but its scheme is ever in an error, an event or a repr.
            application_name: What the server's list of sessions shows, where it has one.
            name: As for `Pool`.
            setup: As for `Pool`.
            listener: As for `Pool`.
            **settings: As for `Pool`.

        Raises:
            ValueError: the URL or a setting cannot be meant.
            MissingDriverError: the driver is not installed; it says what brings it.
        """
        connect, driver = drivers.from_url(url, application_name)
        self = cls.__new__(cls)
        self._init(connect, driver, name=name, setup=setup, listener=listener, settings=settings)
        return self

    def _init(
        self,
        connect: Callable[[float], Any],
        driver: Driver | None,
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
        self._lock = threading.Lock()
        self._sparing = threading.Lock()
        self._use_state(PoolState(Settings(**settings)))
        self._use_driver(driver or Driver())
        self._keeper = Keeper(self._turn)
        forks.register(self)
        if listener is not None:
            self._emit("PoolCreated")
            self._emit("PoolReady")
        if self._state.settings.min:
            with self._lock:
                actions = self._state.resize(self._state.settings, monotonic())
            self._run(actions)
            self._attend()

    def _use_driver(self, driver: Driver) -> None:
        if driver.spares:
            driver.with_spare = self._with_spare
            driver.dial = self._connect
        self._driver = driver
        self._tidy = driver.tidy
        with self._lock:
            self._state.glance_after(driver.glance_after)

    @property
    def _knows(self) -> Driver:
        return self._driver

    @property
    def _closed(self) -> Closing | None:
        return self._closing

    def _use_state(self, state: PoolState) -> None:
        self._state = state
        # The hot path's own names: each saves a look-up per call.
        self._take = state.take
        self._give = state.give
        self._by_conn = state.by_conn

    # -- borrowing

    def acquire(
        self,
        ctx: ContextLike | None = None,
        *,
        timeout: float | None = None,
        leak_threshold: float | None = None,
    ) -> Lease:
        """Return a `with` block that borrows a connection and gives it back on every way out.

        Args:
            ctx: Bounds the waiting, and the loan: at its end the statement that runs on the
                connection is cancelled, and leaving the block raises `ctx.err` with the driver's
                error as `__cause__`.
            timeout: Seconds to wait at most; default `acquire_timeout`.
            leak_threshold: Seconds after which this loan counts as leaked; 0: never; default the
                pool's.

        Entering raises what `get` raises.
        """
        return Lease(self, ctx, timeout, leak_threshold)

    def get(
        self,
        ctx: ContextLike | None = None,
        *,
        timeout: float | None = None,
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
        """
        stack = capture()
        slot = None
        if leak_threshold is None and (ctx is None or not ctx.done):
            slot = self._take(monotonic(), get_ident(), stack)
            if slot is not None and slot.state is _LENT and ctx is None and self._listener is None:
                return slot.conn
        if slot is None or slot.state is not _LENT:
            slot = self._get_slowly(ctx, timeout, leak_threshold, stack, slot, bound=False)
        elif self._listener is not None:
            self._emit_check_out(slot)
        if ctx is not None:
            self._begin_loan(slot, ctx)
        return slot.conn

    def put(self, conn: Any, *, broken: bool = False) -> None:
        """Give a connection back that `get` returned. From any thread, exactly once.

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
        if slot.loan is not None:
            self._end_loan(slot, broken)
            return
        if self._listener is not None and slot.state is _LENT:
            self._emit("ConnectionCheckedIn", connection=slot.number)
        try:
            plain = not self._tidy(conn)
        except Exception:
            plain = False
            broken = True  # the driver cannot even look at it: it does so to broken ones
        if not plain or broken:
            self._give_back(slot, dirty=not plain, broken=broken)
            return
        with self._lock:
            heir = self._give(slot, monotonic())
        if heir is not None:
            if isinstance(heir, Request):
                ring(heir.signal)
            else:
                self._give_back(slot)

    # -- borrowing, where it is not plain

    def _get_slowly(
        self,
        ctx: ContextLike | None,
        timeout: float | None,
        leak_threshold: float | None,
        stack: Stack,
        slot: Slot | None,
        *,
        bound: bool,
    ) -> Slot:
        """Borrow with a wait, a check, a dial, a context or a leak threshold of its own."""
        self._refuse_fork()
        started = monotonic()
        deadline = started + (self._state.settings.acquire_timeout if timeout is None else timeout)
        if ctx is not None:
            check(ctx)
            if ctx.deadline is not None:
                deadline = min(deadline, ctx.deadline)
        signal = allocate_lock()
        signal.acquire()
        request = Request(
            get_ident(), stack, deadline, signal=signal, leak_after=leak_threshold, bound=bound
        )
        if self._listener is not None:
            self._emit("ConnectionCheckOutStarted")
        try:
            with self._lock:
                if slot is None:
                    actions = self._state.ask(request, started)
                else:
                    actions = self._state.second_look(slot, request, started)
                waits = not request.done
                crowded = waits and self._state.crowded
            if crowded and self.on_crowded is not None:
                self.on_crowded()
            if actions:
                self._run(actions)
            self._attend()
            slot = self._await_slot(request, ctx)
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

    def _await_slot(self, request: Request, ctx: ContextLike | None) -> Slot:
        """Wait for the answer, and try what needs trying, until there is a sound connection."""
        while True:
            if not request.done:
                self._await_answer(request, ctx)
            if request.failure is not None:
                raise self._failure(request)
            slot = request.slot
            assert slot is not None
            if slot.state is _CHECKING:
                self._try_out(slot, request)
                continue  # it may have turned out dead, or the pool has closed meanwhile
            if ctx is not None and ctx.done:
                check(ctx)  # `_forsake` hands the connection on
            return slot

    def _await_answer(self, request: Request, ctx: ContextLike | None) -> None:
        """Sleep until the request is answered; raise where it is withdrawn instead."""
        # The callback must not take our lock: it may run in a signal handler, on top of a holder.
        stop = None if ctx is None else ctx.on_done(lambda: ring(request.signal))
        try:
            patience: float = NESTED_AFTER
            while not request.done and (ctx is None or not ctx.done):
                left = request.deadline - monotonic()
                if left <= 0:
                    break
                if not request.signal.acquire(True, min(left, patience)) and left > patience:
                    patience = threading.TIMEOUT_MAX
                    self._look_for_nesting(request)
        finally:
            if stop is not None:
                stop()
        if request.done:
            return
        ended = ctx is not None and ctx.done
        with self._lock:
            position = self._state.place(request)
            if not self._state.withdraw(request, monotonic(), timed_out=not ended):
                return  # answered at the last moment
        if ctx is not None:
            check(ctx)
        raise self._timed_out(request, position)

    def _try_out(self, slot: Slot, request: Request | None) -> None:
        """Try a connection in state CHECKING."""
        sound = deaf = False
        state = self._state
        try:
            if not state.must_answer(slot, monotonic()) and self._driver.is_quiet(slot.conn):
                sound = True
            else:
                deaf = not self._answers(slot, inf if request is None else request.deadline)
                sound = not deaf
        except Exception:  # noqa: S110 (whatever it is: the connection is not lent)
            pass
        finally:
            with self._lock:
                actions = state.checked(slot, request, monotonic(), sound=sound, deaf=deaf)
            self._run(actions)
            self._attend()

    def _answers(self, slot: Slot, deadline: float) -> bool:
        """Make a round trip. False: no answer in time; raises where the answer is bad."""
        with self._lock:
            self._state.guard(slot, monotonic(), deadline)
            cut_at = slot.cut_at
        self._attend()
        try:
            self._driver.check(slot.conn)
        except Exception:
            if monotonic() >= cut_at:
                return False
            raise
        return True

    def _forsake(self, request: Request) -> None:
        """Leave nothing behind of a request whose asker goes away with an exception."""
        with self._lock:
            if self._state.withdraw(request, monotonic()):
                return
            slot = request.slot
            if slot is None:
                return
            if slot.state is _CHECKING:  # interrupted in the middle of the check
                actions = self._state.checked(slot, None, monotonic(), sound=False)
            elif slot.state is _LENT and slot.conn is not None:
                heir = self._state.give(slot, monotonic())
                actions = []
                if isinstance(heir, Request):
                    actions = [Wake(heir)]
                elif heir is LOOK and self._state.begin_return(slot, monotonic()):
                    actions = self._state.returned(slot, monotonic(), sound=True)
            else:
                return
        self._run(actions)

    def _give_back(
        self, slot: Slot, *, dirty: bool = False, broken: bool = False, doubtful: bool = False
    ) -> None:
        """Give back what is not clean, or not plain.

        *doubtful*: it was cancelled, so it has to prove by a round trip that it is quiet.
        """
        driver = self._driver
        guarded = driver.cuts and not broken and (dirty or doubtful)
        with self._lock:
            if not self._state.begin_return(slot, monotonic(), guarded=guarded):
                raise WrongPoolError(f"connection {slot.number} was given back before")
            loan, fence = _detach_loan(slot)
        if loan is not None:  # a close has just begun to cancel it
            broken = not loan.end(fence) or broken
            self._trace_cancels(loan)
        self._attend()
        sound = False
        try:
            if not broken and not driver.is_broken(slot.conn):
                if self._tidy(slot.conn):
                    driver.reset(slot.conn)
                if doubtful:
                    driver.check(slot.conn)
                sound = True
        except Exception:  # noqa: S110 (whatever it is: the connection is not lent again)
            pass
        finally:
            with self._lock:
                actions = self._state.returned(slot, monotonic(), sound=sound)
            self._run(actions)
            self._attend()

    # -- a context that ends while a connection is lent under it

    def _begin_loan(self, slot: Slot, ctx: ContextLike) -> None:
        """Have the statements of this loan cancelled when the context ends."""
        loan = Loan(ctx)
        with self._lock:
            slot.loan = loan
        try:
            self._driver.bind(slot.conn, ctx)
            if self._driver.cancels:
                # A thread, because the callback must not block; a bare one, because it may run in
                # a signal handler, where threading's own locks may be held.
                loan.stop = ctx.on_done(lambda: self._start_cancel(slot, loan))
        except BaseException:
            self._end_loan(slot, broken=False)
            raise

    def _end_loan(self, slot: Slot, broken: bool) -> None:
        """Give back what was lent under a context, once no cancel can hit it any more."""
        with self._lock:
            loan, fence = _detach_loan(slot)
        if loan is None:  # another thread gives it back too: one of the two is told
            self.put(slot.conn, broken=broken)
            return
        quiet = loan.end(fence)
        self._trace_cancels(loan)
        self._driver.bind(slot.conn, None)
        if quiet and not loan.cancelled:
            self.put(slot.conn, broken=broken)
        else:
            if self._listener is not None:
                self._emit("ConnectionCheckedIn", connection=slot.number)
            self._give_back(slot, broken=broken or not quiet, doubtful=True)

    def _start_cancel(self, slot: Slot, loan: Loan) -> None:
        start_new_thread(loan.cancel_until_over, (self._lock, self._driver, slot.conn))

    def _with_spare(self, use: Callable[[Any], object], timeout: float) -> bool:
        """Use a connection that nobody has; see `Driver.with_spare`.

        One at a time: many cancels share one connection instead of opening one each.
        """
        used = False

        def use_it(conn: Any) -> None:
            nonlocal used
            use(conn)
            used = True

        if not self._sparing.acquire(True, timeout):
            raise TimeoutError("another cancel takes too long")
        try:
            with self._lock:
                slot = self._state.spare(monotonic(), timeout)
            self._attend()
            if slot is None:
                return False
            if slot.state is SlotState.DIALLING:
                self._run(self._dial_once(slot, use_it, timeout))
                self._attend()
                return used
            try:
                use_it(slot.conn)
            finally:
                with self._lock:
                    actions = self._state.checked(slot, None, monotonic(), sound=used)
                self._run(actions)
                self._attend()
            return True
        finally:
            self._sparing.release()

    # -- carrying out what was decided

    def _run(self, actions: Iterable[Action], *, keeper: bool = False) -> None:
        """Carry out actions. *keeper*: it has other things to do than to wait for a driver."""
        for action in actions:
            match action:
                case Wake(request):
                    ring(request.signal)
                case Dial(slot):
                    if self._driver.local and not keeper:
                        self._dial(slot)
                    else:
                        self._spawn("dial", self._dial, slot)
                case Close(slot, reason):
                    if keeper and not self._driver.closes_at_once:
                        self._spawn("close", self._close_slot, slot, reason)
                    else:
                        self._close_slot(slot, reason)
                case Check(slot):
                    self._spawn("check", self._try_out, slot, None)
                case Cut(slot):
                    with suppress(Exception):
                        self._driver.cut(slot.conn)
                case Overdue():
                    self._report_leak(action)

    def _spawn(self, what: str, work: Callable[..., object], *args: object) -> None:
        """Do it in a thread; here and now where none can be had."""
        thread = threading.Thread(
            target=work, args=args, name=f"pool-{self.name}-{what}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the interpreter is going down, or the limit is reached
            work(*args)

    def _dial(self, slot: Slot) -> None:
        """Dial, and go on with the next dial that this one gives rise to."""
        todo: Slot | None = slot
        while todo is not None:
            actions = self._dial_once(todo)
            todo = None
            for action in actions:
                if todo is None and isinstance(action, Dial):
                    todo = action.slot
                else:
                    self._run([action])
            self._attend()

    def _dial_once(
        self, slot: Slot, use: Callable[[Any], object] | None = None, limit: float = inf
    ) -> list[Action]:
        """Dial. *use*: what is done with it before anybody else gets it; *limit*: seconds."""
        conn = None
        if self._listener is not None:
            self._emit("ConnectionCreated", connection=slot.number)
        try:
            conn = self._connect(min(self._state.settings.connect_timeout, limit))
            self._learn(conn)
            if self._setup is not None:
                self._setup(conn)
            self._driver.adopt(conn)
            self._tidy = self._driver.tidy  # which `adopt` may have found a better one for
            if use is not None:
                use(conn)
        except BaseException as exc:
            if conn is not None:
                with suppress(Exception):
                    self._driver.close(conn)
            self._learn(exc)
            if self._listener is not None:
                self._emit("ConnectionClosed", connection=slot.number, reason="error", error=exc)
            interrupted = isinstance(exc, KeyboardInterrupt | SystemExit)
            final = not interrupted and self._driver.is_final(exc)
            with self._lock:
                actions = self._state.dial_failed(slot, exc, monotonic(), draw(), final=final)
            if interrupted:  # the asker's own, where he dials himself
                self._run(actions, keeper=True)
                raise
            if not (final or self._driver.is_momentary(exc)):
                self._tell_outage(exc)
            return actions
        now = monotonic()
        self._tell_outage(None)
        if self._listener is not None:
            seconds = now - slot.born_at
            self._emit("ConnectionReady", connection=slot.number, seconds=seconds)
        with self._lock:
            return self._state.dialled(slot, conn, now, draw())

    def _learn(self, thing: object) -> None:
        """Find out from the first connection or error which driver `connect` belongs to."""
        if self._driver_known:
            return
        driver = drivers.driver_of(thing)
        if driver is not None:
            self._driver_known = True
            self._use_driver(driver)

    def _close_slot(self, slot: Slot, reason: Reason) -> None:
        with suppress(Exception):  # it is gone either way, and the slot has to become free
            self._driver.close(slot.conn)
        if self._listener is not None:
            self._emit("ConnectionClosed", connection=slot.number, reason=CMAP_REASON[reason])
        with self._lock:
            slot.conn = None
            actions = self._state.closed(slot, monotonic())
            closing = self._closing
            if closing is not None and not self._state.outstanding:
                ring(closing.bell)
                self._keeper.dismiss()
        self._run(actions)
        self._attend()

    def _attend(self) -> None:
        """See to it that the keeper wakes up in time."""
        if self._state.due < self._keeper.wakes_at:
            with self._lock:
                start = self._keeper.hurry(self._state.due)
            if start:
                self._keeper.start()

    def _turn(self) -> float | None:
        """Do what is due: the keeper's thread."""
        with self._lock:
            now = monotonic()
            actions = self._state.tick(now)
            self._keeper.wakes_at = due = self._state.due
        try:
            self._run(actions, keeper=True)
        except BaseException:
            self._keeper.wakes_at = inf  # this thread dies of it: the next deadline starts another
            raise
        return None if due == inf else due - now

    # -- changing and ending

    def resize(self, **settings: Unpack[Options]) -> None:
        """Change settings while the pool runs: `max_open`, `max_idle` and every other one.

        When it returns, the idle surplus is physically closed; what is lent above the new
        `max_open` is closed as it comes back, and `stats().open` shows it.

        Raises:
            ValueError: a setting cannot be meant. Nothing has changed.
            ForkedPoolError: this process inherited the pool.
        """
        self._refuse_fork()
        with self._lock:
            changed = self._state.settings.changed(**settings)
            actions = self._state.resize(changed, monotonic())
        self._run(actions)
        self._attend()

    def clear(self) -> None:
        """Replace every connection: the idle ones now, the lent ones as they come back.

        For a fail-over, or credentials that have changed.
        """
        self._refuse_fork()
        if self._listener is not None:
            self._emit("PoolCleared")
        with self._lock:
            actions = self._state.clear()
        self._run(actions)
        self._attend()

    def close(
        self, limit: float | ContextLike | None = None, *, last_grace: float = LAST_GRACE
    ) -> CloseReport:
        """Close the pool in three steps, and report.

        1. Nothing is lent any more: whoever waits gets PoolClosed at once, idle connections are
           closed. 2. What is lent is waited for. 3. At the limit, what runs on the rest is
           cancelled; its borrower has `last_grace` more to give it back; then the connection is
           cut off from the server where the driver can do that safely, and left to its borrower
           where it cannot. It never raises because of a leak.

        A second close returns the same report; while the first one waits, a second one with an
        earlier limit shortens it.

        Args:
            limit: Seconds to wait for what is lent, or a context that ends the waiting; default 5.
            last_grace: Seconds for a borrower to give back what was cancelled.

        Raises:
            ForkedPoolError: this process inherited the pool.
        """
        self._refuse_fork()
        now = monotonic()
        ctx: ContextLike | None = None
        deadline = now + CLOSE_TIMEOUT
        if isinstance(limit, int | float):
            deadline = now + limit
        elif limit is not None:
            ctx = limit
            deadline = inf if ctx.deadline is None else ctx.deadline
        with self._lock:
            closing = self._closing
            first = closing is None
            if closing is None:
                by = threading.current_thread().name
                cause = None if ctx is None or not ctx.done else ctx.cause
                closing = self._closing = _Closing(by, now, cause, deadline, last_grace)
                closing.closed_before = self._state.closed_count
                actions = self._state.close()
                closing.lent = sum(1 for slot in self._state.slots if is_out(slot))
            else:
                actions = []
                closing.deadline = min(closing.deadline, deadline)
        if not first:
            ring(closing.bell)
            closing.ended.wait(max(0.0, closing.deadline - now) + 2 * LAST_GRACE)
            return closing.report or self._report(closing, [])
        return self._close(closing, actions, ctx)

    def _close(
        self, closing: _Closing, actions: list[Action], ctx: ContextLike | None
    ) -> CloseReport:
        leaked: list[Leak] = []
        stop = None if ctx is None else ctx.on_done(closing.hasten)
        try:
            self._run(actions, keeper=True)  # a close that hangs in the driver must not hold us
            self._await_return(closing)
            with self._lock:
                late = [slot for slot in self._state.slots if is_out(slot)]
            if late:
                leaked = self._end_loans(closing, late)
        finally:
            if stop is not None:
                stop()
            closing.report = self._report(closing, leaked)
            closing.ended.set()
            self._keeper.dismiss()
            if self._listener is not None:
                self._emit("PoolClosed")
        return closing.report

    def _await_return(self, closing: _Closing) -> None:
        while self._state.outstanding:
            left = closing.deadline - monotonic()
            if left <= 0:
                return
            closing.bell.acquire(True, min(left, threading.TIMEOUT_MAX))

    def _end_loans(self, closing: _Closing, late: list[Slot]) -> list[Leak]:
        """Step 3: cancel, a last grace, cut. Say of each loan what became of it."""
        driver = self._driver
        now = monotonic()
        loans = {slot: borrowed(slot, now) for slot in late}
        if driver.cancels:
            for slot in late:
                self._cancel_loan(slot)
            closing.deadline = monotonic() + closing.last_grace
            self._await_return(closing)
        leaks: list[Leak] = []
        for slot, loan in loans.items():
            with self._lock:
                out = is_out(slot)
                self._state.given_up(slot)
            if not out:
                outcome = "given back after its statement was cancelled"
            elif driver.cuts:
                driver.cut(slot.conn)
                outcome = "cut off from the server, and left to its borrower"
            else:
                outcome = "left to its borrower: closed when it comes back"
            leaks.append(words.leak_of(loan, outcome))
        return leaks

    def _cancel_loan(self, slot: Slot) -> None:
        with self._lock:
            if slot.state is not _LENT:
                return
            loan: Loan | None = slot.loan
            if loan is None:
                loan = slot.loan = Loan()
                slot.look = True
            elif loan.cancelled:
                return
        self._start_cancel(slot, loan)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- fork

    def disinherit(self) -> None:
        """In a fork's child: have nothing, and keep the parent's connections from all harm.

        No other thread exists, and the one that held the lock may be one of those who do not.
        """
        self._lock = threading.Lock()
        super().disinherit()
        self._tidy = _refuse
        self._keeper = Keeper(self._turn)


class Lease:
    """One loan as a `with` block. Made by `Pool.acquire`, used once."""

    __slots__ = ("_ctx", "_leak_threshold", "_pool", "_slot", "_timeout")

    def __init__(
        self,
        pool: Pool,
        ctx: ContextLike | None,
        timeout: float | None,
        leak_threshold: float | None,
    ) -> None:
        self._pool = pool
        self._ctx = ctx
        self._timeout = timeout
        self._leak_threshold = leak_threshold

    def __enter__(self) -> Any:
        pool = self._pool
        stack = capture()
        slot = None
        ctx = self._ctx
        if self._leak_threshold is None and (ctx is None or not ctx.done):
            slot = pool._take(monotonic(), get_ident(), stack)
        if slot is None or slot.state is not _LENT:
            slot = pool._get_slowly(
                ctx, self._timeout, self._leak_threshold, stack, slot, bound=True
            )
        elif pool._listener is not None:
            pool._emit_check_out(slot)
        if ctx is not None:
            pool._begin_loan(slot, ctx)
        slot.bound = True
        self._slot = slot
        return slot.conn

    def __exit__(
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
            pool.put(slot.conn)
            return
        pool.put(slot.conn, broken=pool._driver.is_disconnect(exc))
        ctx = self._ctx
        if ctx is not None and ctx.done and pool._driver.is_error(exc):
            err = ctx.err
            assert err is not None
            raise err from exc


class _Closing(Closing):
    """Guarded by the pool's lock, but for the bell and the event."""

    def __init__(
        self, by: str, at: float, cause: object, deadline: float, last_grace: float
    ) -> None:
        super().__init__(by, at, cause, deadline, last_grace)
        self.bell = allocate_lock()
        self.bell.acquire()
        self.ended = threading.Event()

    def hasten(self) -> None:
        """Stop waiting."""
        self.deadline = -inf
        ring(self.bell)


def _refuse(_conn: Any) -> bool:
    """Be the tidy of an inherited pool: nothing there may be touched."""
    return True


def _detach_loan(slot: Slot) -> tuple[Loan | None, Any]:
    """Let no cancel of this loan begin any more; return it, and the fence of one under way."""
    loan: Loan | None = slot.loan
    if loan is None:
        return None, None
    slot.loan = None
    loan.over = True
    return loan, loan.fence
