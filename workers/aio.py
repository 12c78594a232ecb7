"""The event loop of a worker whose entry point is awaited: imported by those who have one only.

It lives longer than the entry point: the pools are opened in it, and closed in it at the very end, so
what is in flight when the entry point returns has the same time as in a worker with threads. Not
`asyncio.run`: that waits at its end, without limit, for threads and for tasks that do not let
themselves be cancelled. The loop is never closed; the process ends with it.
"""

from __future__ import annotations

__all__ = ["EventLoop", "preload"]

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from workers.context import Cancelled, Context
from workers.pool import CloseReport, Pool
from workers.pool.aio import AsyncPool
from workers.pool.drivers import aio as async_drivers

_T = TypeVar("_T")


def preload(schemes: Iterable[str]) -> None:
    """Import the drivers that a worker with a loop needs, before the fork."""
    for scheme in schemes:
        with suppress(Exception):  # each worker reports a missing driver itself
            async_drivers.module_of(f"{scheme}://")


class EventLoop:
    """One event loop, from the pools' opening to the worker's last report.

    Args:
        factory: makes the loop; None: the policy does, which the application may have changed.
    """

    def __init__(self, factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self._runner = asyncio.Runner(loop_factory=factory)
        self._loop = self._runner.get_loop()
        self._lock = threading.Lock()
        self._handed_over: set[Future[Any]] = set()
        self._has_ended = False
        self._watch: Coroutine[Any, Any, None] | None = None  # what waits for the drain

    # --- the main thread --------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run it, and be there for other threads meanwhile; return what it returns.

        Raises:
            BaseException: what it raises; a SystemExit also where another task does, and then what
                was run goes on with the next call.
        """
        return self._runner.run(work)

    def run_to_its_end(self, work: Coroutine[Any, Any, object]) -> None:
        """Run it whatever other tasks do: one that asks for the end of the process is heard no more.

        Raises:
            Exception: what it raises.
        """
        task = self._loop.create_task(work)
        while not task.done():
            self._watch = _finished(task)
            with suppress(SystemExit, KeyboardInterrupt):
                self._runner.run(self._watch)
        task.result()

    def end(self) -> None:
        """Nothing runs in it any more: whoever has handed something over waits no longer."""
        with self._lock:
            self._has_ended = True
            handed_over = list(self._handed_over)
        for future in handed_over:
            future.cancel()

    # --- any other thread -------------------------------------------------------------------------

    def call(self, function: Callable[[], Coroutine[Any, Any, object]]) -> bool:
        """Have a coroutine run in the loop, and return when it has ended.

        One that is called before the loop runs is run as soon as that does.

        Returns:
            False: the loop has ended first. What it was about is gone with it.

        Raises:
            Exception: what the coroutine raises.
        """
        with self._lock:
            if self._has_ended:
                return False
            future = asyncio.run_coroutine_threadsafe(function(), self._loop)
            self._handed_over.add(future)
        try:
            future.result()
        except CancelledError:
            return False
        finally:
            with self._lock:
                self._handed_over.discard(future)
        return True

    # --- in the loop, at the end of the worker ----------------------------------------------------

    async def end_tasks(self, pools: Iterable[Pool | AsyncPool], closing: Context) -> int:
        """Cancel every task that is not a pool's own; return how many have not ended in time."""
        own = [pool for pool in pools if isinstance(pool, AsyncPool)]
        tasks = {
            task
            for task in asyncio.all_tasks() - {asyncio.current_task()}
            if task.get_coro() is not self._watch and not any(pool.owns(task) for pool in own)
        }
        for task in tasks:
            task.cancel()
        if tasks:
            await _before(closing, asyncio.wait(tasks))
        await _before(closing, self._loop.shutdown_asyncgens())
        return sum(1 for task in tasks if not task.done())

    async def close_pools(
        self, pools: Mapping[str, Pool | AsyncPool], closing: Context, last_grace: float
    ) -> dict[str, CloseReport]:
        """Close all of them at the same time."""

        async def close(pool: Pool | AsyncPool) -> CloseReport:
            if isinstance(pool, AsyncPool):
                return await pool.close(closing, last_grace=last_grace)
            return await _in_thread(lambda: pool.close(closing, last_grace=last_grace))

        reports = await asyncio.gather(*(close(pool) for pool in pools.values()))
        return dict(zip(pools, reports, strict=True))

    async def end_threads(self, closing: Context) -> None:
        """Wait for what `asyncio.to_thread` has begun."""
        # Not cancelled: on the way out it would wait for the threads, and block the loop.
        ended = asyncio.ensure_future(self._loop.shutdown_default_executor())
        await _before(closing, asyncio.wait({ended}))


async def _finished(task: asyncio.Task[Any]) -> None:
    await asyncio.wait({task})


async def _before(closing: Context, work: Awaitable[object]) -> None:
    with suppress(Cancelled):
        async with closing.with_cancel():
            await work


async def _in_thread(function: Callable[[], _T]) -> _T:
    """Run it in a thread of its own; those of `asyncio.to_thread` may all be busy, and for ever."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def run() -> None:
        try:
            result = function()
        except BaseException as exc:
            loop.call_soon_threadsafe(done.set_exception, exc)
        else:
            loop.call_soon_threadsafe(done.set_result, result)

    threading.Thread(target=run, name="ackvisor-close", daemon=True).start()
    return await done
