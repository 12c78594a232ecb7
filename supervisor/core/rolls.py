"""What is rolled when: reloads, restarts, scaling; one at a time, and what comes of each.

Theory of operation. At most one roll is under way. A reload supersedes whatever is: that gives up
what has not proved itself, and the newest reload begins when it has come to rest; older ones that
have not begun are dropped. Restarts and scaling wait for their turn.

    reload: roll all slots to the new generation -> dismiss whom the new configuration has no place
            for -> commit: the new generation is in force
        fails -> back to the generation in force, under its own rules; what was added is taken away

The generation in force changes at the commit only: until then every ordinary restart, and the way
back, use the old one.
"""

from __future__ import annotations

__all__ = ["FleetGround", "Rolls"]

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, assert_never

from supervisor.core import events as ev
from supervisor.core.group import Group, Slot
from supervisor.core.roll import Failure, Ground, Progress, Roll
from supervisor.core.worker import NEVER, Worker


class FleetGround(Ground, Protocol):
    """What rolls need of the fleet beside what one roll needs."""

    def announce(self, event: str, **fields: Any) -> None:
        """Tell the world."""

    def retire(self, generation: int) -> None:
        """No worker of this generation will be spawned any more."""

    def take_force(self, request: ev.ReloadRequested | ev.SettingsChanged) -> None:
        """Let the terms of a request be in force."""


