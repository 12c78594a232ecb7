"""How many connections this worker's pools may have: what the supervisor's budget allows them.

Theory of operation. A pool under a budget never has more than its allowance; that is its `max_open`,
kept by its own resize. An allowance that goes down is answered once it has come true. A pool that is
short says how many it wants, and says so again when that becomes notably less. Nobody speaks as
long as nobody is short, and when the supervisor is gone, everybody keeps what he has.

The link's thread carries the messages and never waits: it sets what is allowed, and a thread of the
moment brings the pool there, since closing connections can take time.
"""

from __future__ import annotations

__all__ = ["Leases"]

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from supervisor.protocol import Allowance, PoolLimits, PoolSettings, Usage
from workers.context import Context
from workers.pool.shell import Shell

# Seconds between two looks at a pool that is short: the most often that it speaks up.
PAUSE = 0.05
# Seconds between looks at one that was, and is not any more, to see what it really needs.
LULL = 0.25
# Seconds over which its highest need counts.
WINDOW = 0.5
# Seconds between looks at a pool that owes an answer: until borrowed connections have come back.
OWED = 0.01
OWED_AT_MOST = 0.2  # however long that takes
# Seconds that a server has, after a close, to let go of the connection: libpq does not wait for it,
# and what is given back here is opened by somebody else at once.
LET_GO = 0.1

Call = Callable[[], object]
_P = TypeVar("_P", bound=Shell)


@dataclass(slots=True, eq=False)
class _Held:
    """One pool under a budget. Written by the link's thread but for what is noted."""

    name: str
    max_open: int  # as configured
    max_idle: int
    allowance: int
    serial: int  # of the last tell
    done: int  # of the last tell that has come true
    owes: bool = False
    said: int = 0  # what it has last said that it wants
    highest: int = 0  # need within the present window
    window_ends: float = 0.0
    pool: Shell | None = None  # by the main thread, under the lock
    # Held, by any thread and for any other, as long as a look is due.
    watch: threading.Lock = field(default_factory=threading.Lock)
    # One thread at a time brings the pool to its allowance, whatever that is by then.
    lock: threading.Lock = field(default_factory=threading.Lock)
    may_open: Context = field(default_factory=Context.background().with_cancel)


