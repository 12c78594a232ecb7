"""What is rolled when: reloads, restarts, scaling; one at a time, and what comes of each.

Theory of operation. At most one roll is under way. A reload supersedes whatever is: that gives up
what has not proved itself, and the newest reload begins when it has come to rest; older ones that
have not begun are dropped. Restarts and scaling wait for their turn, and a scaling that waits is
dropped for a reload that is asked for later: the file wins.

    PREPARING: the new generation's groups with `before` run to their end; one fails  -->  reload.rejected
       |
    ROLLING  -- all slots have been replaced -->  COMMITTED: the new generation is in force, whoever
       |                                          it has no place for is dismissed  -->  reload.done
       |  a replacement fails, or the new code uses up the restarts of its group
       v
    GOING_BACK: what was added is dismissed, what was replaced is replaced again, by workers of the
                generation in force and under its rules  -->  reload.rolled_back

A reload can be superseded until its commit, on its way back too: the only way out when the generation
in force does not come up any more. Then the slots hold workers of several generations, and each goes
on: the next reload takes all of them along, and its way back leads to the generation in force.

A start prepares in the same way. Until that is done nobody else is spawned; a reload can supersede it,
and then has to start the fleet. When it fails, the supervisor ends.

A slot is restarted by the ordinary rules from the generation that it has got to; on the way back, from
the one in force. A generation is retired when it is neither in force nor about to be, no slot would be
restarted from it, and its last worker has ended.

A group that has failed for good gets another chance when the first worker of another generation is
spawned in it, and when its restart is asked for. A restart fills places again that have done what they
were for; when it fails they are as they were: done.
"""

from __future__ import annotations

__all__ = ["FleetGround", "Rolls"]

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from enum import Enum, auto
from typing import Any, Protocol, assert_never

from supervisor.core import events as ev
from supervisor.core.before import Before
from supervisor.core.group import Group, Slot
from supervisor.core.roll import Failure, Ground, Progress, Roll
from supervisor.core.slowstart import Gates
from supervisor.core.spec import GroupSpec
from supervisor.core.worker import NEVER, Worker

_SUPERSEDED = "superseded by a reload"


class FleetGround(Ground, Protocol):
    """What rolls need of the fleet beside what one roll needs."""

    def announce(self, event: str, **fields: Any) -> None:
        """Tell the world."""

    def retire(self, generation: int) -> None:
        """No worker of this generation will be spawned any more."""

    def take_force(self, request: ev.ReloadRequested | ev.SettingsChanged) -> None:
        """Let the terms of a request be in force."""

    def start_failed(self, failure: Failure, now: float) -> None:
        """The start goes no further."""

    def has_workers_of(self, generation: int) -> bool:
        """Tell whether a worker of this generation has not ended."""


class _Stage(Enum):
    """How far a reload has come."""

    PREPARING = auto()
    ROLLING = auto()
    GOING_BACK = auto()
    COMMITTED = auto()


