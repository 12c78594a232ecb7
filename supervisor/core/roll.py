"""A roll: many workers replaced one by one, as a transaction.

Theory of operation. For each slot: its successor is spawned beside the worker that serves, becomes
ready, proves itself for `min_ready_time`, and only then is the old one cancelled; the next slot comes
when that one has gone. So there are never fewer ready workers than before, and never more than `surge`
extra ones in a group.

    waiting --spawn--> STARTING --ready--> PROVING --min_ready_time--> RETIRING --old one gone--> done
                          |                   |
                          +---- it fails -----+--> the roll turns back

Turned back, a roll of a new generation gives up what has not proved itself and replaces what was
replaced already, the same way, by workers of the generation in force: from its own template, so with
the old code. The old workers never stop serving. What fails on the way back is tried again with a
back-off, since there is nothing further back. A roll within one generation (a restart) that fails
just ends: what was replaced runs the same code.

A slot without a worker (a new one, or one that backs off) is filled the same way, and has nobody to
retire. Groups are rolled one after the other; the roll knows nothing of configurations.
"""

from __future__ import annotations

__all__ = ["Failure", "Ground", "Phase", "Progress", "Roll"]

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from supervisor.core.group import Group, Slot
from supervisor.core.worker import NEVER, Worker

# Seconds before a failed step of the way back is tried again, doubling up to the second number.
RETRY, RETRY_MAX = 1.0, 30.0


