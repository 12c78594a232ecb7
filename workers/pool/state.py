"""The pool's decisions: who gets which connection, what is opened and what is closed, and when.

It must not do anything: no lock, no clock, no driver, no thread. The time is passed in, the shell
serialises the calls with its one lock and carries out the actions that come back.

Theory of operation
-------------------
**A slot is not a connection.** A slot is taken before the dial and is free again only when the
physical close has finished, so the server never sees more than `max_open` of us. There is one
place that says whether one more may be taken (`_has_room`) and one that gives it back (`_free`).

    DIALLING -> IDLE <-> LENT -> RETURNING -> IDLE, or lent on        every state but DIALLING
                IDLE -> CHECKING -> LENT or IDLE                      may go to CLOSING -> GONE

**First come, first served, by direct hand-off.** What comes back goes to the first waiter, not to
the idle stack, so an idle connection means that nobody waits. Idle connections are lent last in,
first out: those that are not needed stay at the bottom and reach their idle time-out.

**`take` needs no lock.** It pops from the stack, which Python does atomically, and who has popped a
slot owns it. Everything else runs under the shell's lock and must live with a slot that vanishes
from the stack under its hands (`_pop`, `_pull`). Doing without the lock there saves a fifth of what
an acquire and its return take together.

**A second look.** `take` and `give` handle only what is plain. `check_at` is the time until which
an idle slot may be lent as it is; `look` on a lent one says that its return is not plain (it has a
leak threshold of its own, it is too old or suspect, the pool is shrinking or closing).

**Generations.** A connection found broken makes all others of its time suspect: each must pass a
check before it is lent again. One that does not even answer condemns them (`clear`).

**Who dials waits for nobody.** A dial belongs to the pool and survives its asker. After a failure
one probe at a time goes out, after a fiftieth of the time the server has been away: a short
absence is noticed within milliseconds, a long one costs the server next to nothing.

**Time.** `due` is when `tick` must be called at the latest. Every method that brings a deadline
lowers it, `tick` works it out anew. A silent `take` is covered because `tick` comes back within
the leak threshold as long as a slot could be taken silently.
"""

from __future__ import annotations

__all__ = [
    "Action",
    "Check",
    "Close",
    "Cut",
    "Dial",
    "Failure",
    "Overdue",
    "PoolState",
    "Reason",
    "Request",
    "Slot",
    "SlotState",
    "Wake",
]

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Any, TypeAlias

from workers.pool.settings import LIFETIME_JITTER, Settings
from workers.pool.stats import BOUNDS, Histogram, PoolStats

# How long a round trip that tries a connection, or a roll-back on its way back, may take before
# the connection is cut. A healthy server needs milliseconds; a deaf one costs a caller this much.
CHECK_TIMEOUT = 1.0
RESET_TIMEOUT = 3.0

# The pause after a failed dial, as a part of how long the server has been away, and its limits.
RETRY_PART = 1 / 50
RETRY_FLOOR = 0.01
RETRY_CEILING = 1.0
RETRY_CEILING_UNASKED = 10.0  # only `min` wants the connection

FIRST_BOUND = BOUNDS[0]


class SlotState(Enum):
    """What a slot is doing."""

    DIALLING = "dialling"
    IDLE = "idle"
    CHECKING = "checking"
    LENT = "lent"
    RETURNING = "returning"
    CLOSING = "closing"
    GONE = "gone"


class Reason(Enum):
    """Why a connection is closed."""

    BROKEN = "broken"
    CLEARED = "cleared"
    IDLE_TIME = "idle time"
    LIFETIME = "lifetime"
    MAX_IDLE = "enough are idle"
    SHRUNK = "max_open was lowered"
    POOL_CLOSED = "the pool was closed"


class Failure(Enum):
    """Why a request is answered without a connection."""

    CLOSED = "closed"
    DEADLOCK = "deadlock"
    DIAL = "dial"


_IDLE = SlotState.IDLE
_LENT = SlotState.LENT
_CHECKING = SlotState.CHECKING


