"""WaitGroup: wait for everything that was started, and hear how it ended.

The model is Go's `sync.WaitGroup`; what it adds: a wait can be bounded, what a child raised is
raised by `wait`, and those outstanding have names. A library in its own right; it imports nothing
of ours but `Context`, and asyncio only when a coroutine uses it.
"""

from __future__ import annotations

__all__ = ["WaitGroup"]

import os
import threading
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from workers.context import Context

if TYPE_CHECKING:
    import asyncio

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

# Exceptions that are kept for `wait`. A group that lives for days must not collect tracebacks, and
# the frames in them, without bound.
_KEPT = 100
_NAMED = 20  # how many a message names; `outstanding` has them all


class WaitGroup:
    """A counter of what has been started and has not ended, and a wait for zero.

    Count before you start, count down on every way out, wait in one place. `go` does the first two:

        wg = WaitGroup()
        for url in urls:
            wg.go(fetch, url)
        wg.wait(timeout=30.0)

    The laws, as in Go:

    - The counter never falls below zero.
    - From the first `wait` on, the counter may rise only while it is above zero: whoever is still
      counted may add others. At zero it is too late: that wait may have returned already, and
      nobody would wait for the newcomer. It is an error whether or not the wait has in fact
      returned, so that it does not depend on timing. Hence a group serves one wait (or several at
      once); for the next batch make a new group, where Go would let you use it again.

    Every method may be called from any thread, but not from a signal handler or a finaliser. A
    group belongs to the process that made it; a forked child, where none of its threads exist, gets
    an error instead of a wait that never ends.
    """

    __slots__ = (
        "__weakref__",
        "_children",  # number -> name of what `go` and `go_async` started and has not ended
        "_failures",  # what children raised, in the order of their ends; _KEPT at most
        "_lock",  # guards all of these; nothing of others runs under it
        "_numbers",
        "_pid",
        "_tasks",  # asyncio itself holds its tasks only weakly
        "_unnamed",  # what `add` has counted
        "_waited",  # whether a wait has begun
        "_waiters",  # for each wait a context that is cancelled at zero
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._unnamed = 0
        self._children: dict[int, str] = {}
        self._numbers = count(1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures: list[BaseException] = []
        self._waited = False
        self._waiters: list[Context] = []

    # -- counting

    def add(self, n: int = 1) -> None:
        """Count *n* more, before they start; a negative *n* counts down.

        Raises:
            ValueError: the counter would fall below zero.
            RuntimeError: a wait has begun and the counter is at zero; or this is a forked child.
        """
        self._check_process()
        with self._lock:
            if self._unnamed + n < 0:
                raise ValueError(
                    f"a WaitGroup counts no further down than zero: {-n} done, {self._unnamed} added"
                )
            if n > 0:
                self._check_not_over()
            self._unnamed += n
            waiters = self._waiters_at_zero()
        for waiter in waiters:
            waiter.cancel()

    def done(self) -> None:
        """Count one of those that were added down.

        Raises:
            ValueError: there is none. (What `go` started counts itself down.)
            RuntimeError: this is a forked child.
        """
        self.add(-1)

    def go(self, fn: Callable[[*_Ts], object], *args: *_Ts) -> None:
        """Run `fn(*args)` in a thread of its own, counted until it ends, however it ends.

        What it raises, `wait` raises. It runs in a copy of the caller's contextvars. The interpreter
        does not exit before it has ended.

        Raises:
            RuntimeError: a wait has begun and the counter is at zero; no thread can be started; or
                this is a forked child.
        """
        number, name = self._enter(fn)
        run = copy_context().run
        try:
            threading.Thread(target=run, args=(self._run, number, fn, args), name=name).start()
        except Exception:  # after a KeyboardInterrupt the thread runs and counts itself down
            self._leave(number)
            raise

    def go_async(
        self, fn: Callable[[*_Ts], Coroutine[Any, Any, _T]], *args: *_Ts
    ) -> asyncio.Task[_T]:
        """Run the coroutine `fn(*args)` as a task of the running loop, counted until it ends.

        What it raises, `wait_async` raises; a task that was cancelled has just ended. The task is
        held until then.

        Raises:
            RuntimeError: no loop runs in this thread; a wait has begun and the counter is at zero;
                or this is a forked child.
        """
        import asyncio

        loop = asyncio.get_running_loop()
        number, name = self._enter(fn)
        try:
            task = loop.create_task(fn(*args), name=name)
        except Exception:
            self._leave(number)
            raise
        self._tasks.add(task)
        task.add_done_callback(partial(self._task_ended, number))
        return task

    # -- asking

    @property
    def count(self) -> int:
        """How many have not ended."""
        with self._lock:
            return self._unnamed + len(self._children)

    @property
    def outstanding(self) -> tuple[str, ...]:
        """Who has not ended, of what `go` and `go_async` started: function and number, in order.

        The thread or the task has the same name. What `add` counted has none.
        """
        with self._lock:
            return tuple(self._children.values())

    def __repr__(self) -> str:
        with self._lock:
            return f"<WaitGroup {self._roll_call()}>"

    # -- waiting

    def wait(self, timeout: float | Context | None = None) -> None:
        """Block until the counter is zero.

        To return is to say that all have ended, so a wait that was not successful raises. Those
        outstanding go on, and the wait may be repeated. What children have raised until then is the
        `__cause__`.

        Args:
            timeout: Seconds, or a context whose end ends the wait too. None: for ever.

        Raises:
            ExceptionGroup: all have ended, and children raised these. (A BaseExceptionGroup when
                one of them is no Exception, like Cancelled.) The first 100; what further ones
                raised has gone to `threading.excepthook` or the loop's exception handler.
            TimeoutError: the seconds have passed; it says who is outstanding.
            Cancelled: the context was cancelled.
            DeadlineExceeded: the context's deadline has passed.
            RuntimeError: this thread runs the loop of a task that is counted; or this is a forked
                child.
        """
        self._check_not_in_the_loop_of_a_task()
        if self._is_over():
            return
        waiter = self._begin_wait(timeout)
        try:
            waiter.wait()
        finally:
            self._end_wait(waiter)
        self._raise_outcome(timeout)

    async def wait_async(
        self,
        timeout: float | Context | None = None,  # noqa: ASYNC109 (the same name as in `wait`)
    ) -> None:
        """Wait as `wait` does, without blocking the loop; for threads and tasks alike.

        When the waiting task is cancelled the wait ends; what it waited for goes on.
        """
        waiter = self._begin_wait(timeout)
        try:
            await waiter
        finally:
            self._end_wait(waiter)
        self._raise_outcome(timeout)

    def _is_over(self) -> bool:
        """Begin a wait; tell whether it has nothing to wait for and nothing to raise."""
        self._check_process()
        with self._lock:
            self._waited = True
            return not (self._unnamed or self._children or self._failures)

    def _begin_wait(self, timeout: float | Context | None) -> Context:
        """Return a context that ends with the limit, or when the counter is zero."""
        self._check_process()
        if isinstance(timeout, Context):
            waiter = timeout.with_cancel()
        elif timeout is None:
            waiter = Context.background().with_cancel()
        else:
            waiter = Context.background().with_timeout(timeout)
        with self._lock:
            self._waited = True
            self._waiters.append(waiter)
            waiters = self._waiters_at_zero()
        for each in waiters:
            each.cancel()
        return waiter

    def _end_wait(self, waiter: Context) -> None:
        waiter.cancel()
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _raise_outcome(self, timeout: float | Context | None) -> None:
        """Return or raise as `wait` promises. Zero wins over a limit that has passed as well."""
        with self._lock:
            zero = not self._unnamed and not self._children
            failures = tuple(self._failures)
            roll_call = self._roll_call()
        failed = (
            BaseExceptionGroup(f"{len(failures)} children of a WaitGroup raised", failures)
            if failures
            else None
        )
        if zero:
            if failed is not None:
                raise failed
            return
        if isinstance(timeout, Context):
            err = timeout.err
            assert err is not None
            raise err from failed
        raise TimeoutError(f"after {timeout} s {roll_call}") from failed

    # -- the machinery

    def _run(self, number: int, fn: Callable[[*_Ts], object], args: tuple[*_Ts]) -> None:
        """Be the thread of a child: counted down on every way out."""
        try:
            fn(*args)
        except BaseException as exc:
            if not self._keep(exc):
                raise  # to threading.excepthook
        finally:
            self._leave(number)

    def _task_ended(self, number: int, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        exc = None if task.cancelled() else task.exception()
        if exc is not None and not self._keep(exc):
            problem = {"message": "a child of a WaitGroup raised", "exception": exc, "task": task}
            task.get_loop().call_exception_handler(problem)
        self._leave(number)

    def _enter(self, fn: Callable[..., object]) -> tuple[int, str]:
        self._check_process()
        with self._lock:
            self._check_not_over()
            number = next(self._numbers)
            name = self._children[number] = f"{_name(fn)}-{number}"
        return number, name

    def _leave(self, number: int) -> None:
        if os.getpid() != self._pid:
            return  # a child that forked comes out in the copy too, where the lock may be held
        with self._lock:
            del self._children[number]
            waiters = self._waiters_at_zero()
        for waiter in waiters:
            waiter.cancel()

    def _keep(self, exc: BaseException) -> bool:
        """Keep it for `wait`; False when it has to be reported otherwise."""
        if os.getpid() != self._pid:
            return False  # as in _leave
        with self._lock:
            if len(self._failures) >= _KEPT:
                return False
            self._failures.append(exc)
            return True

    def _waiters_at_zero(self) -> list[Context]:
        """Take all waiters out when the counter is zero. The lock is held."""
        if self._unnamed or self._children:
            return []
        waiters, self._waiters = self._waiters, []
        return waiters

    def _roll_call(self) -> str:
        """Say who is outstanding. The lock is held."""
        names = list(islice(self._children.values(), _NAMED))
        if len(names) < len(self._children):
            names.append(f"{len(self._children) - len(names)} more")
        if self._unnamed:
            names.append(f"{self._unnamed} unnamed")
        total = self._unnamed + len(self._children)
        return f"{total} outstanding: {', '.join(names)}" if names else "none outstanding"

    def _check_not_over(self) -> None:
        """Refuse to rise from zero after a wait has begun. The lock is held."""
        if self._waited and not self._unnamed and not self._children:
            raise RuntimeError(
                "this WaitGroup is over: a wait has begun and the counter is at zero, so nobody"
                " would wait for what is added now; add before you wait, or make a new group"
            )

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this WaitGroup belongs to process {self._pid}, and this is a forked child:"
                " make a new one"
            )

    def _check_not_in_the_loop_of_a_task(self) -> None:
        """Refuse a wait that keeps a task from ending and so can never succeed."""
        if not self._tasks:
            return
        import asyncio

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if any(task.get_loop() is loop for task in tuple(self._tasks)):
            raise RuntimeError("a blocking wait would stop the loop it waits for: use wait_async")


def _name(fn: Callable[..., object]) -> str:
    """Return a function's name as an operator would say it."""
    while isinstance(fn, partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return str(name).rpartition("<locals>.")[2]
