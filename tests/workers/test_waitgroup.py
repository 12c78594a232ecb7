"""WaitGroup: its laws, what children raise, who is outstanding; in threads and in asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import sys
import threading
import traceback
from functools import partial
from time import monotonic

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers import waitgroup as waitgroup_module
from workers.context import Cancelled, Context, DeadlineExceeded
from workers.waitgroup import WaitGroup

PATIENCE = 30.0  # seconds until a wait that must succeed has failed
ROUNDS = 200  # of a race; each is short


@pytest.fixture(scope="session", autouse=True)
def _timer_thread():
    """Start the process's one timer thread before anybody counts threads: it stays for good."""
    with Context.background().with_timeout(60.0) as context:
        context.on_done(int)


@pytest.fixture
def wg():
    """Give an empty group."""
    return WaitGroup()


@pytest.fixture
def gate():
    """Give an event that children wait for; it is set at the end, so that none stays."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def reports(monkeypatch):
    """Collect what goes to threading.excepthook."""
    collected: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: collected.append(args.exc_value))
    return collected


def fail(exc: BaseException) -> None:
    """Be a child that raises."""
    raise exc


def until(condition) -> None:
    """Wait for a condition that must come true."""
    deadline = monotonic() + PATIENCE
    nobody = Context.background().with_cancel()
    while not condition():
        assert monotonic() < deadline, "it did not happen"
        nobody.wait(0.001)


def in_thread(function, *args):
    """Run a function in a thread; return the thread and the list of what it raises."""
    raised: list[BaseException] = []

    def run():
        try:
            function(*args)
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


# -- the laws


def test_wait_of_nothing_returns(wg):
    """A group to which nothing was added has nothing to wait for."""
    wg.wait()
    wg.wait(0.0)

    assert wg.count == 0


def test_wait_returns_when_all_are_done(wg):
    """Wait returns at zero, and not while one is left."""
    wg.add(2)
    thread, raised = in_thread(wg.wait, PATIENCE * 2)
    until(lambda: wg._waiters)
    wg.done()
    assert wg.count == 1
    thread.join(0.05)
    assert thread.is_alive()

    wg.done()

    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert raised == []


def test_never_below_zero(wg):
    """Counting down what was never counted is an error, and changes nothing."""
    with pytest.raises(ValueError, match="1 done, 0 added"):
        wg.done()
    wg.add(2)
    with pytest.raises(ValueError, match="3 done, 2 added"):
        wg.add(-3)
    assert wg.count == 2
    wg.add(-2)
    with pytest.raises(ValueError, match="zero"):
        wg.done()
    wg.wait()


def test_done_does_not_count_down_a_child(wg, gate):
    """What `go` has started counts itself down; somebody's `done` too many cannot do it."""
    wg.go(gate.wait)

    with pytest.raises(ValueError, match="1 done, 0 added"):
        wg.done()

    assert wg.count == 1
    gate.set()
    wg.wait(PATIENCE)


def test_no_add_at_zero_after_wait_has_begun(wg):
    """After a wait has begun, an add at zero comes too late, and says so: nobody would wait."""
    wg.wait()

    with pytest.raises(RuntimeError, match="is over"):
        wg.add()
    with pytest.raises(RuntimeError, match="is over"):
        wg.go(fail, AssertionError("it was started"))
    assert wg.count == 0
    assert wg.outstanding == ()
    wg.add(0)


def test_no_add_at_zero_even_after_a_wait_that_gave_up(wg):
    """It does not depend on whether the wait was still there when the counter came to zero."""
    wg.add()
    with pytest.raises(TimeoutError):
        wg.wait(0.0)
    wg.done()

    with pytest.raises(RuntimeError, match="is over"):
        wg.add()


