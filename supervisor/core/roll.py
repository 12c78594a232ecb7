"""A roll: workers replaced one by one, the replacement first.

Theory of operation. For each slot: its successor is spawned beside the worker that serves, becomes
ready, proves itself for `min_ready_time`, and only then is the old one cancelled; the next slot comes
when that one has gone. So there are never fewer ready workers than before, and never more than `surge`
extra ones in a group.

    waiting --spawn--> STARTING --ready--> PROVING --min_ready_time--> RETIRING --old one gone--> done
                          |                   |
                          +---- it fails -----+--> the roll fails, or tries again where it persists

A successor fails by whatever it does before it has proved itself, other than to start and serve: it
raises, returns, dies, is late, is sent away by somebody else. That is judged when it shows and not
when the process has gone, since nobody is to be retired meanwhile. A roll that has failed starts
nothing more, gives up whoever has not proved itself, and is over when those have gone. What it has
replaced stays replaced: whether that is to go back is for `rolls`, by a roll of its own. That one
persists: what fails is tried again with a back-off, since there is nothing further back.

A slot without a worker (a new one, or one that backs off) is filled the same way, and has nobody to
retire. Where nobody is to follow one that ends well, one that does so there has done what it was for:
that is a step as good as one that serves. What becomes of a slot's own worker is for the ordinary rules also during a roll; only, while
a successor is on its way, nobody else is spawned there. Groups are rolled one after the other.
"""

from __future__ import annotations

__all__ = ["Failure", "Ground", "Phase", "Progress", "Roll"]

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from supervisor.core import policy
from supervisor.core.group import Group, Slot
from supervisor.core.lifecycle import State
from supervisor.core.worker import NEVER, Step, Worker

# Seconds before a step that has failed is tried again by a roll that persists, doubling up to the
# second number.
RETRY, RETRY_MAX = 1.0, 30.0

_PROMISING = frozenset({State.SPAWNING, State.STARTING, State.REGISTERED, State.READY})


class Phase(Enum):
    """How far the replacement of one slot has come. The value is what is shown."""

    STARTING = "starting"
    PROVING = "proving"
    RETIRING = "retiring"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a roll has failed."""

    worker: str
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a roll has come, for `status` and for who waits."""

    kind: str
    generation: int
    replaced: int
    total: int
    is_going_back: bool
    moving: tuple[tuple[str, str], ...]  # worker, phase


class Ground(Protocol):
    """What a roll needs of the fleet."""

    def spawn_successor(self, slot: Slot, generation: int, now: float) -> Worker:
        """Spawn a worker of that generation beside the slot's own."""

    def swap(self, slot: Slot, successor: Worker, now: float) -> None:
        """Make the successor the slot's worker, and cancel the old one where there is one."""

    def give_up(self, worker: Worker, now: float) -> None:
        """Cancel a worker that is not wanted any more."""


@dataclass(slots=True, eq=False)
class _Move:
    """One slot on its way. `old` is set when it retires, and has not ended."""

    slot: Slot
    successor: Worker
    phase: Phase = Phase.STARTING
    proved_at: float = NEVER
    old: Worker | None = None

    @property
    def is_proved(self) -> bool:
        """Whether the successor has become the slot's worker."""
        return self.phase is Phase.RETIRING

    @property
    def makes_one_more(self) -> bool:
        """Whether the group has a worker too many by it."""
        return self.old is not None or self.slot.worker is not None


