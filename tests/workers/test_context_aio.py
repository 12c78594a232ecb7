"""Context in asyncio: awaited and as `async with`, ended from anywhere, in any loop state."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from time import monotonic
from typing import Any

import pytest

from workers.context import Cancelled, Context, DeadlineExceeded

PATIENCE = 30.0  # seconds until a wait that must succeed has failed


@pytest.fixture(scope="session", autouse=True)
def _timer_thread():
    """Start the process's one timer thread before anybody counts threads: it stays for good."""
    with Context.background().with_timeout(60.0) as context:
        context.on_done(int)


@pytest.fixture
def ctx():
    """Give a context that nothing but the test ends."""
    with Context.background().with_cancel() as context:
        yield context


def listeners(context: Context) -> int:
    """Count who is registered at a context: callbacks, waiters and children with such."""
    return len(context._table)


def timed() -> int:
    """Count what waits for the process's timer thread."""
    timers = Context._timers
    return len(timers._inbox) + sum(entry[2].node is not None for entry in timers._heap)


def run(main) -> None:
    """Run a coroutine in a loop of its own; a complaint of the loop fails the test."""
    complaints: list[dict[str, Any]] = []

    async def listened():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, complaint: complaints.append(complaint))
        await main
        await asyncio.sleep(0)

    asyncio.run(listened())
    assert complaints == []


async def parked(task: asyncio.Task, context: Context) -> None:
    """Wait until a task waits for a context: the loop's next turn, or the one after."""
    for _ in range(10):
        if listeners(context):
            break
        await asyncio.sleep(0)
    assert not task.done()
    assert listeners(context)


def cancelling() -> int:
    """Count the cancels that the current task has not been relieved of."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


def from_thread(function) -> None:
    """Call a function in another thread, and wait for its return."""
    raised: list[BaseException] = []

    def run():
        try:
            function()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert raised == []


# -- await


@pytest.mark.parametrize("where", ["loop", "thread"])
def test_await_resolves_when_cancelled(ctx, where):
    """`await ctx` returns, without raising, when the context is cancelled in any thread."""

    async def main():
        child = ctx.with_cancel()
        task = asyncio.create_task(asyncio.wait_for(child, PATIENCE))
        await parked(task, child)
        assert not task.done()
        if where == "loop":
            ctx.cancel("stop")
        else:
            from_thread(lambda: ctx.cancel("stop"))
        assert await task is None
        assert child.cause == "stop"
        assert listeners(child) == listeners(ctx) == 0

    run(main())


def test_await_resolves_at_the_deadline(ctx):
    """At the deadline it returns, not before; the loop's own timer does it, not the thread."""

    async def main():
        child = ctx.with_timeout(0.05)
        before = timed()
        task = asyncio.create_task(asyncio.wait_for(child, PATIENCE))
        await parked(task, child)
        assert timed() == before
        await task
        assert monotonic() >= child.deadline
        assert listeners(child) == listeners(ctx) == 0

    run(main())


def test_await_of_an_ended_context_does_not_even_yield(ctx):
    """Where there is nothing to wait for, no other task gets a turn."""

    async def main():
        turns: list[str] = []
        asyncio.get_running_loop().call_soon(turns.append, "turn")
        ctx.cancel()
        await ctx
        await ctx.with_timeout(-1.0)
        assert turns == []

    run(main())


def test_many_tasks_await_one_context(ctx):
    """Everybody who awaits is woken, once."""

    async def main():
        tasks = [asyncio.create_task(asyncio.wait_for(ctx, PATIENCE)) for _ in range(50)]
        await parked(tasks[-1], ctx)
        assert listeners(ctx) == 50
        from_thread(ctx.cancel)
        assert await asyncio.gather(*tasks) == [None] * 50

    run(main())


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_cancelled_await_leaves_nothing(ctx, seconds):
    """When the awaiting task is cancelled, nothing of it stays: no listener, no timer."""

    async def main():
        child = ctx.with_cancel() if seconds is None else ctx.with_timeout(seconds)

        async def wait():
            await child

        task = asyncio.create_task(wait())
        await parked(task, child)
        scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        assert len(scheduled) == (0 if seconds is None else 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert listeners(child) == listeners(ctx) == 0
        assert [handle for handle in scheduled if not handle.cancelled()] == []

    run(main())


def test_an_await_may_be_cancelled_and_resolved_at_once(ctx):
    """A context that ends in the turn in which the awaiting task is cancelled does no harm."""

    async def main():
        for _ in range(20):
            child = ctx.with_cancel()

            async def wait(child=child):
                await child

            task = asyncio.create_task(wait())
            await parked(task, child)
            child.cancel()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0)

    run(main())