def test_who_is_counted_may_add_others(wg, gate):
    """Above zero the counter may rise while somebody waits, and the wait is for all of them."""

    def parent():
        gate.wait(PATIENCE)
        wg.go(order.append, "grandchild")
        wg.add()
        order.append("child")
        wg.done()

    order: list[str] = []
    wg.go(parent)
    thread, raised = in_thread(wg.wait, PATIENCE * 2)
    until(lambda: wg._waiters)

    gate.set()

    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert raised == []
    assert sorted(order) == ["child", "grandchild"]
    assert wg.count == 0


def test_many_may_wait_and_wait_again(wg):
    """Every wait is told at zero, and later ones return at once."""
    wg.add()
    waits = [in_thread(wg.wait, PATIENCE * 2) for _ in range(5)]
    until(lambda: len(wg._waiters) == 5)

    wg.done()

    for thread, raised in waits:
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert raised == []
    wg.wait()
    assert wg._waiters == []


class LawMachine(RuleBasedStateMachine):
    """Any sequence of add, done and wait, compared with a counter and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = WaitGroup()
        self.counter = 0
        self.waited = False

    @rule(n=st.integers(-3, 3))
    def add(self, n):
        """Add any number: refused below zero, and at zero after a wait."""
        if self.counter + n < 0:
            with pytest.raises(ValueError, match="zero"):
                self.wg.add(n)
        elif n > 0 and self.counter == 0 and self.waited:
            with pytest.raises(RuntimeError, match="is over"):
                self.wg.add(n)
        else:
            self.wg.add(n)
            self.counter += n

    @precondition(lambda self: self.counter)
    @rule()
    def done(self):
        """Count one down."""
        self.wg.done()
        self.counter -= 1

    @rule()
    def wait(self):
        """Wait without time: it succeeds exactly at zero."""
        self.waited = True
        if self.counter:
            with pytest.raises(TimeoutError, match=f"{self.counter} outstanding"):
                self.wg.wait(0.0)
        else:
            self.wg.wait(0.0)

    @invariant()
    def counts(self):
        """The counter is what was added and not done, and no wait is left behind."""
        assert self.wg.count == self.counter
        assert self.wg._waiters == []


LawMachine.TestCase.settings = settings(max_examples=60, deadline=None)
test_any_sequence = LawMachine.TestCase


# -- limits of a wait


def test_timeout_says_who_is_outstanding(wg, gate):
    """A wait that runs out of time raises, not early, and names who has not ended."""
    wg.add(2)
    wg.go(gate.wait)
    start = monotonic()

    with pytest.raises(TimeoutError) as caught:
        wg.wait(0.05)

    assert monotonic() - start >= 0.05
    assert str(caught.value) == "after 0.05 s 3 outstanding: Event.wait-1, 2 unnamed"
    assert wg._waiters == []


def test_a_wait_may_be_repeated(wg, gate):
    """After a time-out those outstanding go on, and the next wait gets them."""
    wg.go(gate.wait)
    with pytest.raises(TimeoutError):
        wg.wait(0.0)

    gate.set()

    wg.wait(PATIENCE)


def test_a_long_roll_call_is_cut(wg, gate):
    """A message names twenty; `outstanding` has them all."""
    for _ in range(25):
        wg.go(gate.wait)

    with pytest.raises(TimeoutError, match=r"25 outstanding: .*Event.wait-20, 5 more$"):
        wg.wait(0.0)

    assert len(wg.outstanding) == 25
    gate.set()
    wg.wait(PATIENCE)


def test_a_context_ends_the_wait(wg):
    """The end of the context given is raised, as what it was, by thread and asyncio alike."""
    wg.add()
    with Context.background().with_cancel() as ctx:
        thread, raised = in_thread(wg.wait, ctx)
        until(lambda: wg._waiters)
        ctx.cancel("stop")
        thread.join(PATIENCE)
        assert [(Cancelled, "stop")] == [(type(exc), exc.cause) for exc in raised]
        with pytest.raises(DeadlineExceeded):
            wg.wait(Context.background().with_timeout(0.01))
        with pytest.raises(Cancelled):
            asyncio.run(wg.wait_async(ctx))
        assert wg._waiters == []
        assert len(ctx._table) == 0


def test_zero_wins_over_a_limit_that_has_passed(wg):
    """When all have ended the wait has succeeded, however late it is."""
    with Context.background().with_cancel() as ctx:
        ctx.cancel()
        wg.wait(ctx)
    wg.wait(-1.0)


# -- go


def test_go_counts_before_it_starts(wg, gate):
    """When `go` returns its child is counted and named, whether or not it has run."""

    def fetch(key):
        gate.wait(PATIENCE)
        fetched.append((key, threading.current_thread().name))

    fetched: list[tuple[str, str]] = []
    assert wg.go(fetch, "a") is None
    wg.go(fetch, "b")

    assert wg.count == 2
    assert wg.outstanding == ("fetch-1", "fetch-2")
    assert repr(wg) == "<WaitGroup 2 outstanding: fetch-1, fetch-2>"
    gate.set()
    wg.wait(PATIENCE)
    assert sorted(fetched) == [("a", "fetch-1"), ("b", "fetch-2")]
    assert wg.outstanding == ()
    assert repr(wg) == "<WaitGroup none outstanding>"


def test_go_outlives_the_main_thread():
    """The interpreter does not exit before a child has ended: its threads are no daemons."""

    def ask():
        daemons.append(threading.current_thread().daemon)

    daemons: list[bool] = []
    wg = WaitGroup()
    wg.go(ask)
    wg.wait(PATIENCE)

    assert daemons == [False]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (len, "len"),
        (partial(partial(divmod, 1), 1), "divmod"),
        ("x".join, "str.join"),
        (WaitGroup().wait, "WaitGroup.wait"),
        (lambda: None, "<lambda>"),
        (contextvars.ContextVar("x"), "ContextVar"),
    ],
)
def test_names_are_those_of_the_functions(fn, name):
    """Whatever can be called has a name that an operator recognises."""
    assert waitgroup_module._name(fn) == name


def test_go_takes_the_contextvars_along(wg):
    """A child sees the contextvars of who started it, as with asyncio.to_thread."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("mine")
    seen: list[str] = []

    wg.go(lambda: seen.append(variable.get("nothing")))

    wg.wait(PATIENCE)
    assert seen == ["mine"]