class Rolls:
    """The queue of rolls and the one under way. Written by its own methods, owned by Fleet.

    Args:
        groups: the fleet's own, by name; groups come and go here.
        ground: the fleet.
        gates: the fleet's, for new groups.
    """

    def __init__(self, groups: dict[str, Group], ground: FleetGround, gates: Gates) -> None:
        self._groups = groups
        self._ground = ground
        self._gates = gates
        self._roll: Roll | None = None
        self._reload: ev.ReloadRequested | None = None  # what the roll under way carries out
        self._stage = _Stage.ROLLING  # of that reload
        self._failure: Failure | None = None  # why it goes back
        self._is_rejected = False  # it goes back before it has replaced anybody
        self._target = ""  # of a restart or a scaling: what was asked for, and by which request
        self._number = 0
        self._has_begun = True  # the fleet has been started; False while that is prepared
        self._is_prepared = True  # what runs before the generation in force has been done
        self._next: ev.ReloadRequested | None = None
        self._queue: deque[ev.Request] = deque()
        self._generations = {1}  # those that have not been retired
        self.generation = 1  # in force

    # --- seen from outside -------------------------------------------------------------------------

    @property
    def is_reloading(self) -> bool:
        """Whether a reload is under way or about to begin."""
        return self._reload is not None or self._next is not None

    @property
    def is_recycling(self) -> bool:
        """Whether workers are being replaced for their age or size."""
        return self._roll is not None and self._roll.kind == ev.RECYCLE

    @property
    def due(self) -> float:
        """When `time_passed` is wanted."""
        return NEVER if self._roll is None else self._roll.due

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is under way and nothing waits."""
        return self._roll is None and self._next is None and not self._queue

    def fills(self, slot: Slot) -> bool:
        """Whether a successor is on its way there, so that nobody else is to be spawned."""
        return self._roll is not None and self._roll.fills(slot)

    def progress(self) -> Progress | None:
        """Return how far the roll under way has come."""
        return None if self._roll is None else self._roll.progress()

    # --- the start ---------------------------------------------------------------------------------

    def prepare_start(self, now: float) -> bool:
        """Run what comes before everything else; False when there is nothing of the kind."""
        slots = [
            slot for group in self._groups.values() if group.spec.before for slot in group.slots
        ]
        if not slots:
            return False
        self._has_begun = self._is_prepared = False
        for group in self._groups.values():
            group.is_waiting = not group.spec.before
        self._roll = Before("start", self.generation, slots, self._ground)
        self._roll.advance(now)
        return True

    def _prepared(self, roll: Before, now: float) -> None:
        """Draw the conclusion of what had to come before the others."""
        request = self._reload
        if request is None:
            if roll.failure is not None:
                self._ground.start_failed(roll.failure, now)
            elif self._next is None:
                self._is_prepared = True
                self._begin_to_serve()
                self._refill(now)
        elif roll.failure is None and self._next is None:
            self._begin_rolling(request, now)
        elif roll.failure is None or self._next is not None:
            self._failure = roll.failure
            self._take_back()
            self._conclude_reload("reload.superseded", request.generation)
        elif self._is_prepared:
            self._is_rejected = True
            self._go_back(roll.failure, now)  # from what a reload that it has superseded has begun
        else:
            self._failure = roll.failure
            self._conclude_rejected(request)
            self._ground.start_failed(roll.failure, now)

    def _begin_to_serve(self) -> None:
        self._has_begun = True
        for group in self._groups.values():
            group.is_waiting = False

    # --- requests ----------------------------------------------------------------------------------

    def request_reload(self, request: ev.ReloadRequested, now: float) -> None:
        """Roll to a new generation, now or as soon as what is under way has come to rest."""
        self._generations.add(request.generation)
        if self._next is not None:
            self._ground.announce("reload.superseded", generation=self._next.generation)
        self._next = request
        self.drop_overtaken_scaling()
        if self._roll is not None:
            self._roll.abandon(now)
        self.settle(now)

    def request(self, request: ev.Request, now: float) -> None:
        """Restart or scale, when nothing else is under way."""
        self._queue.append(request)
        self.settle(now)

    def drop_all(self) -> None:
        """Forget everything: the fleet stops."""
        self._roll = self._reload = self._next = None
        self._queue.clear()

    # --- what happens ------------------------------------------------------------------------------

    def became_ready(self, worker: Worker, slot: Slot, now: float) -> None:
        """Take note that a worker serves."""
        if self._roll is not None:
            self._roll.became_ready(worker, slot, now)
            self.settle(now)

    def failed(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> None:
        """Take note that a worker's code has raised."""
        if self._roll is not None:
            self._roll.failed(worker, slot, failure, now)
            self.settle(now)

    def review(self, now: float) -> None:
        """Take note that a worker is about to end that was not told to."""
        if self._roll is not None:
            self._roll.review(now)
            self.settle(now)

    def ended(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> bool:
        """Take note of an end; False when the ordinary rules decide what comes after it."""
        if self._roll is None or not self._roll.ended(worker, slot, failure, now):
            return False
        self.settle(now)
        return True

    def is_to_blame(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> bool:
        """Take the end by which a group has failed for good; False when that is to stand.

        It is not held against a group when the generation in force is not to blame: where that is the
        one that is being rolled to, it has shown that it does not hold, and the reload goes back.
        """
        if self._reload is None or worker.generation == self.generation:
            return False
        slot.group.forgive()
        if not slot.is_provisional:
            slot.generation = self.generation
        is_new = worker.generation == self._reload.generation
        if is_new and self._stage is _Stage.ROLLING and self._roll is not None:
            self._roll.fail(failure, now)
        slot.group.refill(now)
        return True

    def go_on(self, now: float) -> None:
        """Take another look, after the ordinary rules have decided about a slot."""
        if self._roll is not None:
            self._roll.advance(now)
            self.settle(now)

    def time_passed(self, now: float) -> None:
        """Take the steps that are due."""
        if self._roll is not None:
            self._roll.time_passed(now)
            self.settle(now)

    def settle(self, now: float) -> None:
        """Finish what is over, and begin what is next."""
        while True:
            if self._roll is not None:
                if not self._roll.is_over:
                    break
                self._finish(self._roll, now)
            elif self._next is not None:
                request, self._next = self._next, None
                self._begin_reload(request, now)
            elif self._queue:
                self._begin(self._queue.popleft(), now)
            else:
                break
        self._retire_what_is_unused()

    # --- reloads -----------------------------------------------------------------------------------

    def _begin_reload(self, request: ev.ReloadRequested, now: float) -> None:
        self._reload = request
        self._failure = None
        slots = [s for spec in request.groups if spec.before for s in self._join(spec, request)]
        if not slots:
            self._begin_rolling(request, now)
            return
        self._stage = _Stage.PREPARING
        self._roll = Before("reload", request.generation, slots, self._ground)
        self._roll.advance(now)

    def _join(self, spec: GroupSpec, request: ev.ReloadRequested) -> list[Slot]:
        """Let a group be part of a reload; return its slots."""
        group = self._groups.get(spec.name) or self._add(spec, request.generation)
        group.next_spec = spec
        group.grow(spec.count, request.generation, is_provisional=True)
        return group.slots[: spec.count]

    def _begin_rolling(self, request: ev.ReloadRequested, now: float) -> None:
        self._begin_to_serve()
        slots = [s for spec in request.groups if not spec.before for s in self._join(spec, request)]
        slots = [slot for slot in slots if not slot.is_done]
        self._stage = _Stage.ROLLING
        self._roll = Roll("reload", request.generation, slots, self._ground)
        reason = {"reason": request.reason} if request.reason else {}
        self._ground.announce(
            "reload.started", generation=request.generation, workers=len(slots), **reason
        )
        self._roll.advance(now)

    def _add(self, spec: GroupSpec, generation: int) -> Group:
        group = Group(spec, self._gates, generation, is_provisional=True)
        self._groups[spec.name] = group
        return group

    def _finish(self, roll: Roll, now: float) -> None:
        """Draw the conclusion of a roll that is over."""
        self._roll = None
        request = self._reload
        if isinstance(roll, Before):
            self._prepared(roll, now)
        elif request is None:
            self._conclude_in_place(roll, now)
        elif self._stage is _Stage.COMMITTED:
            self._conclude_reload("reload.done", request.generation)
        elif self._next is not None:
            self._failure = self._failure or roll.failure
            self._conclude_reload("reload.superseded", request.generation)
        elif self._stage is _Stage.GOING_BACK and self._is_rejected:
            self._conclude_rejected(request)
        elif self._stage is _Stage.GOING_BACK:
            self._conclude_reload(
                "reload.rolled_back", self.generation, failed_generation=request.generation
            )
        elif roll.failure is not None and self._is_prepared:
            self._go_back(roll.failure, now)
        elif roll.failure is not None:
            self._give_up_start(request, roll.failure, now)
        else:
            self._commit(request, roll, now)

    def _give_up_start(self, request: ev.ReloadRequested, failure: Failure, now: float) -> None:
        """End: a reload has superseded the start, so nobody can go back to what was before."""
        self._failure = failure
        self._conclude_reload(
            "reload.rolled_back", self.generation, failed_generation=request.generation
        )
        self._ground.start_failed(failure, now)

    def _commit(self, request: ev.ReloadRequested, roll: Roll, now: float) -> None:
        """Let the new generation be in force, and dismiss whom it has no place for."""
        self._stage = _Stage.COMMITTED
        self._is_prepared = True
        self._roll = roll  # it waits for those, too
        self._dismiss(self._take_away_surplus(request), roll, now)
        self.generation = request.generation
        self._ground.take_force(request)
        for group in self._groups.values():
            group.commit(request.generation)
            group.refill(now)

    def _take_away_surplus(self, request: ev.ReloadRequested) -> list[Slot]:
        """Take groups and slots off the books that a new configuration has no place for."""
        counts = {spec.name: spec.count for spec in request.groups}
        surplus = [
            slot
            for name, group in self._groups.items()
            for slot in group.shrink(counts.get(name, 0))
        ]
        for name in set(self._groups) - set(counts):
            del self._groups[name]
        return surplus

    def _go_back(self, failure: Failure, now: float) -> None:
        """Take away what was added, and replace by the generation in force what was replaced."""
        self._stage = _Stage.GOING_BACK
        self._failure = failure
        added = self._take_back()
        strayed = [slot for slot in self._slots() if slot.has_strayed]
        self._roll = Roll("reload", self.generation, strayed, self._ground, persists=True)
        self._dismiss(added, self._roll, now)
        self._refill(now)
        self._roll.advance(now)

    def _take_back(self) -> list[Slot]:
        """Take away what a reload has added; return the slots among that."""
        added = [slot for group in self._groups.values() for slot in group.revert(self.generation)]
        for name in [name for name, group in self._groups.items() if group.is_provisional]:
            del self._groups[name]
        return added

    def _conclude_rejected(self, request: ev.ReloadRequested) -> None:
        assert self._failure is not None
        reason = f"{self._failure.worker}: {self._failure.error}"
        self._conclude_reload("reload.rejected", request.generation, reason=reason)

    def _conclude_reload(self, event: str, generation: int, **fields: Any) -> None:
        failure = self._failure
        self._reload = self._failure = None
        self._is_rejected = False
        if failure is not None:
            fields |= {
                "worker": failure.worker,
                "error": failure.error,
                "traceback": failure.traceback,
            }
        self._ground.announce(event, generation=generation, **fields)

    def _retire_what_is_unused(self) -> None:
        if len(self._generations) == 1:
            return  # as nearly always
        wanted = {slot.generation for slot in self._slots()} | {self.generation}
        wanted |= {request.generation for request in (self._reload, self._next) if request}
        for generation in sorted(self._generations - wanted):
            if not self._ground.has_workers_of(generation):
                self._generations.remove(generation)
                self._ground.retire(generation)

    # --- within one generation ---------------------------------------------------------------------

    def _begin(self, request: ev.Request, now: float) -> None:
        match request:
            case ev.RestartRequested():
                self._restart(request, now)
            case ev.ScaleRequested():
                self._scale(request, now)
            case _:
                assert_never(request)

    def _restart(self, request: ev.RestartRequested, now: float) -> None:
        """Replace who is still there: whoever has gone meanwhile has been replaced already."""
        slots = self._slots_of(request.target)
        if slots or request.reason != ev.RECYCLE:
            self._target, self._number = request.target, request.number
            self._roll = Roll(request.reason, self.generation, slots, self._ground, repeats=True)
            self._roll.advance(now)

    def _slots_of(self, target: str) -> list[Slot]:
        group = self._groups.get(target)
        if group is None:
            return [slot for slot in self._slots() if slot.worker and slot.worker.id == target]
        if group.failure:
            group.forgive()
        return list(group.slots)

    def _scale(self, request: ev.ScaleRequested, now: float) -> None:
        """Fill new slots; whoever is too many is cancelled, the last slots first."""
        group = self._groups.get(request.group)
        if group is None:
            gone = "there is no group of this name any more"
            self._announce_failed("scale", request.group, request.number, error=gone)
            return
        self._target, self._number = request.group, request.number
        group.spec = replace(group.spec, count=request.count)
        self._ground.announce("group.scaled", group=request.group, count=request.count)
        new = group.grow(request.count, self.generation, is_provisional=False)
        self._roll = Roll("scale", self.generation, new, self._ground)
        self._dismiss(group.shrink(request.count), self._roll, now)
        self._roll.advance(now)

    def drop_overtaken_scaling(self) -> None:
        """Forget the scaling that waits: a file that is read later wins."""
        for request in [r for r in self._queue if isinstance(r, ev.ScaleRequested)]:
            self._queue.remove(request)
            self._announce_failed("scale", request.group, request.number, error=_SUPERSEDED)

    def _conclude_in_place(self, roll: Roll, now: float) -> None:
        failure = roll.failure
        if failure is not None:
            self._announce_failed(
                roll.kind,
                self._target,
                self._number,
                error=failure.error,
                worker=failure.worker,
                traceback=failure.traceback,
            )
        elif roll.was_cut_short:
            self._announce_failed(roll.kind, self._target, self._number, error=_SUPERSEDED)
        else:
            self._ground.announce(
                f"{roll.kind}.done", target=self._target, **_numbered(self._number)
            )
        for slot in roll.slots:
            slot.group.put_off_recycling(slot, now)
        self._refill(now)

    def _announce_failed(
        self,
        kind: str,
        target: str,
        number: int,
        *,
        error: str,
        worker: str = "",
        traceback: str = "",
    ) -> None:
        self._ground.announce(
            f"{kind}.failed",
            target=target,
            **_numbered(number),
            worker=worker,
            error=error,
            traceback=traceback,
        )

    # --- small things ------------------------------------------------------------------------------

    def _slots(self) -> Iterator[Slot]:
        for group in self._groups.values():
            yield from group.slots

    def _refill(self, now: float) -> None:
        for group in self._groups.values():
            group.refill(now)

    def _dismiss(self, slots: Iterable[Slot], roll: Roll, now: float) -> None:
        for slot in slots:
            if slot.worker is not None:
                roll.dismiss(slot.worker, slot.group, now)


def _numbered(number: int) -> dict[str, int]:
    """Return the field that names a request; nobody has asked for a recycling."""
    return {"request": number} if number else {}