def test_a_closed_loop_is_nothing_to_the_canceller(ctx):
    """Cancelling after the loop that listened has been closed raises nothing anywhere."""
    loop = asyncio.new_event_loop()

    async def wait():
        await ctx

    async def begin():
        task = asyncio.create_task(wait())
        await parked(task, ctx)
        return task

    task = loop.run_until_complete(begin())
    loop.close()  # while the task waits, as in a crash: asyncio.run would have cancelled it
    assert listeners(ctx) == 1

    assert ctx.cancel("stop") is True
    from_thread(lambda: ctx.cancel("again"))

    assert listeners(ctx) == 0
    task._log_destroy_pending = False
    task.get_coro().close()


def test_a_race_of_threads_wakes_every_task(ctx):
    """Contexts that other threads end while tasks begin to wait: not one wake-up is lost."""

    async def main():
        contexts = [ctx.with_timeout(60.0) for _ in range(300)]

        def end(step):
            for context in contexts[::step]:
                context.cancel("stop")

        threads = [threading.Thread(target=end, args=(step,)) for step in (1, -1)]

        async def wait(context):
            await context

        tasks = [asyncio.create_task(wait(context)) for context in contexts]
        await asyncio.sleep(0)
        for thread in threads:
            thread.start()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*tasks)
        for thread in threads:
            thread.join(PATIENCE)
        assert listeners(ctx) == 0

    run(main())


def test_a_loop_timer_that_is_early_is_set_again(ctx):
    """A loop whose timer fires before the deadline looks again, and does not resolve early."""

    early: list[float] = []

    class HastyLoop(asyncio.SelectorEventLoop):
        def call_later(self, delay, *args: Any, **kwargs: Any):  # type: ignore[override]
            if delay > 0.01:
                early.append(delay)
                delay /= 10
            return super().call_later(delay, *args, **kwargs)

    async def main():
        child = ctx.with_timeout(0.1)
        await child
        assert monotonic() >= child.deadline
        assert early

    with asyncio.Runner(loop_factory=HastyLoop) as runner:
        runner.run(main())


# -- async with


def test_block_is_cancelled_by_its_deadline(ctx):
    """At the deadline the block is cancelled where it awaits, and raises DeadlineExceeded."""

    async def main():
        reached: list[str] = []
        with pytest.raises(TimeoutError) as caught:
            async with ctx.with_timeout(0.02) as child:
                try:
                    await asyncio.sleep(PATIENCE)
                finally:
                    reached.append("cleaned up")
        assert isinstance(caught.value, DeadlineExceeded)
        assert "timeout of 0.02 s set in main" not in str(caught.value)  # it is a local function
        assert "timeout of 0.02 s set in test_block_is_cancelled" in str(caught.value)
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert reached == ["cleaned up"]
        assert monotonic() >= child.deadline
        assert cancelling() == 0
        await asyncio.sleep(0)

    run(main())


@pytest.mark.parametrize("where", ["loop", "thread", "parent", "inside"])
def test_block_is_cancelled_with_its_context(ctx, where):
    """Cancelled from anywhere, the block raises Cancelled with the cause."""

    async def main():
        child = ctx.with_cancel()
        loop = asyncio.get_running_loop()
        with pytest.raises(Cancelled) as caught:
            async with child:
                match where:
                    case "loop":
                        loop.call_soon(child.cancel, "stop")
                    case "thread":
                        from_thread(lambda: child.cancel("stop"))
                    case "parent":
                        loop.call_soon(ctx.cancel, "stop")
                    case "inside":
                        child.cancel("stop")
                await asyncio.sleep(PATIENCE)
        assert caught.value.cause == "stop"
        assert cancelling() == 0
        assert listeners(child) == listeners(ctx) == 0

    run(main())