def test_wait_raises_what_children_raised(wg):
    """All exceptions come in one group, with their tracebacks, and every child is counted down."""
    errors = [KeyError("a"), ValueError("b")]
    wg.go(int)
    for error in errors:
        wg.go(fail, error)

    with pytest.raises(ExceptionGroup, match="2 children") as caught:
        wg.wait(PATIENCE)

    assert sorted(map(id, caught.value.exceptions)) == sorted(map(id, errors))
    for exc in caught.value.exceptions:
        assert traceback.extract_tb(exc.__traceback__)[-1].name == "fail"
    assert wg.count == 0
    with pytest.raises(ExceptionGroup):
        wg.wait()


@pytest.mark.parametrize("exc", [Cancelled("stop"), SystemExit(3), KeyboardInterrupt()])
def test_what_is_no_exception_is_raised_too(wg, exc):
    """A child that ends by Cancelled or SystemExit counts down, and wait raises that as well."""
    wg.go(fail, exc)
    wg.go(fail, KeyError())

    with pytest.raises(BaseExceptionGroup) as caught:
        wg.wait(PATIENCE)

    assert not isinstance(caught.value, Exception)
    assert {type(exc), KeyError} == set(map(type, caught.value.exceptions))


def test_a_wait_that_gives_up_tells_who_failed_so_far(wg, gate):
    """An early failure is not lost behind a slow child: it is the cause of the time-out."""
    wg.go(fail, KeyError("early"))
    wg.go(gate.wait)
    until(lambda: wg.count == 1)

    with pytest.raises(TimeoutError) as caught:
        wg.wait(0.0)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    with pytest.raises(DeadlineExceeded) as exceeded:
        wg.wait(Context.background().with_timeout(0.0))
    assert isinstance(exceeded.value.__cause__, ExceptionGroup)

    gate.set()
    with pytest.raises(ExceptionGroup):
        wg.wait(PATIENCE)