class Slot:
    """One of at most `max_open` places for a connection. Written by PoolState only."""

    __slots__ = (
        "born_at",
        "bound",  # lent by a `with` block, which the borrower's own thread will leave
        "check_at",  # until then it may be lent without a second look
        "conn",
        "cut_at",  # when the round trip in progress has lasted too long; inf: none is
        "expires_at",  # drawn once, at birth
        "generation",
        "idle_since",
        "leak_after",  # this loan's own threshold in seconds; None: the pool's
        "leaked",  # this loan has been reported
        "lent_at",
        "loan",  # the shell's own: what a loan with a context needs
        "look",  # its return needs a second look
        "number",
        "owner",  # who has it: a thread's ident (a task, in the asyncio shell)
        "stack",  # where it was borrowed
        "state",
        "tried_at",  # when it was last known to answer: for keepalive
    )

    def __init__(self, number: int, generation: int, now: float) -> None:
        self.number = number
        self.generation = generation
        self.state = SlotState.DIALLING
        self.conn: Any = None
        self.born_at = self.idle_since = self.lent_at = self.tried_at = now
        self.expires_at = self.cut_at = inf
        self.check_at = -inf
        self.leak_after: float | None = None
        self.leaked = self.look = self.bound = False
        self.owner: object = None
        self.stack: tuple[Any, ...] = ()
        self.loan: Any = None

    def __repr__(self) -> str:
        return f"<slot {self.number} {self.state.value}>"


class Request:
    """Somebody who wants a connection. Answered exactly once: `slot` or `failure` is set then.

    An answer may be a slot in state CHECKING: the asker has to try it and report by `checked`.
    """

    __slots__ = (
        "bound",
        "cause",  # the driver's error, where `failure` is DIAL
        "deadline",
        "done",
        "failure",
        "holds",  # (slot, lent_at): loans that surely stay out as long as the asker waits
        "leak_after",
        "owner",
        "signal",  # the shell's: what wakes the asker
        "since",
        "slot",
        "stack",
        "ticket",  # the order of arrival; kept when a bad connection sends it back to the queue
        "waited",  # it counts as one that had to wait
    )

    def __init__(
        self,
        owner: object,
        stack: tuple[Any, ...],
        deadline: float,
        *,
        signal: Any = None,
        leak_after: float | None = None,
        bound: bool = False,
    ) -> None:
        self.owner = owner
        self.stack = stack
        self.deadline = deadline
        self.signal = signal
        self.leak_after = leak_after
        self.bound = bound
        self.holds: tuple[tuple[Slot, float], ...] = ()
        self.ticket = 0
        self.since = 0.0
        self.slot: Slot | None = None
        self.failure: Failure | None = None
        self.cause: BaseException | None = None
        self.done = self.waited = False

    def __repr__(self) -> str:
        return f"<request {self.ticket}{' answered' if self.done else ''}>"


@dataclass(frozen=True, slots=True)
class Wake:
    """Wake the asker: its request has been answered."""

    request: Request


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a connection; report by `dialled` or `dial_failed`."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Check:
    """Try an idle connection; report by `checked` without a request."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection physically; report by `closed`, however that went."""

    slot: Slot
    reason: Reason


