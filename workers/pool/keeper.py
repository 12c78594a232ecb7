"""The one thread that a pool may have: it sleeps until something is due, and ends when nothing is."""

from __future__ import annotations

__all__ = ["Keeper"]

import weakref
from _thread import TIMEOUT_MAX, allocate_lock, start_new_thread
from collections.abc import Callable
from contextlib import suppress
from math import inf

from workers.pool.loans import ring


class Keeper:
    """Calls a pool's `turn` when it is time. It does not keep a forgotten pool alive.

    `wakes_at` and `hurry` are guarded by the pool's lock.
    """

    def __init__(self, turn: Callable[[], float | None]) -> None:
        """Make it without a thread.

        Args:
            turn: A method: does what is due and returns in how many seconds it wants to be called
                again; None: nothing is due, and `wakes_at` has been set to inf.
        """
        self._bell = bell = allocate_lock()
        bell.acquire()
        self._turn = weakref.WeakMethod(turn, lambda _: ring(bell))
        self.wakes_at = inf  # when the thread looks next; inf: there is none

    def hurry(self, due: float) -> bool:
        """Have `turn` called at *due* at the latest. True: call `start`, without the lock."""
        start = self.wakes_at == inf
        if due < self.wakes_at:
            self.wakes_at = due
            if not start:
                ring(self._bell)
        return start

    def start(self) -> None:
        """Start the thread that `hurry` asked for."""
        # A bare one: a Thread is 250 KB of Python objects that a forked worker otherwise shares.
        with suppress(RuntimeError):  # the interpreter is going down: nothing will be due any more
            start_new_thread(self._run, ())

    def dismiss(self) -> None:
        """Have `turn` called now: perhaps nothing is due any more."""
        ring(self._bell)

    def _run(self) -> None:
        while True:
            turn = self._turn()
            if turn is None:
                return
            left = turn()
            del turn
            if left is None:
                return
            self._bell.acquire(True, min(max(left, 0.0), TIMEOUT_MAX))
