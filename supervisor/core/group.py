"""One group of equal workers: its slots, who is replaced and when, and whether it has failed.

A worker that ends uninvited leaves its slot in one of three ways: backing off before its successor,
finished (it ended as it should, and its restart type asks for no other), or as the last straw: the
group has failed for good. A group has failed when it had more failures than its window allows, or
when a worker failed that is never restarted: nobody will make that good. The workers that a failed
group still has go on; none of them is replaced any more.
"""

from __future__ import annotations

__all__ = ["AGE_JITTER", "SPAWN_RETRY", "Group", "GroupSpec", "Slot"]

from collections.abc import Callable
from dataclasses import dataclass

from supervisor.core import policy
from supervisor.core.lifecycle import State
from supervisor.core.spec import GroupSpec
from supervisor.core.worker import Step, Worker

# Seconds before a spawn that the system refused is tried again, at least: a configured back-off of
# zero is meant for workers that have run, and would spin here.
SPAWN_RETRY = 0.1
# Share of `max_age` by which a worker is replaced earlier: those that were born together are not to
# be replaced together.
AGE_JITTER = 0.1


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one worker at a time; what it remembers outlives the worker."""

    group: Group
    generation: int  # of the workers that are restarted here
    is_provisional: bool = False  # made by a roll that may yet turn back
    worker: Worker | None = None
    restart_due: float | None = None  # when its next worker is to be spawned
    finished: bool = False  # its last worker ended as it should, and wants no successor
    attempt: int = 0  # restarts since the last quiet window: the exponent of the back-off
    births: int = 0
    lost: str = ""  # how its last worker ended uninvited, in the words of metrics
    recycle_due: float | None = None  # when its worker is old enough to be replaced

    @property
    def is_done(self) -> bool:
        """Whether it wants no worker any more, by the rules that a roll under way brings, too."""
        rules = self.group.rolling_spec.policy
        return self.finished and not policy.wants_restart(rules.restart, failed=False)

    @property
    def has_strayed(self) -> bool:
        """Whether its worker is of another generation than the next one there would be."""
        return self.worker is not None and self.worker.generation != self.generation

    @property
    def restarts(self) -> int:
        """How many workers were born here after the first."""
        return max(0, self.births - 1)

    @property
    def is_ready(self) -> bool:
        """Whether its worker serves now."""
        return self.worker is not None and self.worker.state is State.READY


class Group:
    """The books of one group. Written by its own methods, its slots' workers by Fleet.

    Args:
        spec: what it is to be.
        draw: uniform numbers from 0 to 1, for jitter.
        generation: of its first workers.
        is_provisional: made by a roll that may yet turn back.
    """

    def __init__(
        self,
        spec: GroupSpec,
        draw: Callable[[], float],
        generation: int,
        *,
        is_provisional: bool = False,
    ) -> None:
        self.spec = spec
        self.next_spec: GroupSpec | None = None  # what a roll under way will make of it
        self.is_provisional = is_provisional
        self.slots = [Slot(self, generation, is_provisional) for _ in range(spec.count)]
        self.failure = ""  # why it has failed for good; empty: it has not
        self.was_ready = False  # it has been complete once; written by note_readiness
        self._draw = draw
        self._intensity = policy.Intensity()

    @property
    def rolling_spec(self) -> GroupSpec:
        """What holds for successors: the new rules where a roll is under way."""
        return self.next_spec or self.spec

    @property
    def ready(self) -> int:
        """How many of its workers serve now."""
        return sum(slot.is_ready for slot in self.slots)

    @property
    def state(self) -> str:
        """The word that `status` has for this group."""
        if self.failure:
            return "failed"
        if self.ready >= self.spec.count:
            return "ready"
        return "degraded" if self.was_ready else "starting"

    def note_readiness(self) -> None:
        """Remember when every slot serves, or has done what it was for."""
        self.was_ready = self.was_ready or all(
            slot.is_ready or slot.finished for slot in self.slots
        )

    def schedule_recycling(self, slot: Slot) -> None:
        """Settle when the slot's worker will be old enough to be replaced, if ever."""
        slot.recycle_due = None
        if self.spec.max_age and slot.worker is not None and slot.is_ready:
            age = self.spec.max_age * (1.0 - AGE_JITTER * self._draw())
            slot.recycle_due = slot.worker.history[Step.READY] + age

    def put_off_recycling(self, slot: Slot, now: float) -> None:
        """See to it that a worker which could not be replaced for its age is tried again."""
        if self.spec.max_age and slot.is_ready and slot.recycle_due is None:
            slot.recycle_due = now + self.spec.max_age * AGE_JITTER

    def forgive(self) -> None:
        """Give a group that has failed another chance."""
        self.failure = ""
        self._intensity = policy.Intensity()

    def refill(self, now: float) -> None:
        """Have a worker spawned where there is none and nobody has plans for one."""
        for slot in self.slots:
            wants = not (slot.finished or slot.is_provisional or self.failure)
            if wants and slot.worker is None and slot.restart_due is None:
                slot.restart_due = now

    def take(self, spec: GroupSpec) -> None:
        """Let other rules be in force; its size is for `grow` and `shrink`."""
        before, self.spec = self.spec, spec
        if spec.max_age != before.max_age:
            for slot in self.slots:
                self.schedule_recycling(slot)

    def commit(self, generation: int) -> None:
        """Let be in force what a roll has made of it."""
        self.take(self.rolling_spec)
        self.next_spec = None
        self.is_provisional = False
        for slot in self.slots:
            slot.generation = generation
            slot.is_provisional = False
        if self.failure:
            self.forgive()

    def revert(self, generation: int) -> list[Slot]:
        """Forget what a roll was to make of it; take away and return the slots that it has added."""
        self.next_spec = None
        added = [slot for slot in self.slots if slot.is_provisional]
        self.slots = [slot for slot in self.slots if not slot.is_provisional]
        for slot in self.slots:
            slot.generation = generation
        return added

    def grow(self, count: int, generation: int, *, is_provisional: bool) -> list[Slot]:
        """Add slots up to `count`; return the new ones."""
        new = [Slot(self, generation, is_provisional) for _ in range(count - len(self.slots))]
        self.slots += new
        return new

    def shrink(self, count: int) -> list[Slot]:
        """Take away the slots above `count`; return them."""
        surplus = self.slots[count:]
        del self.slots[count:]
        return surplus

    def worker_ended(self, slot: Slot, worker: Worker, now: float) -> bool:
        """Decide what becomes of a slot whose worker ended uninvited.

        Returns:
            True when the group has failed by this.
        """
        rules = self.spec.policy
        if self.failure:
            return False
        if worker.pid is None and not worker.failed:  # nothing has run: that is nobody's failure
            self._back_off(slot, worker, now, at_least=SPAWN_RETRY)
        elif worker.failed and rules.restart is policy.Restart.NEVER:
            self._fail(f"{worker.id} failed, and is not to be restarted")
        elif worker.failed and self._intensity.count_failure(rules, now):
            self._fail(
                f"{len(self._intensity.times)} failures within {rules.window:g} s, "
                f"at most {rules.max_restarts} are allowed; the last was {worker.id}"
            )
        elif policy.wants_restart(rules.restart, failed=worker.failed):
            self._back_off(slot, worker, now)
        else:
            slot.finished = True
        return bool(self.failure)

    def _back_off(self, slot: Slot, worker: Worker, now: float, at_least: float = 0.0) -> None:
        rules = self.spec.policy
        # Quiet is what has served for a whole window; to wait for a restart, or to start, is not.
        if now - worker.history.get(Step.READY, now) >= rules.window:
            slot.attempt = 0
        slot.restart_due = now + max(
            at_least, policy.backoff_delay(rules, slot.attempt, self._draw)
        )
        slot.attempt += 1

    def _fail(self, why: str) -> None:
        self.failure = why
        for slot in self.slots:
            slot.restart_due = None
