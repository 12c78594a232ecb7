"""The pools of one worker, as its runtime has them: opened, kept to their settings, told of, closed.

A pool is a `Pool`, or an `AsyncPool` where the entry point is awaited; what differs stands here.
"""

from __future__ import annotations

__all__ = ["AnyPool", "Holdings"]

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from supervisor.protocol import (
    Allowance,
    Assignment,
    CloseReport,
    Leak,
    LeakFound,
    PoolLimits,
    PoolSettings,
    PoolStats,
    PoolTimings,
    PoolUse,
    Timings,
    Tune,
    application_name,
)
from workers.context import Context
from workers.entry import lacking
from workers.leases import Leases
from workers.outages import Outages
from workers.pool import MissingDriverError, Pool

if TYPE_CHECKING:
    from workers.aio import EventLoop
    from workers.pool.aio import AsyncPool

LAST_GRACE = 0.5  # seconds at most for borrowers whose queries were cancelled
MAX_LEAKS = 50  # of a pool, with their stacks, in one message
SESSIONS_DUE = 5.0  # seconds until the sessions of another worker have ended

AnyPool: TypeAlias = "Pool | AsyncPool"
_P = TypeVar("_P")


class Holdings:
    """The pools of one worker. Written by the main thread and the link's, as noted.

    Args:
        assignment: which pools, and how the database knows whose they are.
        send: sends a message, from any thread, without blocking.
        call_at: has something called on the link's thread at a monotonic time.
    """

    def __init__(
        self,
        assignment: Assignment,
        send: Callable[[Any], object],
        call_at: Callable[[float, Callable[[], object]], object],
    ) -> None:
        self._assignment = assignment
        self._send = send
        self.pools: dict[str, AnyPool] = {}  # by the main thread
        self.loop: EventLoop | None = None  # where the entry point is awaited
        self.outages = Outages(self.pools, send)
        self._leases = Leases(assignment.pools, send, call_at, self._resize)
        self._tune: Tune | None = None  # the newest; by the link's thread
        self._tuning = threading.Lock()

    # --- the main thread --------------------------------------------------------------------------

    def open(self, accepting: Context) -> None:
        """Open all of them, for threads.

        Raises:
            Cancelled: the worker was told to end while it waited for a lease.
            Exception: what a driver says of its URL.
        """
        for name, settings in self._assignment.pools.items():
            make = self._maker(Pool.from_url, name, settings)
            if settings.allowance is None:
                pool = make(settings.max_open, settings.max_idle)
            else:
                pool = self._leases.open(name, make, accepting)
            self._add(name, pool)
            if self._tune is not None:  # it came too early for this one
                self._take(name)

    async def open_in_loop(self, accepting: Context, *, awaited: bool) -> None:
        """Open all of them in the event loop; *awaited*: those that are not to block are awaited."""
        from asyncio import to_thread

        for name, settings in self._assignment.pools.items():
            from_url: Callable[..., AnyPool] = Pool.from_url
            if awaited and not settings.blocking:
                from workers.pool.aio import AsyncPool

                if fault := lacking(name, settings.url):
                    raise MissingDriverError(fault)
                from_url = AsyncPool.from_url
            make = self._maker(from_url, name, settings)
            if settings.allowance is None:
                pool = make(settings.max_open, settings.max_idle)
            else:
                pool = await self._leases.open_async(name, make, accepting)
            self._add(name, pool)
            if self._tune is not None:
                await to_thread(self._take, name)  # which waits for this loop

    def _maker(
        self, from_url: Callable[..., _P], name: str, settings: PoolSettings
    ) -> Callable[[int, int], _P]:
        who = self._assignment
        return lambda max_open, max_idle: from_url(
            settings.url,
            name=name,
            application_name=application_name(who.supervisor, who.worker, who.token),
            max_open=max_open,
            max_idle=max_idle,
            **_without_size(settings),
        )

    def _add(self, name: str, pool: AnyPool) -> None:
        self.outages.watch(name, pool)
        pool.on_leak = lambda leak: self._send(
            LeakFound(name, leak.held_seconds, leak.thread, leak.stack)
        )
        self.pools[name] = pool

    def close(self, closing: Context, abort_margin: float) -> dict[str, CloseReport]:
        """Close all of them at the same time, so that one's wait is not the other's."""
        reports: dict[str, CloseReport] = {}
        last_grace = _last_grace(abort_margin)

        def close(name: str) -> None:
            pool: Any = self.pools[name]
            reports[name] = _report(pool.close(closing, last_grace=last_grace))

        first, *others = self.pools or [""]
        threads = [threading.Thread(target=close, args=(name,), daemon=True) for name in others]
        for thread in threads:
            thread.start()
        if first:
            close(first)
        for thread in threads:
            thread.join()
        return reports

    async def close_in_loop(
        self, loop: EventLoop, closing: Context, abort_margin: float
    ) -> dict[str, CloseReport]:
        """Close all of them, as `close` does."""
        reports = await loop.close_pools(self.pools, closing, _last_grace(abort_margin))
        return {name: _report(report) for name, report in reports.items()}

    # --- the link's thread ------------------------------------------------------------------------

    def allowed(self, message: Allowance) -> None:
        """Have another number of connections."""
        self._leases.told(message)

    def tuned(self, message: Tune) -> None:
        """Remember other settings; `take` brings the pools there."""
        self._tune = message
        self._leases.configured(message.pools)

    # --- any thread -------------------------------------------------------------------------------

    def take(self) -> None:
        """Bring all pools to the newest settings, and return when that has come true."""
        self._take(*list(self.pools))

    def _take(self, *names: str) -> None:
        with self._tuning:
            assert self._tune is not None
            for name in names:
                limits = self._tune.pools.get(name)
                if limits is None or self._leases.resize(name, **_without_size(limits)):
                    continue
                self._resize(
                    self.pools[name],
                    max_open=limits.max_open,
                    max_idle=limits.max_idle,
                    **_without_size(limits),
                )

    def _resize(self, pool: AnyPool, **settings: Any) -> None:
        """Change settings of a pool, and return when they have come true. Any thread but a loop's."""
        if isinstance(pool, Pool):
            pool.resize(**settings)
        else:
            assert self.loop is not None
            self.loop.call(lambda: pool.resize(**settings))

    def end_sessions(self, name: str, application_name: str, accepting: Context) -> bool:
        """End other sessions of that name at a pool's server; raise, or return False, if that failed."""
        pool = self.pools[name]
        if isinstance(pool, Pool):
            from workers.pool.drivers.postgresql import end_sessions

            with pool.acquire(accepting) as conn:
                end_sessions(conn, application_name, SESSIONS_DUE)
            return True

        async def in_loop() -> None:
            from workers.pool.drivers.postgresql_aio import end_sessions

            async with pool.acquire(accepting) as conn:
                await end_sessions(conn, application_name, SESSIONS_DUE)

        assert self.loop is not None
        return self.loop.call(in_loop)

    # --- what is told of them, in the wire's words. Any thread --------------------------------------

    def stats(self) -> dict[str, PoolStats]:
        """Return the state of each."""
        pools = self.pools.copy()  # the main thread may be opening them
        return {name: _stats(pool.stats()) for name, pool in pools.items()}

    def timings(self) -> dict[str, PoolTimings]:
        """Return how long callers have waited for and used their connections, and dials have taken."""
        return {
            name: PoolTimings(
                **{
                    what: Timings(histogram.counts, histogram.sum)
                    for what, histogram in pool.histograms().items()
                }
            )
            for name, pool in self.pools.copy().items()
        }

    def use(self) -> dict[str, PoolUse]:
        """Return what has been done with each, for the line about the worker's life."""
        return {name: _use(pool) for name, pool in self.pools.items()}


def _without_size(limits: PoolLimits) -> dict[str, Any]:
    """Return a pool's settings as keywords, but for how many connections it may have."""
    return {
        name: getattr(limits, name)
        for name in PoolLimits.__struct_fields__
        if name not in ("max_open", "max_idle")
    }


def _last_grace(abort_margin: float) -> float:
    # The closing context leaves half of the margin; what leaks must not cost all of that.
    return min(LAST_GRACE, abort_margin / 4)


def _stats(stats: Any) -> PoolStats:
    return PoolStats(**{name: getattr(stats, name) for name in PoolStats.__struct_fields__})


def _use(pool: AnyPool) -> PoolUse:
    stats, uses = pool.stats(), pool.histograms()["use"]
    return PoolUse(
        acquires=uses.count + stats.in_use,
        waited=stats.wait_count,
        wait_seconds=stats.wait_seconds,
        timeouts=stats.timeouts,
        leaks=stats.leaks,
    )


def _report(report: Any) -> CloseReport:
    return CloseReport(
        closed=report.closed,
        waited=report.waited,
        leaked=tuple(
            Leak(held_seconds=leak.held_seconds, thread=leak.thread, stack=leak.stack)
            for leak in report.leaked[:MAX_LEAKS]
        ),
    )