@dataclass(frozen=True, slots=True)
class Cut:
    """The round trip on this connection takes too long: make its thread's call fail."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Overdue:
    """A loan is longer than its leak threshold: tell somebody how it was then."""

    slot: Slot
    lent_at: float
    owner: object
    stack: tuple[Any, ...]


Action: TypeAlias = Wake | Dial | Check | Close | Cut | Overdue


class _Look:
    """What `give` answers where the return is not plain."""

    __slots__ = ()


LOOK = _Look()


class PoolState:
    """All that a pool has decided so far. Every method but `take` needs the shell's lock."""

    __slots__ = (
        "_closing_slots",
        "_create_seconds",
        "_creates",
        "_dialling",
        "_draw",
        "_failed_at",
        "_failing_since",
        "_fast_uses",
        "_glance_after",
        "_last_number",
        "_last_ticket",
        "_plain_horizon",
        "_tight",
        "_trust",
        "_uses",
        "_waited",
        "_waits",
        "by_conn",
        "closed_count",
        "closes",
        "closing",
        "due",
        "floor",
        "generation",
        "idle",
        "last_dial_error",
        "leaks",
        "max_idle",
        "settings",
        "slots",
        "timeouts",
        "use_seconds",
        "wait_count",
        "wait_seconds",
        "waiting",
    )

    def __init__(self, settings: Settings) -> None:
        self.slots: set[Slot] = set()
        self.by_conn: dict[int, Slot] = {}  # id(connection): a driver's own need not be hashable
        self.idle: list[Slot] = []  # a stack: the last one is lent first
        self.waiting: deque[Request] = deque()  # by ticket
        self.closing = False
        self.generation = 0  # connections of an older one are suspect
        self.floor = 0  # connections of one below this are condemned
        self.due = inf
        self.last_dial_error: BaseException | None = None  # since the last good dial
        self.closes = dict.fromkeys(Reason, 0)
        self.closed_count = 0  # physical closes that have finished
        self.timeouts = self.leaks = self.wait_count = 0
        self.use_seconds = self.wait_seconds = 0.0
        self._last_number = self._last_ticket = 0
        self._dialling = self._closing_slots = 0
        self._failing_since = self._failed_at = inf  # inf: the last dial went well
        self._draw = 0.5
        self._glance_after = inf
        self._fast_uses = 0  # uses within the first bound: the hot path's own counter
        self._uses = [0] * (len(BOUNDS) + 1)
        self._waits = [0] * (len(BOUNDS) + 1)  # of those who had to wait and were served
        self._waited = 0.0
        self._creates = [0] * (len(BOUNDS) + 1)
        self._create_seconds = 0.0
        self._apply(settings)

    def _apply(self, settings: Settings) -> None:
        self.settings = settings
        self.max_idle = settings.max_open if settings.max_idle is None else settings.max_idle
        self._plain_horizon = self._horizon(None)
        self._tight = self.max_idle < settings.max_open
        # No longer than the leak threshold, so that a pool in rest can be left alone: after that
        # every take comes through `ask`, which sees to it that somebody watches the loan.
        self._trust = min(
            settings.validate_after_idle, settings.leak_threshold or inf, self._glance_after
        )

    def glance_after(self, seconds: float) -> None:
        """Have a connection that was idle this long looked at, though not yet validated."""
        self._glance_after = seconds
        self._apply(self.settings)

    # -- the hot path

    def take(self, now: float, owner: object, stack: tuple[Any, ...]) -> Slot | None:
        """Lend the idle connection that was used last, if there is one. Needs no lock.

        The slot that comes back is the caller's. Where it is not LENT it needs `second_look`.
        """
        try:
            slot = self.idle.pop()
        except IndexError:
            return None
        slot.lent_at = now
        slot.owner = owner
        slot.stack = stack
        slot.state = _LENT if now < slot.check_at else _CHECKING
        return slot

    def give(self, slot: Slot, now: float) -> Request | _Look | None:
        """Take a clean connection back, if that is plain.

        Returns:
            None: it is idle now. A request: it has been answered with this slot; wake it. LOOK:
            nothing has been done; go on with `begin_return`.
        """
        if slot.look or slot.state is not _LENT:
            return LOOK
        idle = self.idle
        if not self.waiting:
            if self._tight and len(idle) >= self.max_idle:
                return LOOK
            held = now - slot.lent_at
            self.use_seconds += held
            if held <= FIRST_BOUND:
                self._fast_uses += 1
            else:
                self._uses[bisect_left(BOUNDS, held)] += 1
            slot.idle_since = now
            slot.check_at = now + self._trust
            slot.state = _IDLE
            idle.append(slot)
            return None
        self._count_use(now - slot.lent_at)
        return self._serve(slot, now)

    # -- asking

    def ask(self, request: Request, now: float) -> list[Action]:
        """Answer the request from the idle stack, or queue it and see to a connection for it."""
        actions: list[Action] = []
        if self.closing:
            self._fail(request, Failure.CLOSED)
            return actions
        if not request.ticket:
            self._last_ticket += 1
            request.ticket = self._last_ticket
            request.since = now
        while (slot := self._pop()) is not None:
            reason = self._expired(slot, now)
            if reason is None:
                self._lend(slot, request, now)
                return actions
            actions.append(self._retire(slot, reason))
        self._queue(request)
        actions += self._dials(now)
        if len(self.waiting) > self._dialling and not request.waited:
            request.waited = True  # not only for a dial of its own
            self.wait_count += 1
        return actions

    def keeps(
        self, request: Request, holds: Iterable[tuple[Slot, float]], now: float
    ) -> list[Action]:
        """Note which loans will surely not end while this request waits, as `Request.holds`."""
        request.holds = tuple(holds)
        if request.done or not request.holds:
            return []
        return self._break_deadlock(now)

    def second_look(self, slot: Slot, request: Request, now: float) -> list[Action]:
        """Answer a request whose `take` got a slot that must not be lent as it is."""
        self._last_ticket += 1
        request.ticket = self._last_ticket
        request.since = now
        if self.closing:
            self._fail(request, Failure.CLOSED)
            return [self._retire(slot, Reason.POOL_CLOSED)]
        reason = self._expired(slot, now)
        if reason is None:
            self._lend(slot, request, now)
            return []
        return [self._retire(slot, reason), *self.ask(request, now)]

    def withdraw(self, request: Request, now: float, *, timed_out: bool = False) -> bool:
        """Give up waiting. False: too late, the request has been answered and the answer stands."""
        if request.done:
            return False
        request.done = True
        if not self.place(request):
            return True  # it never came to asking
        self.waiting.remove(request)
        self._count_wait(request, now)
        self.timeouts += timed_out
        return True

    def place(self, request: Request) -> int:
        """Return the request's place in the queue, 1 for the first; 0 when it does not wait."""
        for place, other in enumerate(self.waiting, 1):
            if other is request:
                return place
        return 0

    def must_answer(self, slot: Slot, now: float) -> bool:
        """Whether a connection in state CHECKING has to make a round trip; else a look will do."""
        idle = now - slot.idle_since
        return slot.generation != self.generation or idle >= self.settings.validate_after_idle

    def guard(self, slot: Slot, now: float, deadline: float) -> None:
        """Have the round trip that begins now cut off when it takes too long."""
        slot.cut_at = min(now + CHECK_TIMEOUT, max(deadline, now))
        self._by(slot.cut_at)

    def checked(
        self, slot: Slot, request: Request | None, now: float, *, sound: bool, deaf: bool = False
    ) -> list[Action]:
        """Go on after a connection in state CHECKING has been tried.

        Args:
            slot: What was tried.
            request: Whose answer it was; None for a keepalive.
            now: The time.
            sound: It works.
            deaf: It did not answer in time: then the others of its time will not either.
        """
        slot.cut_at = inf
        if not sound:
            actions: list[Action] = [self._retire(slot, Reason.BROKEN)]
            self.distrust(slot)
            if deaf:
                actions += self.clear(slot.generation)
            if request is not None:
                request.slot = None
                request.done = False
                actions += self.ask(request, now)
            return actions
        slot.generation = self.generation
        slot.tried_at = now
        if self.closing:
            if request is not None:
                request.slot = None  # it is answered by the failure alone
                self._fail(request, Failure.CLOSED)
            return [self._retire(slot, Reason.POOL_CLOSED)]
        if request is None:
            return self._settle(slot, now, fresh=False)
        slot.lent_at = now
        slot.state = _LENT
        self._by(now + self._horizon(slot.leak_after))  # a tick meanwhile has not seen a loan
        return []

    # -- giving back

    def begin_return(self, slot: Slot, now: float, *, guarded: bool = False) -> bool:
        """Begin a return that is not plain. False: the slot is not lent.

        *guarded*: it makes a round trip, so its connection is to be cut when that takes too long.
        """
        if slot.state is not _LENT:
            return False
        slot.state = SlotState.RETURNING
        if guarded:
            slot.cut_at = now + RESET_TIMEOUT
            self._by(slot.cut_at)
        self._count_use(now - slot.lent_at)
        return True

    def returned(self, slot: Slot, now: float, *, sound: bool) -> list[Action]:
        """End a return that is not plain: the connection is clean, or is not to be used again."""
        slot.cut_at = inf
        slot.leak_after = slot.loan = None
        slot.look = slot.leaked = slot.bound = False
        slot.stack = ()
        if not sound:
            retired = self._retire(slot, Reason.BROKEN)
            self.distrust(slot)
            return [retired]
        if self.closing:
            return [self._retire(slot, Reason.POOL_CLOSED)]
        if len(self.slots) - self._closing_slots > self.settings.max_open:
            return [self._retire(slot, Reason.SHRUNK)]
        slot.tried_at = now
        return self._settle(slot, now, fresh=True)

    # -- dialling

    def dialled(self, slot: Slot, conn: Any, now: float, draw: float) -> list[Action]:
        """A dial went well. *draw*, of [0, 1), decides this connection's lifetime for good."""
        self._dialling -= 1
        self._failing_since = self._failed_at = inf
        self.last_dial_error = None
        took = now - slot.born_at
        self._creates[bisect_left(BOUNDS, took)] += 1
        self._create_seconds += took
        slot.conn = conn
        self.by_conn[id(conn)] = slot
        slot.born_at = slot.tried_at = slot.idle_since = now
        if self.settings.max_lifetime:
            slot.expires_at = now + self.settings.max_lifetime * (1 - LIFETIME_JITTER * draw)
            self._by(slot.expires_at)
        if self.closing:
            return [self._retire(slot, Reason.POOL_CLOSED)]
        if len(self.slots) - self._closing_slots > self.settings.max_open:
            return [self._retire(slot, Reason.SHRUNK)]
        # A dial that began before a suspicion has ended after it: it is as new as can be.
        slot.generation = self.generation
        return [*self._settle(slot, now, fresh=True), *self._dials(now)]

    def dial_failed(
        self, slot: Slot, error: BaseException, now: float, draw: float, *, final: bool
    ) -> list[Action]:
        """A dial failed. *final*: waiting changes nothing, so the first in the queue gets it."""
        self._dialling -= 1
        self.last_dial_error = error
        if self._failing_since == inf:
            self._failing_since = slot.born_at
        self._failed_at = now
        self._draw = draw
        actions: list[Action] = []
        if final and self.waiting:
            request = self.waiting.popleft()
            self._count_wait(request, now)
            request.cause = error
            self._fail(request, Failure.DIAL)
            actions.append(Wake(request))
        return [*actions, *self._free(slot, now)]

    def spare(self, now: float, timeout: float) -> Slot | None:
        """Take a connection that nobody has, to cancel with; None where every slot is taken.

        An idle one comes in state CHECKING: report by `checked`. A free slot comes DIALLING: report
        as of any dial; what has been opened then joins the pool. Nobody in the queue is overtaken:
        while somebody waits nothing is idle, and a dial for him is never held up by this one.
        """
        slot = self._pop()
        if slot is not None:
            slot.state = _CHECKING
            slot.cut_at = now + timeout
            self._by(slot.cut_at)
            return slot
        if not self._has_room() or self._failing_since != inf:
            return None
        return self._begin_dial(now)

    # -- closing connections

    def closed(self, slot: Slot, now: float) -> list[Action]:
        """A physical close has ended: only now is the slot free."""
        self._closing_slots -= 1
        self.closed_count += 1
        return self._free(slot, now)

    def distrust(self, slot: Slot) -> None:
        """One connection was broken: every other of its generation has to prove itself."""
        if slot.generation != self.generation:
            return  # its generation is suspect already, and the next one is not to blame
        self.generation += 1
        self._look_at_all()

    def clear(self, generation: int | None = None) -> list[Action]:
        """Condemn every connection up to *generation*, by default all: idle now, lent on return."""
        if generation is None or generation == self.generation:
            generation = self.generation
            self.generation += 1
        self.floor = max(self.floor, generation + 1)
        self._look_at_all()
        return [
            self._retire(slot, Reason.CLEARED)
            for slot in self.idle.copy()
            if slot.generation < self.floor and self._pull(slot)
        ]

    def resize(self, settings: Settings, now: float) -> list[Action]:
        """Apply new settings: the idle surplus is closed now, the lent one as it comes back."""
        self._apply(settings)
        self._look_at_all()
        actions: list[Action] = []
        for slot in self.idle.copy():  # the oldest first
            spare = len(self.slots) - self._closing_slots > settings.max_open
            if (spare or len(self.idle) > self.max_idle) and self._pull(slot):
                actions.append(self._retire(slot, Reason.SHRUNK if spare else Reason.MAX_IDLE))
        self._by(now)
        return [*actions, *self._dials(now), *self._break_deadlock(now)]

    def close(self) -> list[Action]:
        """Lend nothing from now on: whoever waits fails, what is idle is closed."""
        if self.closing:
            return []
        self.closing = True
        actions: list[Action] = []
        while self.waiting:
            request = self.waiting.popleft()
            self._fail(request, Failure.CLOSED)
            actions.append(Wake(request))
        while (slot := self._pop()) is not None:
            actions.append(self._retire(slot, Reason.POOL_CLOSED))
        self._look_at_all()
        return actions

    def given_up(self, slot: Slot) -> None:
        """A close has reported this loan as leaked: once is enough."""
        slot.leaked = True

    @property
    def exhausted(self) -> bool:
        """Whether nothing but a return can serve the next one who asks."""
        return not self._has_room() and not self.idle and not self._dialling

    @property
    def crowded(self) -> bool:
        """Whether more connections are asked for than there may be."""
        wanted = len(self.slots) - self._dialling + len(self.waiting)
        return wanted > self.settings.max_open

    @property
    def outstanding(self) -> int:
        """Slots that a close has to wait for: all but the dials, whose ends nobody awaits."""
        return len(self.slots) - self._dialling

    # -- time

    def tick(self, now: float) -> list[Action]:
        """Do what is due, and work out when the next call is."""
        actions: list[Action] = []
        self.due = inf
        if not self.closing:
            for slot in self.idle.copy():
                actions += self._tick_idle(slot, now)
        for slot in self.slots:
            if slot.cut_at <= now:
                slot.cut_at = inf
                actions.append(Cut(slot))
            elif slot.cut_at < inf:
                self._by(slot.cut_at)
            if slot.state is _LENT:
                actions += self._tick_lent(slot, now)
        actions += self._dials(now)
        return actions

    def _tick_idle(self, slot: Slot, now: float) -> list[Action]:
        settings = self.settings
        reason = self._expired(slot, now)
        leaves_at = inf  # the minimum may rest
        if settings.max_idle_time and self._standing > settings.min:
            leaves_at = slot.idle_since + settings.max_idle_time
        if reason is None and now >= leaves_at:
            reason = Reason.IDLE_TIME
        if reason is not None:
            return [self._retire(slot, reason)] if self._pull(slot) else []
        if settings.keepalive:
            if now >= slot.tried_at + settings.keepalive:
                if self._pull(slot):
                    slot.state = _CHECKING
                    self.guard(slot, now, inf)
                    return [Check(slot)]
                return []
            self._by(slot.tried_at + settings.keepalive)
        self._by(slot.expires_at)
        self._by(leaves_at)
        if now < slot.check_at:  # it may be lent and given back silently
            self._by(now + self._plain_horizon)
        return []

    def _tick_lent(self, slot: Slot, now: float) -> list[Action]:
        threshold = self._threshold(slot.leak_after)
        if now >= slot.expires_at:
            slot.look = True  # its return will see that it is too old
        if not slot.look:  # it may become idle silently
            self._by(slot.expires_at)
            self._by(now + min(self.settings.max_idle_time or inf, self.settings.keepalive or inf))
        if threshold and not slot.leaked:
            if now < slot.lent_at + threshold:
                self._by(slot.lent_at + threshold)
                return []
            slot.leaked = slot.look = True
            self.leaks += 1
            return [Overdue(slot, slot.lent_at, slot.owner, slot.stack)]
        return []

    def _threshold(self, leak_after: float | None) -> float:
        return self.settings.leak_threshold if leak_after is None else leak_after

    def _horizon(self, leak_after: float | None) -> float:
        """Return in how many seconds a loan that begins now must have been looked at."""
        return min(
            self._threshold(leak_after) or inf,
            self.settings.max_idle_time or inf,
            self.settings.keepalive or inf,
        )

    def _by(self, at: float) -> None:
        if at < self.due:  # noqa: PLR1730 (min() takes twice as long)
            self.due = at

    # -- figures

    def stats(self) -> PoolStats:
        """Return a snapshot. Without a lock it may be of two moments, and no figure below zero."""
        idle = len(self.idle)
        return PoolStats(
            max_open=self.settings.max_open,
            open=len(self.slots),
            in_use=max(0, len(self.slots) - idle - self._dialling - self._closing_slots),
            idle=idle,
            waiting=len(self.waiting),
            wait_count=self.wait_count,
            wait_seconds=self.wait_seconds,
            max_idle_closed=self.closes[Reason.MAX_IDLE],
            max_idle_time_closed=self.closes[Reason.IDLE_TIME],
            max_lifetime_closed=self.closes[Reason.LIFETIME],
            broken_closed=self.closes[Reason.BROKEN],
            timeouts=self.timeouts,
            leaks=self.leaks,
        )

    def histograms(self) -> dict[str, Histogram]:
        """Return how long callers waited, how long they kept, and how long dials took."""
        uses = self._uses.copy()
        uses[0] += self._fast_uses
        waits = self._waits.copy()
        # Who did not wait is not counted on the hot path: it is everybody else who got one.
        lent = sum(1 for slot in self.slots.copy() if slot.state is _LENT)
        waits[0] += max(0, sum(uses) + lent - sum(waits))
        return {
            "wait": Histogram(BOUNDS, tuple(waits), self._waited),
            "use": Histogram(BOUNDS, tuple(uses), self.use_seconds),
            "create": Histogram(BOUNDS, tuple(self._creates), self._create_seconds),
        }

    # -- the steps

    def _has_room(self) -> bool:
        """Decide whether one more slot may be taken. The only place that does."""
        return len(self.slots) < self.settings.max_open

    def _may_open(self, now: float) -> bool:
        """Whether a dial may begin now."""
        if self.closing or not self._has_room():
            return False
        if self._failing_since == inf:
            return self._dialling < self.settings.max_connecting
        if self._dialling:
            return False  # one probe at a time
        retry_at = self._retry_at()
        if now >= retry_at:
            return True
        self._by(retry_at)
        return False

    def _retry_at(self) -> float:
        away = (self._failed_at - self._failing_since) * RETRY_PART
        ceiling = RETRY_CEILING if self.waiting else RETRY_CEILING_UNASKED
        return self._failed_at + min(ceiling, max(RETRY_FLOOR, away)) * (0.5 + self._draw)

    def _free(self, slot: Slot, now: float) -> list[Action]:
        """Give a slot back. The only place that does."""
        slot.state = SlotState.GONE
        self.slots.discard(slot)
        return self._dials(now)

    @property
    def _standing(self) -> int:
        """Slots with a connection that stays, as far as is known."""
        return len(self.slots) - self._closing_slots

    def _dials(self, now: float) -> list[Action]:
        """Start a dial for each waiter that none is under way for, and for the minimum."""
        actions: list[Action] = []
        if not self._has_room():
            return actions
        wanted = max(
            len(self.waiting) - self._dialling,
            self.settings.min - self._standing,
        )
        while wanted > 0 and self._may_open(now):
            wanted -= 1
            actions.append(Dial(self._begin_dial(now)))
        return actions

    def _begin_dial(self, now: float) -> Slot:
        self._last_number += 1
        slot = Slot(self._last_number, self.generation, now)
        self.slots.add(slot)
        self._dialling += 1
        return slot

    def _pop(self) -> Slot | None:
        try:
            return self.idle.pop()
        except IndexError:
            return None

    def _pull(self, slot: Slot) -> bool:
        """Take this slot out of the stack. False: a `take` was faster."""
        try:
            self.idle.remove(slot)
        except ValueError:
            return False
        return True

    def _expired(self, slot: Slot, now: float) -> Reason | None:
        if slot.generation < self.floor:
            return Reason.CLEARED
        return Reason.LIFETIME if now >= slot.expires_at else None

    def _settle(self, slot: Slot, now: float, *, fresh: bool) -> list[Action]:
        """Put a sound connection to use: the first waiter, else the stack, else closed.

        *fresh*: it was just used. An old one goes to the bottom of the stack.
        """
        if slot.generation < self.floor:
            return [self._retire(slot, Reason.CLEARED)]
        if now >= slot.expires_at:
            return [self._retire(slot, Reason.LIFETIME)]
        if self.waiting:
            return [Wake(self._serve(slot, now))]
        if len(self.idle) >= self.max_idle:
            return [self._retire(slot, Reason.MAX_IDLE)]
        slot.state = _IDLE
        if fresh:
            slot.idle_since = now
        slot.check_at = now + self._trust if slot.generation == self.generation else -inf
        self._by(slot.expires_at)
        self._by(now + self._plain_horizon)
        if self.settings.keepalive:
            self._by(slot.tried_at + self.settings.keepalive)
        self.idle.insert(len(self.idle) if fresh else 0, slot)
        return []

    def _serve(self, slot: Slot, now: float) -> Request:
        """Answer the first waiter with this slot."""
        request = self.waiting.popleft()
        self._count_wait(request, now)
        waited = now - request.since
        self._waits[bisect_left(BOUNDS, waited)] += 1
        self._waited += waited
        slot.idle_since = now  # it was in use up to now
        slot.check_at = inf if slot.generation == self.generation else -inf
        self._lend(slot, request, now)
        return request

    def _lend(self, slot: Slot, request: Request, now: float) -> None:
        slot.lent_at = now
        slot.owner = request.owner
        slot.stack = request.stack
        slot.bound = request.bound
        slot.leak_after = request.leak_after
        slot.look = slot.look or request.leak_after is not None
        request.slot = slot
        request.done = True
        horizon = self._plain_horizon
        if request.leak_after is not None:
            horizon = self._horizon(request.leak_after)
        self._by(now + horizon)
        slot.state = _LENT if now < slot.check_at else _CHECKING

    def _queue(self, request: Request) -> None:
        """Put a request where its ticket belongs: who was sent back did not lose its place."""
        if not self.waiting or self.waiting[-1].ticket < request.ticket:
            self.waiting.append(request)
            return
        index = 0
        while self.waiting[index].ticket < request.ticket:
            index += 1
        self.waiting.insert(index, request)

    def _break_deadlock(self, now: float) -> list[Action]:
        """Fail the youngest of those who wait for each other, where nobody else could help."""
        if self._has_room() or not self.waiting:
            return []
        held = {
            slot
            for request in self.waiting
            for slot, lent_at in request.holds
            if slot.lent_at == lent_at
        }
        if not held or any(slot.state is not _LENT or slot not in held for slot in self.slots):
            return []
        request = next(request for request in reversed(self.waiting) if request.holds)
        self.waiting.remove(request)
        self._count_wait(request, now)
        self._fail(request, Failure.DEADLOCK)
        return [Wake(request)]

    def _fail(self, request: Request, failure: Failure) -> None:
        request.failure = failure
        request.done = True

    def _retire(self, slot: Slot, reason: Reason) -> Close:
        slot.state = SlotState.CLOSING
        slot.cut_at = inf
        self._closing_slots += 1
        self.by_conn.pop(id(slot.conn), None)
        self.closes[reason] += 1
        return Close(slot, reason)

    def _look_at_all(self) -> None:
        """Let no connection pass the hot path before somebody has looked at it."""
        for slot in self.slots:
            slot.look = True
            slot.check_at = -inf

    def _count_use(self, held: float) -> None:
        self.use_seconds += held
        self._uses[bisect_left(BOUNDS, held)] += 1

    def _count_wait(self, request: Request, now: float) -> None:
        if request.waited:
            self.wait_seconds += now - request.since