class Phase(Enum):
    """How far the replacement of one slot has come. The value is what is shown."""

    STARTING = "starting"
    PROVING = "proving"
    RETIRING = "retiring"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a roll has turned back."""

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
        """Cancel a successor that is not wanted any more."""

    def vacated(self, slot: Slot, now: float) -> None:
        """Take note that a slot has no worker, and none is on its way any more."""


@dataclass(slots=True, eq=False)
class _Move:
    """One slot on its way. Invariant: `old` is None, or has not ended."""

    slot: Slot
    successor: Worker
    old: Worker | None
    phase: Phase = Phase.STARTING
    proved_at: float = NEVER


class Roll:
    """The books of one roll. Written by its own methods, called by Fleet only.

    Args:
        kind: "reload", "restart" or "recycle".
        generation: what the successors run.
        base: the generation to go back to; the same one for a roll within a generation.
        slots: what is replaced, in this order.
        ground: the fleet.
    """

    def __init__(
        self, kind: str, generation: int, base: int, slots: Iterable[Slot], ground: Ground
    ) -> None:
        self.kind = kind
        self.generation = generation
        self.base = base
        self.failure: Failure | None = None
        self._ground = ground
        self._slots = list(slots)
        self._waiting = list(self._slots)
        self._moves: dict[Slot, _Move] = {}
        self._replaced: list[Slot] = []
        self._given_up: dict[Worker, Group] = {}  # successors that have not ended yet
        self._total = len(self._waiting)
        self._retry_at = NEVER  # when the way back goes on
        self._retry = RETRY

    # --- seen from outside -------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left to be done, and nobody left to be waited for."""
        return not self._waiting and not self._moves and not self._given_up

    @property
    def is_going_back(self) -> bool:
        """Whether it has failed."""
        return self.failure is not None

    @property
    def due(self) -> float:
        """When `time_passed` is wanted."""
        return min([self._retry_at, *(move.proved_at for move in self._moves.values())])

    def has(self, slot: Slot) -> bool:
        """Whether the slot is on its way, so that nobody else fills it."""
        return slot in self._moves

    def progress(self) -> Progress:
        """Return how far it has come."""
        left = len(self._waiting) + len(self._moves)
        return Progress(
            self.kind,
            self.base if self.is_going_back else self.generation,
            self._total - left,
            self._total,
            self.is_going_back,
            tuple((move.successor.id, move.phase.value) for move in self._moves.values()),
        )

    # --- what happens ------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Start what may start now. Called after every change."""
        if now < self._retry_at < NEVER:
            return
        self._retry_at = NEVER
        first = next(iter(self._moves), None) or next(iter(self._waiting), None)
        if first is None:
            return
        for slot in [slot for slot in self._waiting if slot.group is first.group]:
            if self._has_room(slot):
                self._waiting.remove(slot)
                generation = self.base if self.is_going_back else self.generation
                successor = self._ground.spawn_successor(slot, generation, now)
                self._moves[slot] = _Move(slot, successor, slot.worker)

    def became_ready(self, worker: Worker, slot: Slot, now: float) -> None:
        """Take note that a worker serves; a successor has to prove itself from now on."""
        move = self._moves.get(slot)
        if move is not None and move.successor is worker and move.phase is Phase.STARTING:
            move.phase = Phase.PROVING
            move.proved_at = now + slot.group.rolling_spec.min_ready_time
            self.time_passed(now)

    def time_passed(self, now: float) -> None:
        """Retire the old ones of those that have proved themselves, and go on."""
        for move in list(self._moves.values()):
            if move.proved_at <= now:
                move.phase = Phase.RETIRING
                move.proved_at = NEVER
                self._ground.swap(move.slot, move.successor, now)
                self._finish_if_retired(move)
        self.advance(now)

    def failed(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> None:
        """Take note that a worker is failing; an unproved successor turns the roll back by that."""
        move = self._moves.get(slot)
        if move is not None and move.successor is worker and move.phase is not Phase.RETIRING:
            self._give_up(move, now)
            self._turn_back(move, failure, now)

    def ended(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> bool:
        """Take note of a worker's end; False when that is none of this roll's business."""
        move = self._moves.get(slot)
        if worker in self._given_up:
            del self._given_up[worker]
        elif move is not None and worker is move.old:
            move.old = None
            self._finish_if_retired(move)
        elif move is not None and worker is move.successor and move.phase is not Phase.RETIRING:
            self._end(move, now)
            self._turn_back(move, failure, now)
        else:
            return False
        self.advance(now)
        return True

    def abandon(self, now: float) -> None:
        """Give up what has not proved itself, because another roll takes over."""
        self._waiting.clear()
        for move in list(self._moves.values()):
            if move.phase is not Phase.RETIRING:
                self._give_up(move, now)

    def dismiss(self, worker: Worker, group: Group, now: float) -> None:
        """Cancel a worker that nobody replaces, and wait for its end."""
        self._given_up[worker] = group
        self._ground.give_up(worker, now)

    # --- inside ------------------------------------------------------------------------------------

    def _has_room(self, slot: Slot) -> bool:
        """Tell whether one more may be started in this slot's group."""
        moving = [move for move in self._moves.values() if move.slot.group is slot.group]
        if slot.worker is None:
            # It makes nobody extra; but those who replace somebody go first: they are the proof.
            ahead = [each for each in self._waiting if each.group is slot.group and each.worker]
            return not ahead and not any(move.old for move in moving)
        given_up = sum(group is slot.group for group in self._given_up.values())
        return len(moving) + given_up < slot.group.rolling_spec.surge

    def _finish_if_retired(self, move: _Move) -> None:
        if move.phase is not Phase.RETIRING or move.old is not None:
            return
        del self._moves[move.slot]
        goal = self.base if self.is_going_back else self.generation
        if move.successor.generation == goal:
            self._replaced.append(move.slot)
        else:  # it was overtaken by a turn of the roll
            self._waiting.append(move.slot)

    def _turn_back(self, move: _Move, failure: Failure, now: float) -> None:
        if self.is_going_back:
            self._waiting.insert(0, move.slot)
            self._retry_at = now + self._retry
            self._retry = min(2 * self._retry, RETRY_MAX)
            return
        self.failure = failure
        for other in list(self._moves.values()):
            if other.phase is not Phase.RETIRING:
                self._give_up(other, now)
        self._replaced = []
        self._waiting = [slot for slot in reversed(self._slots) if self._must_go_back(slot)]
        self._total = len(self._waiting) + len(self._moves)
        self.advance(now)

    def _must_go_back(self, slot: Slot) -> bool:
        """Tell whether its worker is of this roll's generation, or of one that this has superseded."""
        if slot in self._moves or slot.worker is None:
            return False
        return slot.worker.generation != self.base

    def _give_up(self, move: _Move, now: float) -> None:
        self._given_up[move.successor] = move.slot.group
        self._end(move, now)
        self._ground.give_up(move.successor, now)

    def _end(self, move: _Move, now: float) -> None:
        """Take a move off the books that has led to nothing."""
        del self._moves[move.slot]
        if move.slot.worker is None:
            self._ground.vacated(move.slot, now)
