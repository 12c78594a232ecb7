"""Context: one tree of cancellation, deadlines and values, for threads and asyncio alike.

The model is Go's `context`. A library in its own right: it decides when work is to stop and tells
whoever listens; it never stops anything by itself. It imports nothing of ours, and asyncio only
when a coroutine uses it.

Theory of operation
-------------------
**A child knows its parent; a parent does not know its children.** Whether a context has ended is
looked up when somebody asks: has it or one before it been ended, has its deadline passed by the
clock? So making, cancelling and dropping a context touches no other object, and nothing has to
run for `done` and `err` to be right.

**Only who listens is registered.** A callback or a waiter stands in the table of its context, and
that context in the table of its parent, and so on up, as long as somebody listens below. Who ends
a context empties the tables from there down.

**Deadlines need a thread only for callbacks.** A blocked `wait` uses its own time-out and asyncio
its loop's timer. For `on_done` there is one daemon thread for the process, started when first
needed; it sleeps until the earliest deadline that somebody listens for, and without one for ever.

**There is no lock.** Each decision is one operation that CPython makes atomic:

- the end: `ends.append(end)`. The first element is the end, whatever races with it;
- a callback: `table.pop(listener)`. Whoever gets it out makes the call, or has prevented it.

Who ends writes the end and then looks for listeners; who listens enters the table and then looks
for an end: one of the two sees the other. So no callback is lost or called twice, none runs under
a lock, and all of this may be used by signal handlers and finalisers and survives a fork. (The one
exception: the first `on_done` with a deadline starts a thread, which a signal handler should not.)
"""

# The nodes of one tree look into each other:
# ruff: noqa: SLF001

from __future__ import annotations

__all__ = ["Cancelled", "Context", "DeadlineExceeded"]

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeAlias

if TYPE_CHECKING:
    import asyncio

_NEVER = math.inf
_LEFT_BLOCK = "its with block was left"  # a string: an exception here would keep its frames alive

# Who set a deadline: the seconds given to with_timeout, the code and the instruction in it. Turned
# into words only when the deadline has passed: finding a line number is not for the hot path.
_Origin: TypeAlias = tuple[float | None, CodeType, int]