class Rolls:
    """The queue of rolls and the one under way. Written by its own methods, owned by Fleet.

    Args:
        groups: the fleet's own, by name; groups come and go here.
        ground: the fleet.
        draw: uniform numbers from 0 to 1, for new groups.
    """

    def __init__(
        self, groups: dict[str, Group], ground: FleetGround, draw: Callable[[], float]
    ) -> None:
        self._groups = groups
        self._ground = ground
        self._draw = draw
        self._roll: Roll | None = None
        self._reload: ev.ReloadRequested | None = None  # what the roll under way carries out
        self._target = ""  # of a restart: what was asked for
        self._next: ev.ReloadRequested | None = None
        self._queue: deque[ev.Request] = deque()
        self._is_dismissing = False  # all are replaced, and the superfluous are on their way out
        self.generation = 1  # in force

    # --- seen from outside -------------------------------------------------------------------------

    @property
    def is_reloading(self) -> bool:
        """Whether a reload is under way or about to begin."""
        return self._reload is not None or self._next is not None

    @property
    def due(self) -> float:
        """When `time_passed` is wanted."""
        return NEVER if self._roll is None else self._roll.due

    def progress(self) -> Progress | None:
        """Return how far the roll under way has come."""
        return None if self._roll is None else self._roll.progress()

    # --- requests ----------------------------------------------------------------------------------

    def request_reload(self, request: ev.ReloadRequested, now: float) -> None:
        """Roll to a new generation, now or as soon as what is under way has come to rest."""
        if self._next is not None:
            self._ground.announce("reload.superseded", generation=self._next.generation)
            self._ground.retire(self._next.generation)
        self._next = request
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
        """Take note that a worker's code raised."""
        if self._roll is not None:
            self._roll.failed(worker, slot, failure, now)
            self.settle(now)

    def ended(self, worker: Worker, slot: Slot, failure: Failure, now: float) -> bool:
        """Take note of an end; False when the ordinary rules decide what comes after it."""
        if self._roll is None or not self._roll.ended(worker, slot, failure, now):
            return False
        self.settle(now)
        return True

    def time_passed(self, now: float) -> None:
        """Take the steps that are due."""
        if self._roll is not None:
            self._roll.time_passed(now)
            self.settle(now)

    def settle(self, now: float) -> None:
        """Finish what is over, and begin what is next."""
        while self._roll is not None and self._roll.is_over:
            if not self._finish(self._roll, now):
                return
        while self._roll is None and (self._next is not None or self._queue):
            if self._next is not None:
                request, self._next = self._next, None
                self._begin_reload(request, now)
            else:
                self._begin(self._queue.popleft(), now)
            self.settle(now)

    # --- beginning ---------------------------------------------------------------------------------

    def _begin_reload(self, request: ev.ReloadRequested, now: float) -> None:
        slots: list[Slot] = []
        for spec in request.groups:
            group = self._groups.get(spec.name)
            if group is None:
                group = Group(spec, self._draw, request.generation, is_provisional=True)
                self._groups[spec.name] = group
            group.next_spec = spec
            group.forgive()
            group.grow(spec.count, request.generation, is_provisional=True)
            slots += [slot for slot in group.slots[: spec.count] if not slot.finished]
        self._reload = request
        self._is_dismissing = False
        self._roll = Roll("reload", request.generation, self.generation, slots, self._ground)
        self._ground.announce("reload.started", generation=request.generation, workers=len(slots))
        self._roll.advance(now)

    def _begin(self, request: ev.Request, now: float) -> None:
        match request:
            case ev.RestartRequested():
                slots = self._slots_of(request.target)
                self._target = request.target
                self._roll = Roll(
                    request.reason, self.generation, self.generation, slots, self._ground
                )
                self._roll.advance(now)
            case ev.ScaleRequested():
                self._scale(request, now)
            case _:
                assert_never(request)

    def _slots_of(self, target: str) -> list[Slot]:
        group = self._groups.get(target)
        if group is not None:
            if group.failure:
                group.forgive()
            return [slot for slot in group.slots if not slot.finished or slot.worker is not None]
        return [
            slot
            for group in self._groups.values()
            for slot in group.slots
            if slot.worker is not None and slot.worker.id == target
        ]

    def _scale(self, request: ev.ScaleRequested, now: float) -> None:
        """Fill new slots; whoever is too many is cancelled, the youngest first."""
        group = self._groups.get(request.group)
        if group is None:
            return
        group.spec = replace(group.spec, count=request.count)
        self._ground.announce("group.scaled", group=request.group, count=request.count)
        new = group.grow(request.count, self.generation, is_provisional=False)
        self._target = request.group
        self._roll = Roll("scale", self.generation, self.generation, new, self._ground)
        self._dismiss(self._surplus(group, request.count), self._roll, now)
        self._roll.advance(now)

    # --- finishing ---------------------------------------------------------------------------------

    def _finish(self, roll: Roll, now: float) -> bool:
        """Draw the conclusion of a roll that is over; False when somebody is still to be awaited."""
        request = self._reload
        if request is None:
            self._conclude_in_place(roll)
        elif roll.failure is not None:
            self._go_back(request, roll.failure)
        elif self._next is not None:
            self._reload = None  # its work is the next one's to go on with
            self._ground.announce("reload.superseded", generation=request.generation)
        elif self._is_dismissing or not self._dismiss_superfluous(request, roll, now):
            self._commit(request)
        else:
            return False
        self._roll = None
        return True

    def _conclude_in_place(self, roll: Roll) -> None:
        failure = roll.failure
        if failure is None:
            self._ground.announce(f"{roll.kind}.done", target=self._target)
        else:
            self._ground.announce(
                f"{roll.kind}.failed",
                target=self._target,
                worker=failure.worker,
                error=failure.error,
                traceback=failure.traceback,
            )

    def _dismiss_superfluous(self, request: ev.ReloadRequested, roll: Roll, now: float) -> bool:
        """Cancel those for whom the new configuration has no place; False when there are none."""
        self._is_dismissing = True
        counts = {spec.name: spec.count for spec in request.groups}
        surplus = [
            slot
            for name, group in list(self._groups.items())
            for slot in self._surplus(group, counts.get(name, 0))
        ]
        for name in set(self._groups) - set(counts):
            del self._groups[name]
        return self._dismiss(surplus, roll, now)

    def _commit(self, request: ev.ReloadRequested) -> None:
        before, self.generation = self.generation, request.generation
        for group in self._groups.values():
            group.spec = group.rolling_spec
            group.next_spec = None
            group.is_provisional = False
            for slot in group.slots:
                slot.generation = request.generation
                slot.is_provisional = False
        self._reload = None
        self._ground.take_force(request)
        self._ground.announce("reload.done", generation=request.generation)
        self._ground.retire(before)

    def _go_back(self, request: ev.ReloadRequested, failure: Failure) -> None:
        for name, group in list(self._groups.items()):
            group.next_spec = None
            if group.is_provisional:
                del self._groups[name]
            group.slots = [slot for slot in group.slots if not slot.is_provisional]
            for slot in group.slots:
                slot.generation = self.generation
        self._reload = None
        self._ground.announce(
            "reload.rolled_back",
            generation=self.generation,
            failed_generation=request.generation,
            worker=failure.worker,
            error=failure.error,
            traceback=failure.traceback,
        )
        self._ground.retire(request.generation)

    def _surplus(self, group: Group, count: int) -> list[Slot]:
        """Take the slots above `count` out of a group."""
        surplus = group.slots[count:]
        del group.slots[count:]
        return surplus

    def _dismiss(self, slots: Iterable[Slot], roll: Roll, now: float) -> bool:
        workers = [(slot.worker, slot.group) for slot in slots if slot.worker is not None]
        for worker, group in workers:
            roll.dismiss(worker, group, now)
        return bool(workers)