def test_failures_are_kept_up_to_a_bound(wg, reports):
    """A hundred are kept for wait; the next ones are reported as those of any thread are."""
    for number in range(103):
        wg.go(fail, KeyError(number))

    with pytest.raises(ExceptionGroup, match="100 children") as caught:
        wg.wait(PATIENCE)

    until(lambda: len(reports) == 3)
    raised = [exc.args[0] for exc in [*caught.value.exceptions, *reports]]
    assert sorted(raised) == list(range(103))


def test_a_child_that_cannot_start_is_not_counted(wg):
    """When no thread can be had `go` raises, and nobody waits for it."""
    threading.stack_size(1 << 46)  # more than there is address space
    try:
        with pytest.raises(RuntimeError, match="can't start"):
            wg.go(print)
    finally:
        threading.stack_size(0)

    assert wg.count == 0
    wg.go(int)
    wg.wait(PATIENCE)


def test_race_of_children_and_waits():
    """Children that end and add others while waits begin: every wait returns after the last."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(ROUNDS):
            wg = WaitGroup()
            ended: list[int] = []

            def child(depth, wg=wg, ended=ended):
                if depth:
                    wg.go(child, depth - 1)
                    wg.add()
                    wg.done()
                ended.append(depth)

            wg.go(child, 2)
            wg.go(child, 2)
            seen: list[int] = []

            def wait(wg=wg, seen=seen, ended=ended):
                wg.wait(PATIENCE * 2)
                seen.append(len(ended))

            waits = [in_thread(wait) for _ in range(3)]
            for thread, raised in waits:
                thread.join(PATIENCE)
                assert not thread.is_alive()
                assert raised == []
            assert seen == [6] * 3
            assert wg.count == 0
            assert wg._waiters == []
    finally:
        sys.setswitchinterval(before)


# -- asyncio


def test_tasks_are_counted_and_raised():
    """`go_async` gives a task, counted and named until it ends; `wait_async` raises its error."""

    async def fetch(key):
        await release.wait()
        if key == "bad":
            raise KeyError(key)
        return key

    release = asyncio.Event()

    async def main():
        wg = WaitGroup()
        good, bad = wg.go_async(fetch, "good"), wg.go_async(fetch, "bad")
        assert wg.outstanding == ("fetch-1", "fetch-2") == (good.get_name(), bad.get_name())
        with pytest.raises(TimeoutError, match="2 outstanding: fetch-1, fetch-2"):
            await wg.wait_async(0.01)
        release.set()
        with pytest.raises(ExceptionGroup) as caught:
            await wg.wait_async(PATIENCE)
        assert [type(exc) for exc in caught.value.exceptions] == [KeyError]
        assert await good == "good"
        assert wg.count == 0
        with pytest.raises(RuntimeError, match="is over"):
            wg.go_async(fetch, "late")

    asyncio.run(main())


def test_a_cancelled_task_has_just_ended():
    """A task that is cancelled, even before its first step, counts down and is no failure."""

    async def main():
        wg = WaitGroup()
        tasks = [wg.go_async(asyncio.sleep, PATIENCE) for _ in range(2)]
        tasks[0].cancel()
        await asyncio.sleep(0)
        tasks[1].cancel()
        await wg.wait_async(PATIENCE)
        assert [task.cancelled() for task in tasks] == [True, True]

    asyncio.run(main())


def test_a_cancelled_wait_leaves_the_children():
    """When the waiting task is cancelled the children go on, and can be waited for again."""

    async def main():
        wg = WaitGroup()
        release = asyncio.Event()
        child = wg.go_async(release.wait)
        waiting = asyncio.create_task(wg.wait_async())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert wg._waiters
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert wg._waiters == []
        assert not child.done()
        release.set()
        await wg.wait_async(PATIENCE)

    asyncio.run(main())


def test_threads_and_tasks_in_one_group(gate):
    """`wait_async` waits for threads too, and the loop goes on meanwhile."""

    async def main():
        wg = WaitGroup()
        wg.go(gate.wait)
        wg.go(fail, KeyError())
        wg.go_async(asyncio.sleep, 0)
        wg.add()
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, wg.done)
        loop.call_later(0.02, gate.set)
        with pytest.raises(ExceptionGroup):
            await wg.wait_async(PATIENCE)
        assert wg.count == 0

    asyncio.run(main())


def test_a_blocking_wait_in_the_loop_is_refused():
    """A wait that would keep its own tasks from ending is an error at once, not a dead-lock."""

    async def main():
        wg = WaitGroup()
        task = wg.go_async(asyncio.sleep, 0)
        with pytest.raises(RuntimeError, match="wait_async"):
            wg.wait()
        thread, raised = in_thread(wg.wait, PATIENCE * 2)
        await task
        await wg.wait_async(PATIENCE)
        thread.join(PATIENCE)
        assert raised == []
        wg.wait()

    asyncio.run(main())


def test_go_async_that_cannot_start_is_not_counted():
    """Without a loop, or without a coroutine, nothing is counted."""
    wg = WaitGroup()
    with pytest.raises(RuntimeError, match="no running event loop"):
        wg.go_async(asyncio.sleep, 0)

    async def main():
        with pytest.raises(TypeError):
            wg.go_async(len, "no coroutine")  # type: ignore[arg-type]
        assert wg.count == 0
        await wg.wait_async()

    asyncio.run(main())


def test_tasks_are_held_until_they_end():
    """A task that nobody else refers to is not collected in its middle, and not held after."""

    async def main():
        wg = WaitGroup()
        ended: list[int] = []

        async def work():
            await asyncio.sleep(0.01)
            ended.append(1)

        wg.go_async(work)
        assert len(wg._tasks) == 1
        await wg.wait_async(PATIENCE)
        assert ended == [1]
        assert len(wg._tasks) == 0

    asyncio.run(main())


def test_failures_of_tasks_beyond_the_bound_are_reported():
    """What `wait_async` cannot keep goes to the loop's exception handler."""

    async def bad():
        raise KeyError

    async def main():
        complaints: list[dict] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        wg = WaitGroup()
        for _ in range(102):
            wg.go_async(bad)
        with pytest.raises(ExceptionGroup, match="100 children"):
            await wg.wait_async(PATIENCE)
        assert [type(what["exception"]) for what in complaints] == [KeyError] * 2

    asyncio.run(main())