class Leases:
    """The allowances of one worker.

    Args:
        settings: its pools; those without a budget are nobody's business here.
        send: sends a message, from any thread, without blocking.
        call_at: runs something on the link's thread at a monotonic time. Any thread.
        resize: changes settings of a pool, and returns when they have come true. Any thread.
    """

    def __init__(
        self,
        settings: dict[str, PoolSettings],
        send: Callable[[Usage], object],
        call_at: Callable[[float, Call], object],
        resize: Callable[..., object],
    ) -> None:
        self._send = send
        self._call_at = call_at
        self._resize = resize
        self._held = {
            name: _Held(name, s.max_open, s.max_idle, s.allowance, s.serial, s.serial)
            for name, s in settings.items()
            if s.allowance is not None
        }

    # --- the main thread --------------------------------------------------------------------------

    def open(self, name: str, make: Callable[[int, int], _P], ctx: Context) -> _P:
        """Open a pool under its allowance; wait for the first lease where there is none yet.

        Args:
            name: the pool's, which has a budget.
            make: makes it, with this `max_open` and `max_idle`.
            ctx: ends the waiting.

        Raises:
            Cancelled, DeadlineExceeded: the context ended first.
        """
        while True:
            pool, may_open = self._try_to_open(self._held[name], make, ctx)
            if pool is not None:
                return pool
            may_open.wait()
            ctx.check()

    async def open_async(self, name: str, make: Callable[[int, int], _P], ctx: Context) -> _P:
        """Open a pool as `open` does, without blocking the loop: it has others to look after."""
        while True:
            pool, may_open = self._try_to_open(self._held[name], make, ctx)
            if pool is not None:
                return pool
            await may_open
            ctx.check()

    def _try_to_open(
        self, held: _Held, make: Callable[[int, int], _P], ctx: Context
    ) -> tuple[_P | None, Context]:
        """Open it if it may be; else return what ends when that may have changed."""
        with held.lock:
            if not held.allowance:
                held.may_open = ctx.with_cancel()
            if not held.allowance:  # whoever changes it does so before he looks for whom to wake
                return None, held.may_open
            pool = make(held.allowance, min(held.max_idle, held.allowance))
            pool.on_crowded = lambda: self._crowded(held)
            held.pool = pool
            return pool, held.may_open

    # --- any thread -------------------------------------------------------------------------------

    def resize(self, name: str, **settings: Any) -> bool:
        """Change settings of a pool but its size, which stays its allowance.

        Returns:
            False: it has no budget, and nothing was done.
        """
        held = self._held.get(name)
        if held is None:
            return False
        with held.lock:
            if held.pool is not None:
                most = held.allowance
                idle = min(held.max_idle, most)
                self._resize(held.pool, max_open=most, max_idle=idle, **settings)
        self._watch(held, time.monotonic())  # who waits may be allowed more than before
        return True

    def _crowded(self, held: _Held) -> None:
        """Somebody has to wait for a connection because there are not more."""
        if held.allowance < held.max_open:
            self._watch(held, time.monotonic())

    def _watch(self, held: _Held, when: float) -> None:
        """Begin to look after a pool, unless that is under way."""
        if held.watch.acquire(blocking=False):
            self._call_at(when, lambda: self._look(held))

    # --- the link's thread ------------------------------------------------------------------------

    def configured(self, limits: Mapping[str, PoolLimits]) -> None:
        """Have other sizes in the configuration. An allowance that is too high is called back."""
        for name, limit in limits.items():
            held = self._held.get(name)
            if held is not None:
                held.max_open, held.max_idle = limit.max_open, limit.max_idle

    def told(self, message: Allowance) -> None:
        """Have another allowance from now on."""
        held = self._held.get(message.pool)
        if held is None or message.serial <= held.serial:
            return
        allowance = message.allowance
        if message.unused_only and held.pool is not None:
            stats = held.pool.stats()
            allowance = max(allowance, min(stats.open - stats.idle, held.allowance))
        held.owes = held.owes or message.allowance < held.allowance
        held.allowance = allowance
        held.serial = message.serial
        if not held.owes:
            held.done = held.serial
        held.may_open.cancel()
        thread = threading.Thread(
            target=self._come_true, args=(held,), name="ackvisor-leases", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had: the link waits this once
            self._come_true(held)

    def _come_true(self, held: _Held) -> None:
        """Bring the pool to its allowance: a thread of its own."""
        before = 0
        with held.lock:
            # In this order: the allowance is that of this serial, or of a later one.
            serial, allowance = held.serial, held.allowance
            if held.pool is not None:
                before = held.pool.stats().open
                idle = min(held.max_idle, allowance)
                self._resize(held.pool, max_open=allowance, max_idle=idle)
        is_settled = before <= allowance
        self._call_at(time.monotonic(), lambda: self._answer(held, serial, is_settled, OWED))

    def _answer(self, held: _Held, serial: int, is_settled: bool, pause: float) -> None:
        """Answer when there are no more than the allowance; else look again soon."""
        if not held.owes or serial != held.serial:
            return
        now = time.monotonic()
        stats = None if held.pool is None else held.pool.stats()
        if stats is not None and stats.open > held.allowance:
            longer = min(2 * pause, OWED_AT_MOST)
            self._call_at(now + pause, lambda: self._answer(held, serial, False, longer))
        elif not is_settled:
            self._call_at(now + LET_GO, lambda: self._answer(held, serial, True, OWED))
        else:
            held.owes = False
            held.done = serial
            need = 0 if stats is None else min(stats.in_use + stats.waiting, held.max_open)
            self._say(held, need)
            self._watch(held, now + PAUSE)

    def _look(self, held: _Held) -> None:
        """Say what is wanted, if that has changed much; look again as long as it matters."""
        if held.pool is None:
            held.watch.release()
            return
        now = time.monotonic()
        stats = held.pool.stats()
        need = min(stats.in_use + stats.waiting, held.max_open)
        is_short = stats.waiting > 0 and need > held.allowance
        held.highest = max(held.highest, need)
        if is_short and need > held.said:
            self._say(held, need)
        elif now >= held.window_ends:
            if held.said and held.highest <= held.said * 3 // 4:
                self._say(held, held.highest)
            else:
                self._begin_window(held)
        if is_short or held.said > 1:
            self._call_at(now + (PAUSE if is_short else LULL), lambda: self._look(held))
            return
        held.watch.release()
        if held.pool.stats().waiting:  # perhaps since before the release, and nobody knows
            self._watch(held, now + PAUSE)

    def _say(self, held: _Held, wanted: int) -> None:
        held.said = wanted
        self._begin_window(held)
        self._send(Usage(held.name, held.done, held.allowance, wanted))

    def _begin_window(self, held: _Held) -> None:
        held.highest = 0
        held.window_ends = time.monotonic() + WINDOW