class Roll:
    """The books of one roll. Written by its own methods, called by Rolls only.

    Args:
        kind: "reload", "restart", "recycle" or "scale".
        generation: what the successors run.
        slots: what is replaced, in this order.
        ground: the fleet.
        persists: whether it goes back to what is in force: then it cannot fail, and a slot that has
            got there by itself is left alone.
        repeats: whether slots that were done when it began are filled once more.
    """

    def __init__(
        self,
        kind: str,
        generation: int,
        slots: Iterable[Slot],
        ground: Ground,
        *,
        persists: bool = False,
        repeats: bool = False,
    ) -> None:
        self.kind = kind
        self.generation = generation
        self.slots = tuple(slots)
        self.persists = persists
        self.failure: Failure | None = None
        self.was_cut_short = False  # abandoned, and somebody has not been replaced by that
        self._ground = ground
        self._repeated = {slot for slot in self.slots if slot.is_done} if repeats else set()
        self._waiting = list(self.slots)
        self._moves: dict[Slot, _Move] = {}
        self._leaving: dict[Worker, Group] = {}  # not wanted any more; they have not ended yet
        self._retry_at = NEVER
        self._retry = RETRY

    # --- seen from outside -------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to be done, and nobody left to be waited for."""
        return not self._waiting and not self._moves and not self._leaving

    @property
    def due(self) -> float:
        """When `time_passed` is wanted."""
        return min([self._retry_at, *(move.proved_at for move in self._moves.values())])

    def fills(self, slot: Slot) -> bool:
        """Whether a successor is on its way there, so that nobody else is to be spawned."""
        move = self._moves.get(slot)
        return move is not None and not move.is_proved

    def progress(self) -> Progress:
        """Return how far it has come."""
        left = len(self._waiting) + len(self._moves)
        return Progress(
            self.kind,
            self.generation,
            len(self.slots) - left,
            len(self.slots),
            self.persists,
            tuple((move.successor.id, move.phase.value) for move in self._moves.values()),
        )

    # --- what happens ------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Start what may start now. Called after every change."""
        self._skip_what_is_not_wanted(now)
        if now < self._retry_at < NEVER:
            return
        self._retry_at = NEVER
        first = next(iter(self._moves), None) or next(iter(self._waiting), None)
        if first is None:
            return
        for slot in [slot for slot in self._waiting if slot.group is first.group]:
            if self._has_room(slot):
                self._waiting.remove(slot)
                successor = self._ground.spawn_successor(slot, self.generation, now)
                self._moves[slot] = _Move(slot, successor)

    def became_ready(self, worker: Worker, slot: Slot, now: float) -> None:
        """Take note that a worker serves; a successor has to prove itself from now on.

        Others that prove themselves are left alone: what has happened to them may not be known yet.
        """
        move = self._moves.get(slot)
        if move is None or move.successor is not worker or move.is_proved:
            return
        move.phase = Phase.PROVING
        move.proved_at = now + slot.group.rolling_spec.min_ready_time
        if move.proved_at <= now:
            self._replace(move, now)
            self.advance(now)

    def time_passed(self, now: float) -> None:
        """Replace whose successor has proved itself, and go on."""
        self.review(now)
        for move in list(self._moves.values()):
            if move.proved_at <= now:
                self._replace(move, now)
        self.advance(now)

    def review(self, now: float) -> None:
        """Find those who will not prove themselves any more, although they have not ended."""
        for move in list(self._moves.values()):
            if not self.fills(move.slot):
                continue
            if move.successor.state is State.SUSPECT:
                move.proved_at = NEVER  # it never will: but first its stacks are to come
            elif move.successor.state is State.ABANDONED or _may_have_done_it(move):
                move.proved_at = NEVER  # how it ends will tell
            elif move.successor.state not in _PROMISING:
                self._successor_failed(move, _why_not(move.successor), now)

    def failed(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> None:
        """Take note that a worker's code has raised."""
        move = self._moves.get(slot)
        if move is not None and move.successor is worker and not move.is_proved:
            self._successor_failed(move, failure, now)

    def ended(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> bool:
        """Take note of an end; False when the ordinary rules decide what comes after it."""
        move = self._moves.get(slot)
        if worker in self._leaving:
            del self._leaving[worker]
        elif move is not None and worker is move.old:
            del self._moves[slot]
        elif move is not None and worker is move.successor and not move.is_proved:
            del self._moves[slot]
            if _may_have_done_it(move) and not worker.failed:
                slot.finished = True
            else:
                self._step_failed(slot, failure, now)
        else:
            return False
        self.advance(now)
        return True

    def fail(self, failure: Failure, now: float) -> None:
        """Start nothing more, and give up what has not proved itself."""
        self.failure = self.failure or failure
        self._let_go(now)

    def abandon(self, now: float) -> None:
        """Make way for another roll: as if it had failed, but nobody is to blame."""
        self.was_cut_short = self._let_go(now)

    def dismiss(self, worker: Worker, group: Group, now: float) -> None:
        """Cancel a worker whom nobody replaces, and wait for its end."""
        self._leaving[worker] = group
        self._ground.give_up(worker, now)

    # --- inside ------------------------------------------------------------------------------------

    def _skip_what_is_not_wanted(self, now: float) -> None:
        self._waiting = [slot for slot in self._waiting if self._is_wanted(slot)]
        for move in list(self._moves.values()):
            if not move.is_proved and not self._is_left_to_do(move.slot):
                self._give_up(move, now)

    def _is_wanted(self, slot: Slot) -> bool:
        if self.persists:  # an empty slot is refilled by the ordinary rules, from what is in force
            return slot.worker is not None and slot.worker.generation != self.generation
        return self._is_left_to_do(slot)

    def _is_left_to_do(self, slot: Slot) -> bool:
        return not slot.is_done or slot in self._repeated

    def _has_room(self, slot: Slot) -> bool:
        """Tell whether one more may be started in this slot's group."""
        extra = sum(m.makes_one_more for m in self._moves.values() if m.slot.group is slot.group)
        if slot.worker is None:
            # It makes nobody extra; but those who replace somebody go first: they are the proof.
            return not extra and not any(
                other.worker for other in self._waiting if other.group is slot.group
            )
        extra += sum(group is slot.group for group in self._leaving.values())
        return extra < slot.group.rolling_spec.surge

    def _replace(self, move: _Move, now: float) -> None:
        move.phase = Phase.RETIRING
        move.proved_at = NEVER
        move.old = move.slot.worker
        self._retry = RETRY
        self._ground.swap(move.slot, move.successor, now)
        if move.old is None:
            del self._moves[move.slot]

    def _successor_failed(self, move: _Move, failure: Failure, now: float) -> None:
        """Draw the conclusion of a successor that has failed, and has not ended yet."""
        self._give_up(move, now)
        self._step_failed(move.slot, failure, now)

    def _step_failed(self, slot: Slot, failure: Failure, now: float) -> None:
        if self.persists:
            self._waiting.append(slot)
            self._retry_at = now + self._retry
            self._retry = min(2 * self._retry, RETRY_MAX)
        else:
            self.fail(failure, now)

    def _let_go(self, now: float) -> bool:
        """Forget who waits, give up who has not proved itself; True when there was anybody."""
        unproved = [move for move in self._moves.values() if not move.is_proved]
        had_any = bool(self._waiting or unproved)
        self._waiting.clear()
        self._retry_at = NEVER
        for move in unproved:
            self._give_up(move, now)
        return had_any

    def _give_up(self, move: _Move, now: float) -> None:
        del self._moves[move.slot]
        self.dismiss(move.successor, move.slot.group, now)


def _may_have_done_it(move: _Move) -> bool:
    """Tell whether a successor that ends by itself has done what it was for, if it ends well."""
    worker, rules = move.successor, move.slot.group.rolling_spec.policy
    return (
        move.slot.worker is None
        and not policy.wants_restart(rules.restart, failed=False)
        and worker.state in (State.DRAINED, State.EXITED)
        and Step.CANCELLED not in worker.history
        and worker.pid is not None
        and not worker.fault
    )


def _why_not(worker: Worker) -> Failure:
    """Say why a worker that has not ended will not prove itself any more."""
    if worker.fault:
        why = f"it {worker.fault}"
    elif worker.state is State.DRAINED:
        why = "it returned before it had proved itself"
    else:
        why = "it was sent away by somebody else before it had proved itself"
    return Failure(worker.id, why, "")