# -- forks


def test_a_forked_child_gets_an_error(wg, gate):
    """In a forked child, where its threads are not, the group refuses; the parent's goes on."""
    wg.go(gate.wait)
    wg.add()

    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            refused = 0
            for use in (wg.add, wg.done, wg.wait, partial(wg.go, print)):
                try:
                    use()
                except RuntimeError as exc:
                    refused += "forked child" in str(exc)
            code = 0 if refused == 4 else 1
        finally:
            os._exit(code)

    assert reap(pid) == 0
    wg.done()
    gate.set()
    wg.wait(PATIENCE)


@pytest.mark.parametrize("fails", [False, True])
def test_a_child_of_the_group_may_fork(wg, reports, fails):
    """Forked inside `go`, the copy that comes out of the function leaves the group alone."""
    locked, forked = threading.Event(), threading.Event()
    codes: list[int] = []

    def forks():
        locked.wait(PATIENCE)
        pid = os.fork()
        if pid == 0:
            if fails:
                raise KeyError
            return  # into the copy of the group, whose lock nobody will ever release
        forked.set()
        codes.append(reap(pid))

    wg.go(forks)
    with wg._lock:
        locked.set()
        assert forked.wait(PATIENCE)

    wg.wait(PATIENCE * 2)
    assert codes == [0]
    assert reports == []


def reap(pid: int) -> int:
    """Wait for a child process and return its exit code; kill the one that does not end."""
    deadline = monotonic() + PATIENCE
    nobody = Context.background().with_cancel()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        nobody.wait(0.002)