def test_block_of_an_ended_context_is_cancelled_at_its_first_await(ctx):
    """As with asyncio.timeout(0): the block is entered, and ends where it first awaits."""

    async def main():
        ctx.cancel("stop")
        reached: list[str] = []
        with pytest.raises(Cancelled):
            async with ctx.with_cancel():
                reached.append("entered")
                await asyncio.sleep(PATIENCE)
        assert reached == ["entered"]

    run(main())


def test_block_cancels_its_context_on_the_way_out(ctx):
    """Left in the ordinary way or by an exception, the context has ended and nothing remains."""

    async def main():
        async with ctx.with_timeout(60.0) as child:
            await asyncio.sleep(0)
            assert not child.done
        assert child.cause == "its with block was left"
        with pytest.raises(TimeoutError, match="the block's own"):
            async with ctx.with_timeout(60.0) as child:
                raise TimeoutError("the block's own")
        assert child.cause == "its with block was left"
        assert listeners(ctx) == 0
        await asyncio.sleep(0)

    run(main())


def test_block_that_finishes_in_time_to_not_notice_does_not_raise(ctx):
    """A context that ends when the block awaits nothing any more interrupts nothing."""

    async def main():
        async with ctx.with_cancel() as child:
            child.cancel("late")
        assert child.cause == "late"
        await asyncio.sleep(0)
        assert cancelling() == 0

    run(main())


def test_a_cancel_of_the_task_stays_one(ctx):
    """When the task itself is cancelled the block raises CancelledError, also in the same turn."""

    async def main():
        for together in (False, True):
            child = ctx.with_cancel()

            async def work(child=child):
                async with child:
                    await asyncio.sleep(PATIENCE)

            task = asyncio.create_task(work())
            await parked(task, child)
            if together:
                child.cancel("stop")
                for _ in range(2):  # until the context's cancel has arrived in the task
                    await asyncio.sleep(0)
                assert task.cancelling() == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert child.done

    run(main())


def test_blocks_nest(ctx):
    """Of nested blocks that one raises whose context has ended, and the outer one goes on."""

    async def main():
        async with ctx.with_timeout(60.0) as outer:
            with pytest.raises(DeadlineExceeded):
                async with outer.with_timeout(0.01):
                    await asyncio.sleep(PATIENCE)
            await asyncio.sleep(0)
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.01), outer.with_cancel():
                    await asyncio.sleep(PATIENCE)
            assert not isinstance(caught.value, DeadlineExceeded)
            assert not outer.done
        with pytest.raises(Cancelled):
            async with ctx.with_cancel() as outer, outer.with_timeout(60.0):
                outer.cancel("stop")
                await asyncio.sleep(PATIENCE)

    run(main())


def test_task_group_under_a_context(ctx):
    """The end of the context cancels every task of a group in its block."""

    async def main():
        ended: list[int] = []

        async def work(number):
            try:
                await asyncio.sleep(PATIENCE)
            finally:
                ended.append(number)

        with pytest.raises(Cancelled):
            async with ctx.with_cancel() as child, asyncio.TaskGroup() as group:
                for number in range(3):
                    group.create_task(work(number))
                await asyncio.sleep(0)
                child.cancel("stop")
        assert sorted(ended) == [0, 1, 2]

    run(main())


def test_one_context_is_one_block_at_a_time(ctx):
    """Entered twice at once is an error; one after the other is not."""

    async def main():
        child = ctx.with_cancel()
        async with child:
            with pytest.raises(RuntimeError, match="make a child"):
                async with child:
                    pass
            assert not child.done
        async with child:
            pass
        with pytest.raises(RuntimeError, match="never ends"):
            async with Context.background():
                pass

    run(main())


def test_nothing_is_held_after_the_block(ctx):
    """Context, task and what they refer to are freed when the block has been left."""

    async def main():
        async def work(context):
            async with context:
                await asyncio.sleep(0)

        child = ctx.with_timeout(60.0)
        task = asyncio.create_task(work(child))
        await task
        gone = weakref.ref(child), weakref.ref(task)
        del child, task
        await asyncio.sleep(0)
        gc.collect()
        assert [reference() for reference in gone] == [None, None]

    run(main())
