"""A loan whose statements may be cancelled: the context that ends it, and the fence around it."""

from __future__ import annotations

__all__ = ["Loan", "check", "ring"]

from _thread import allocate_lock
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any

from workers.pool.drivers.base import Driver
from workers.pool.protocols import ContextLike

# Seconds. How long telling the server to cancel may take; after how long a statement that was
# cancelled and still runs is cut off, where the driver can.
CANCEL_TIMEOUT = 2.0
CANCEL_PATIENCE = 2.0
# Between two cancels of one loan: its borrower may have begun another statement meanwhile.
PAUSE = 0.02
PAUSE_MAX = 0.5


class Loan:
    """What a pool keeps of a loan that may be cancelled.

    `over` and `fence` are guarded by the pool's lock. A cancel is under way only while `fence` is
    held, none begins once `over` is set, and a return waits for the fence: so no cancel can hit
    whoever borrows the connection next.
    """

    __slots__ = ("bell", "cancelled", "cancels", "ctx", "cut", "fence", "first", "over", "stop")

    def __init__(self, ctx: ContextLike | None = None) -> None:
        self.ctx = ctx  # its end is the loan's; None: only a close cancels
        self.stop: Callable[[], bool] | None = None  # takes the context's callback back
        self.over = False  # being given back
        self.fence: Any = None  # a held lock while a cancel is under way
        self.cancelled = False
        self.cancels = 0  # of a statement that may have run
        self.first = 0.0  # when the first of them began
        self.cut = False  # its connection is of no more use
        self.bell = allocate_lock()  # wakes the canceller when the loan is over
        self.bell.acquire()

    def cancel_until_over(
        self, lock: AbstractContextManager[Any], driver: Driver, conn: Any
    ) -> None:
        """Cancel what runs, again and again, until the loan is over; a thread's whole life.

        Once is not enough: the borrower may have been between two statements. Where the server
        cannot be told, or its statement outlives the patience, the connection is cut.
        """
        quiet_at = monotonic()
        pause = PAUSE
        while True:
            with lock:
                if self.over:
                    return
                self.cancelled = True
                self.fence = fence = allocate_lock()
                fence.acquire()
            reached = True
            try:
                if driver.is_busy(conn):
                    self.first = self.first or monotonic()
                    self.cancels += 1
                    driver.cancel(conn, CANCEL_TIMEOUT)
                else:
                    quiet_at = monotonic()
            except Exception:
                reached = False
            if driver.cuts and not (reached and monotonic() < quiet_at + CANCEL_PATIENCE):
                self.cut = True
                driver.cut(conn)
            with lock:
                self.fence = None
            fence.release()
            if self.cut:
                return
            self.bell.acquire(True, pause)
            pause = min(pause * 2, PAUSE_MAX)

    def end(self, fence: Any) -> bool:
        """Wait until no cancel is under way. False: that is not certain, or it has been cut.

        *fence* is what `fence` was when `over` was set, both under the pool's lock.
        """
        if self.stop is not None:
            self.stop()
        ring(self.bell)
        if fence is not None and not fence.acquire(True, 2 * CANCEL_TIMEOUT):
            return False
        return not self.cut


def check(ctx: ContextLike) -> None:
    """Raise the context's error when it has ended."""
    if ctx.done:
        err = ctx.err
        assert err is not None
        raise err


def ring(bell: Any) -> None:
    """Release a lock that somebody sleeps on, or is about to; once is as good as twice."""
    try:  # noqa: SIM105 (suppress() takes as long as everything else in a hand-over)
        bell.release()
    except RuntimeError:
        pass