class Cancelled(BaseException):
    """The context was cancelled. No `Exception`: user code must not swallow a stop by accident.

    Attributes:
        cause: What was given to `cancel`, or None.
        ago: Seconds from the cancel until this exception was made; None when made by hand.
    """

    def __init__(self, cause: object = None, *, ago: float | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.ago = ago

    def __str__(self) -> str:
        """Read as `cancelled 0.012 s ago: stop`."""
        when = "" if self.ago is None else f" {self.ago:.3f} s ago"
        if isinstance(self.cause, BaseException):
            return f"cancelled{when}: {type(self.cause).__name__}: {self.cause}"
        return f"cancelled{when}: {'no cause given' if self.cause is None else self.cause}"


class DeadlineExceeded(TimeoutError):  # noqa: N818 (Go's name, and a promise to users)
    """The context's deadline has passed.

    Attributes:
        cause: Which deadline it was, in words: how long, and where in the code it was set.
        deadline: The CLOCK_MONOTONIC time of it in seconds; None when made by hand.
        ago: Seconds from the deadline until this exception was made; None when made by hand.
    """

    def __init__(
        self, cause: object = None, *, deadline: float | None = None, ago: float | None = None
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.deadline = deadline
        self.ago = ago

    def __str__(self) -> str:
        """Read as `timeout of 3 s set in handle (orders.py:41) passed 0.012 s ago`."""
        when = "" if self.ago is None else f" {self.ago:.3f} s ago"
        return f"{self.cause or 'deadline'} passed{when}"


class Context:
    """A node of an immutable tree: it ends once, by `cancel`, its deadline or its parent's end.

    `Context.background()` is the root; every other context is made by a `with_…` method. As a
    `with` block a context is cancelled on the way out. As an `async with` block it also cancels
    what the block awaits when it ends, and then the block raises `err`: as `asyncio.timeout` does,
    but with the context's reason. Every method may be called from any thread.

    Signal handlers may `cancel` and ask; they should not `wait`, and not call `on_done` on a
    context with a deadline. A forked child inherits contexts as they are, but no timer: a callback
    that was added before the fork is not told of a deadline in the child.
    """

    __slots__ = (
        "__weakref__",
        "_deadline",  # the effective one: the earliest of the chain; _NEVER without
        "_ends",  # the first element is the end; empty while nobody has ended it or found it ended
        "_origin",  # who set `_deadline`; None where it is inherited
        "_scope",  # what an `async with` block in progress needs on the way out
        "_table",  # who listens: _Listeners, and children below which somebody listens
        "_up",  # the parent; None for the root and for its children, since the root never ends
        "_values",  # (key, value, the rest), nearest first; None at its end
    )

    # Two seams, for tests with a clock of their own.
    _now = staticmethod(monotonic)
    _timers: ClassVar[_Timers]
    _root: ClassVar[Context]

    def __init__(
        self,
        up: Context | None,
        deadline: float,
        origin: _Origin | None,
        values: tuple[object, object, Any] | None,
    ) -> None:
        self._up = up
        self._deadline = deadline
        self._origin = origin
        self._values = values
        self._ends: list[_End] = []
        self._table: dict[_Listener | Context, bool] = {}
        self._scope: tuple[asyncio.Timeout, _LoopListener] | None = None

    # -- the tree

    @classmethod
    def background(cls) -> Context:
        """Return the root. It never ends, and cannot be cancelled."""
        return cls._root

    def with_cancel(self) -> Context:
        """Return a child that ends with its parent, or when it is cancelled itself."""
        return self._child(self._deadline, None, self._values)

    def with_timeout(self, seconds: float) -> Context:
        """Return a child that ends *seconds* from now at the latest; with 0 or less, at once.

        Raises:
            ValueError: *seconds* is not a number.
        """
        now = self._now()
        return self._child_until(now + seconds, now, seconds)

    def with_deadline(self, monotonic: float) -> Context:
        """Return a child that ends at this CLOCK_MONOTONIC time (`time.monotonic()`) at the latest.

        The clock is the same in all processes of a host. A child can only shorten: a deadline
        after the parent's changes nothing.

        Raises:
            ValueError: *monotonic* is not a number.
        """
        return self._child_until(monotonic, self._now(), None)

    def with_value(self, key: object, value: object) -> Context:
        """Return a child in which *key* has this value. Keys are compared with `==`."""
        return self._child(self._deadline, None, (key, value, self._values))

    def _child_until(self, deadline: float, now: float, seconds: float | None) -> Context:
        if deadline < self._deadline:
            caller = sys._getframe(2)
            child = self._child(deadline, (seconds, caller.f_code, caller.f_lasti), self._values)
            if deadline <= now and (end := self._ended()) is not None:
                child._claim(end)  # the parent ended first, whatever this deadline says
            return child
        if deadline >= self._deadline:
            return self._child(self._deadline, None, self._values)
        raise ValueError("a deadline must be a number, not NaN")

    def _child(
        self,
        deadline: float,
        origin: _Origin | None,
        values: tuple[object, object, Any] | None,
    ) -> Context:
        return self.__class__(None if self is self._root else self, deadline, origin, values)

    # -- asking

    @property
    def done(self) -> bool:
        """Whether the context has ended. Right at once, by the clock; never False again."""
        node: Context | None = self
        while node is not None:
            if node._ends:
                return True
            node = node._up
        return self._deadline != _NEVER and self._now() >= self._deadline

    @property
    def err(self) -> Cancelled | DeadlineExceeded | None:
        """Why the context ended: `Cancelled` or `DeadlineExceeded`, or None while it has not.

        The first end counts, and it stays. Each call makes a new exception, because one that is
        raised by several threads would collect all their tracebacks.
        """
        end = self._ended()
        return None if end is None else end.exception(self._now())

    @property
    def cause(self) -> object:
        """What was given to `cancel`, here or above; of a deadline: which one, in words."""
        end = self._ended()
        return None if end is None else end.cause

    @property
    def deadline(self) -> float | None:
        """The CLOCK_MONOTONIC time in seconds by which it ends; the earliest of the chain."""
        return None if self._deadline == _NEVER else self._deadline

    def remaining(self) -> float | None:
        """Return the seconds that are left: 0.0 once ended, None where there is no deadline.

        It fits where Python takes a time-out (`queue.get`, `Lock.acquire`, `select`).
        """
        if self.done:
            return 0.0
        return None if self._deadline == _NEVER else max(0.0, self._deadline - self._now())

    def value(self, key: object) -> Any:
        """Return the value of *key* that was set nearest, here or above; None without one."""
        values = self._values
        while values is not None:
            known, value, values = values
            if known is key or known == key:
                return value
        return None

    def check(self) -> None:
        """Raise `err` when the context has ended: for loops and between two steps.

        Raises:
            Cancelled: it was cancelled.
            DeadlineExceeded: its deadline has passed.
        """
        if self.done:
            err = self.err
            assert err is not None
            raise err

    # -- ending

    def cancel(self, cause: object = None) -> bool:
        """End this context and everything below it; return whether this call did it.

        Callbacks of `on_done` have run when it returns. What they raise goes to
        `threading.excepthook` and keeps neither the other callbacks nor the caller from going on;
        KeyboardInterrupt and SystemExit are raised when all have run.

        Args:
            cause: What `err.cause` will be, and `cause`: a word ("stop") or an exception. An
                exception keeps the frames of its traceback alive as long as the context.

        Raises:
            RuntimeError: this is the root.
        """
        if self is self._root:
            raise RuntimeError("the background context never ends: cancel a child of it")
        now = self._now()  # before looking: a cancel is never dated after a deadline it has beaten
        if self.done:
            return False
        end = _End(cause, now, None)
        if self._claim(end) is not end:
            return False
        if self._table:
            self._tell()
        return True

    def __enter__(self) -> Self:
        if self is self._root:
            raise RuntimeError("the background context never ends: use a child of it as a block")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel(_LEFT_BLOCK)

    # -- being told

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the context has ended, for *timeout* seconds at most; return `done`.

        Without a time-out and a deadline, and on the root, that may be for ever.
        """
        if self.done:
            return True
        until = self._deadline if timeout is None else min(self._deadline, self._now() + timeout)
        gate = threading.Lock()
        gate.acquire()
        listener = self._listen(gate.release)
        try:
            while not self.done:
                left = until - self._now()
                if left <= 0.0:
                    break
                gate.acquire(timeout=-1 if left == _NEVER else min(left, threading.TIMEOUT_MAX))
        finally:
            listener.stop()
        return self.done

    def on_done(self, callback: Callable[[], object]) -> Callable[[], bool]:
        """Have *callback* called once, without arguments, when the context has ended.

        It runs in the thread that cancels, in the timer thread at a deadline, or here and now when
        the context has ended already. It must not block: the canceller and every other deadline
        wait for it; start a thread for longer work. What it raises goes to `threading.excepthook`.
        A context's callbacks run in the order in which they were added, then those below it.

        Returns:
            `stop`, which takes the callback back: True when it has prevented the call, False when
            the callback has been called (it may still run) or was stopped before.

        Raises:
            RuntimeError: the timer thread was needed and could not be started.
        """
        return self._listen(callback, self._deadline).stop

    def _listen(self, callback: Callable[[], object], deadline: float = _NEVER) -> _Listener:
        """Register *callback*; without *deadline* the caller watches the clock himself."""
        if self is self._root:  # registered there, a forgotten listener would live for ever
            return self.with_cancel()._listen(callback)
        if self.done:
            listener = _Listener(self, callback, _NEVER)
            listener.call()
            return listener
        listener = _Listener(self, callback, deadline)
        if deadline != _NEVER:
            self._timers.arm(listener)
        self._table[listener] = True
        self._link()
        if self.done:
            # The end may have come by before the line above: then it has told us, and has left it
            # to us to take the path back.
            untold = self._table.pop(listener, False)
            self._unlink()
            if untold:
                listener.call()
        return listener

    def _claim(self, end: _End) -> _End:
        """Offer an end; return the one that holds, which is the first. Atomic."""
        self._ends.append(end)
        return self._ends[0]

    def _ended(self) -> _End | None:
        """Return the first end, remembered from then on; None while there is none.

        Down the chain the earlier of two wins: the parent's end, or the node's own deadline.
        """
        if not self.done:
            return None
        end: _End | None = None
        path: list[Context] = []
        node: Context | None = self
        while node is not None:
            if node._ends:
                end = node._ends[0]
                break
            path.append(node)
            node = node._up
        now = self._now()
        for node in reversed(path):
            latest = now if end is None else end.at
            if node._origin is not None and node._deadline <= latest:
                end = _End(_describe(node._origin), node._deadline, node._deadline)
            if end is not None:
                end = node._claim(end)
        return end

    def _link(self) -> None:
        """Enter the tables above, so that every end up there comes by here."""
        node = self
        while (up := node._up) is not None:
            up._table[node] = True
            node = up

    def _unlink(self) -> None:
        """Leave the tables above, as far up as nobody else listens.

        Invariant: a context stands in its parent's table while somebody stands in its own. Whoever
        links or takes somebody out sees to it afterwards, on the whole path.
        """
        node = self
        while not node._table and (up := node._up) is not None:
            up._table.pop(node, None)
            if not node._table:
                node = up  # also when another thread has popped: he may not have seen all of it
                continue
            # Somebody began to listen here after the first look, and may have linked before our
            # pop: link again, and look again whether he is still there. An end that came in between
            # has missed him: tell him.
            node._link()
            if node.done:
                node._tell()
                return

    def _tell(self) -> None:
        """Call everybody who listens here and below; each is called by whoever gets him out."""
        interrupt: BaseException | None = None
        nodes = deque([self])
        while nodes:
            table = nodes[0]._table
            while table:
                for listener in tuple(table):
                    if not table.pop(listener, False):
                        continue  # stopped meanwhile, or called by another thread
                    if isinstance(listener, Context):
                        nodes.append(listener)
                        continue
                    try:
                        listener.call()
                    except BaseException as exc:  # to exit or to interrupt: when all have run
                        interrupt = exc
            nodes.popleft()
        self._unlink()
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                del interrupt  # it refers to this frame

    # -- asyncio

    def __await__(self) -> Generator[Any, None, None]:
        """Wait in asyncio until the context has ended, from whichever thread. Raises nothing."""
        return self._wait_in_loop().__await__()

    async def _wait_in_loop(self) -> None:
        if self.done:
            return
        import asyncio

        future = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not future.done():  # done: the awaiting task is being cancelled
                future.set_result(None)

        listener = _LoopListener(self, wake)
        try:
            await future
        finally:
            listener.close()

    async def __aenter__(self) -> Self:
        import asyncio

        self.__enter__()
        if self._scope is not None:
            raise RuntimeError("this context is an async with block already: make a child for it")
        # asyncio's own scope does the cancelling: it knows how to tell its cancel from another's.
        timeout = asyncio.timeout(None)
        await timeout.__aenter__()
        now = asyncio.get_running_loop().time()
        self._scope = timeout, _LoopListener(self, lambda: timeout.reschedule(now))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._scope is not None
        timeout, listener = self._scope
        self._scope = None
        listener.close()
        try:
            await timeout.__aexit__(kind, exc, traceback)
        except TimeoutError as expired:
            err = self.err
            assert err is not None
            raise err from expired.__cause__
        finally:
            self.cancel(_LEFT_BLOCK)

    # -- the rest

    def __repr__(self) -> str:
        if self is self._root:
            return "<Context background>"
        err = self.err
        if err is not None:
            return f"<Context {err}>"
        if self._deadline == _NEVER:
            return "<Context open>"
        return f"<Context open, {self._deadline - self._now():.3f} s left>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a context belongs to its process: send its deadline instead")


class _End:
    """How a context ended; also the end of every context below that ended with it."""

    __slots__ = ("at", "cause", "deadline")

    def __init__(self, cause: object, at: float, deadline: float | None) -> None:
        self.cause = cause
        self.at = at  # when: the earlier end wins where two meet
        self.deadline = deadline  # None: cancelled

    def exception(self, now: float) -> Cancelled | DeadlineExceeded:
        ago = now - self.at
        if self.deadline is None:
            return Cancelled(self.cause, ago=ago)
        return DeadlineExceeded(self.cause, deadline=self.deadline, ago=ago)


def _describe(origin: _Origin) -> str:
    """Say which deadline it is: `timeout of 3 s set in handle (app/orders.py:41)`."""
    seconds, code, instruction = origin
    what = "deadline" if seconds is None else f"timeout of {float(seconds):g} s"
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return f"{what} set in {code.co_qualname} ({code.co_filename}:{line})"
    return f"{what} set in {code.co_qualname} ({code.co_filename})"


class _Listener:
    """Somebody who is to be told once that a context has ended.

    Whoever takes it out of the context's table owns it, and retires it: nobody else may.
    """

    __slots__ = ("callback", "deadline", "node")

    def __init__(self, node: Context, callback: Callable[[], object], deadline: float) -> None:
        self.node: Context | None = node  # None once retired
        self.callback: Callable[[], object] | None = callback
        self.deadline = deadline  # what the timer thread watches; _NEVER: nothing

    def stop(self) -> bool:
        """Prevent the call; return whether that came in time."""
        node = self.node
        if node is None or not node._table.pop(self, False):
            return False
        self._retire()
        node._unlink()
        return True

    def call(self) -> None:
        """Make the call. Only KeyboardInterrupt and SystemExit come out."""
        callback = self.callback
        self._retire()
        assert callback is not None
        try:
            callback()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:
            _report(exc)

    def _retire(self) -> None:
        node = self.node
        self.node = self.callback = None  # a heap may hold this object until its deadline
        if self.deadline != _NEVER and node is not None:
            node._timers.disarm(self)


def _report(exc: BaseException) -> None:
    """Hand what a callback raised to `threading.excepthook`, as if its thread had ended with it."""
    try:
        thread = threading.current_thread()
        threading.excepthook(threading.ExceptHookArgs((type(exc), exc, exc.__traceback__, thread)))
    except Exception:  # the hook is user code too; the other callbacks must still run
        sys.__excepthook__(*sys.exc_info())


class _Timers:
    """Calls listeners at their deadlines: a heap that one thread owns, and an inbox for all.

    Most listeners are stopped long before their deadline: they leave the inbox without the thread
    having seen them. Those in the heap are dropped when they come up, or when most of it is dead.
    """

    __slots__ = (
        "_bell",
        "_dead",
        "_heap",
        "_inbox",
        "_numbers",
        "_running",
        "_started",
        "_wakes_at",
    )

    PURGE_FROM = 1000  # entries; below, dead ones are not worth a wake-up

    def __init__(self) -> None:
        self._inbox: dict[_Listener, bool] = {}
        # Only the thread touches the heap. The number keeps equal deadlines in order.
        self._heap: list[tuple[float, int, _Listener]] = []
        self._numbers = count()
        # Listeners retired minus listeners popped. Threads race in `+=`, so it may be off by a few:
        # it decides only when to tidy up, and is set right then.
        self._dead = 0
        # The time until which the thread sleeps: an earlier deadline must ring. Without a thread
        # every deadline is earlier.
        self._wakes_at = _NEVER
        self._bell = threading.Lock()
        self._bell.acquire()
        self._started = threading.Lock()  # held for good by whoever has started the thread
        self._running = threading.Lock()  # held for good by the thread: there is one

    def arm(self, listener: _Listener) -> None:
        """Have the listener's context told at the listener's deadline.

        Raises:
            RuntimeError: no thread can be started.
        """
        self._inbox[listener] = True
        if listener.deadline < self._wakes_at:
            try:
                self._ring()
            except BaseException:
                self._inbox.pop(listener, None)
                raise

    def disarm(self, listener: _Listener) -> None:
        """Forget a listener that has been retired. Called exactly once after each `arm`."""
        if self._inbox.pop(listener, False):
            return
        self._dead += 1
        if len(self._heap) >= self.PURGE_FROM and self._mostly_dead():
            self._ring()

    def turn(self, now: float) -> float:
        """Tell every context whose time has come; return the next deadline. The thread's alone."""
        heap = self._heap
        for listener in tuple(self._inbox):
            if self._inbox.pop(listener, False):
                heappush(heap, (listener.deadline, next(self._numbers), listener))
        while heap and heap[0][0] <= now:
            _, _, listener = heappop(heap)
            self._dead -= 1  # made up for when it is retired, or has been
            node = listener.node
            if node is not None:
                try:
                    node._tell()
                except BaseException as exc:  # one callback's SystemExit ends no other's timer
                    _report(exc)
        if self._mostly_dead():
            heap[:] = [entry for entry in heap if entry[2].node is not None]
            heapify(heap)
            self._dead = 0
        return heap[0][0] if heap else _NEVER

    def _mostly_dead(self) -> bool:
        return self._dead * 2 > len(self._heap)

    def _ring(self) -> None:
        with suppress(RuntimeError):  # it has been rung already
            self._bell.release()
        if self._started.acquire(blocking=False):
            try:
                threading.Thread(target=self._run, name="context-deadlines", daemon=True).start()
            except BaseException:  # after a KeyboardInterrupt it may run all the same
                self._started.release()
                raise

    def _run(self) -> None:
        if not self._running.acquire(blocking=False):
            return
        while True:
            self._wakes_at = self.turn(monotonic())
            if self._inbox:
                continue  # armed during the turn, too early to know whether to ring
            left = self._wakes_at - monotonic()
            self._bell.acquire(
                timeout=-1 if left == _NEVER else min(max(left, 0.0), threading.TIMEOUT_MAX)
            )


class _LoopListener:
    """Calls a function in the running event loop, once, when a context has ended.

    The loop's own timer watches the deadline, so that no thread is needed. The context may be
    ended in any thread. All but `_wake` runs in the loop.
    """

    __slots__ = ("_callback", "_context", "_listener", "_loop", "_timer")

    def __init__(self, context: Context, callback: Callable[[], object]) -> None:
        import asyncio

        self._context = context
        self._callback: Callable[[], object] | None = callback  # None once called or closed
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._listener = context._listen(self._wake)
        self._watch_deadline()

    def close(self) -> None:
        """Never call from now on. Idempotent."""
        self._callback = None
        self._listener.stop()
        if self._timer is not None:
            self._timer.cancel()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has been closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(self._look)

    def _watch_deadline(self) -> None:
        remaining = self._context.remaining()
        if remaining is not None:
            self._timer = self._loop.call_later(remaining, self._look)

    def _look(self) -> None:
        callback = self._callback
        if callback is None:
            return
        if not self._context.done:  # a loop may be a clock tick early
            self._watch_deadline()
            return
        self.close()
        callback()


Context._timers = _Timers()
Context._root = Context(None, _NEVER, None, None)


def _forget_timers() -> None:
    """Begin anew in a forked child: it has neither the thread nor the state it was in."""
    Context._timers = _Timers()


os.register_at_fork(after_in_child=_forget_timers)
