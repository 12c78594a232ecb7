"""One group of equal workers: its slots, who is replaced and when, and whether it has failed.

A worker that ends uninvited leaves its slot in one of four ways: backing off before its successor,
waiting behind a gate with others in the same trouble, finished (it ended as it should, and its restart
type asks for no other), or as the last straw: the group has failed. Which of them is decided by why it
ended (`causes`): what a dependency is to blame for never counts as a failure of the group, nor does the
end of a worker with a job in flight, where its group answers for jobs: that is counted against the job.

A group has failed when it had more failures than its window allows, or when a worker failed that is
never restarted: nobody will make that good. The workers that a failed group still has go on; none of
them is replaced, but one worker at a time is tried for the whole group (`breaker`).
"""

from __future__ import annotations

__all__ = ["AGE_JITTER", "SPAWN_RETRY", "Group", "GroupSpec", "Slot"]

from collections import Counter
from dataclasses import dataclass, field

from supervisor.core import policy
from supervisor.core.breaker import Breaker
from supervisor.core.causes import Cause, Outage, first_backoff
from supervisor.core.lifecycle import State
from supervisor.core.slowstart import Gate, Gates
from supervisor.core.spec import GroupSpec
from supervisor.core.worker import NEVER, Step, Worker

# Seconds before a spawn that the system refused is tried again, at least: a configured back-off of
# zero is meant for workers that have run, and would spin here.
SPAWN_RETRY = 0.1
# Share of `max_age` by which a worker is replaced earlier: those that were born together are not to
# be replaced together.
AGE_JITTER = 0.1
# Share of `max_rss` by which a worker is replaced earlier: those that do the same work grow alike.
RSS_JITTER = 0.1
# So often at most the back-off of a place doubles whose workers die of their jobs.
SPARED_DOUBLINGS = 3
MAX_ERROR = 200  # characters of the last straw's error in the reason of a failure


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one worker at a time; what it remembers outlives the worker."""

    group: Group
    generation: int  # of the workers that are restarted here
    is_provisional: bool = False  # made by a roll that may yet turn back
    worker: Worker | None = None
    restart_due: float | None = None  # when its next worker is to be spawned
    finished: bool = False  # its last worker ended as it should, and wants no successor
    gate: Gate | None = None  # what its next worker has to pass, and proves for the others
    cause: Cause = Cause.RETURNED  # why its last worker ended
    # Restarts since the last quiet window, by cause: the exponents of their back-offs.
    attempts: Counter[Cause] = field(default_factory=Counter)
    births: int = 0
    lost: str = ""  # how its last worker ended uninvited, in the words of metrics
    recycle_due: float | None = None  # when its worker is old enough to be replaced
    outgrows_at: float = NEVER  # bytes above which its worker is replaced
    has_outgrown: bool = False  # and has been asked to be

    @property
    def next_try(self) -> float | None:
        """When its next worker may be spawned; +inf: when others have shown that it helps."""
        if self.restart_due is None or self.gate is None:
            return self.restart_due
        return max(self.restart_due, self.gate.due)

    @property
    def proof_due(self) -> float:
        """When its worker will have proved to those behind the same gate that it helps."""
        if self.gate is None or self.worker is None:
            return NEVER
        return self.gate.proof_due(self.worker.id)

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
        gates: the fleet's, with its jitter.
        generation: of its first workers.
        is_provisional: made by a roll that may yet turn back.
    """

    def __init__(
        self,
        spec: GroupSpec,
        gates: Gates,
        generation: int,
        *,
        is_provisional: bool = False,
    ) -> None:
        self.spec = spec
        self.next_spec: GroupSpec | None = None  # what a roll under way will make of it
        self.is_provisional = is_provisional
        self.slots = [Slot(self, generation, is_provisional) for _ in range(spec.count)]
        self.breaker = Breaker(gates.draw)
        # Places without a worker that serves, and the pool that each of them waits for.
        self.waiting: dict[Slot, Outage] = {}
        self.told: Outage | None = None  # what it waits for, as it was announced; written by Fleet
        self.waiting_since = 0.0  # written by Fleet
        self.is_waiting = False  # what has to run before it is not done yet; written by Rolls
        self.was_ready = False  # it has been complete once; written by note_readiness
        self._gates = gates
        self._start = gates.of_a_start()  # what those wait behind whose start fails
        self._intensity = policy.Intensity()

    @property
    def failure(self) -> str:
        """Why it has failed; empty: it has not."""
        return self.breaker.reason

    @property
    def outage(self) -> Outage | None:
        """What it waits for: the pool that cannot connect; None where it does not wait."""
        return next(iter(self.waiting.values()), None)

    @property
    def rolling_spec(self) -> GroupSpec:
        """What holds for successors: the new rules where a roll is under way."""
        return self.next_spec or self.spec

    @property
    def ready(self) -> int:
        """How many of its workers serve now."""
        return sum(slot.is_ready for slot in self.slots)

    @property
    def finished(self) -> int:
        """How many of its places have done what they were for, and want no worker."""
        return sum(slot.finished for slot in self.slots)

    @property
    def expected(self) -> int:
        """How many workers are to serve: of those that run before the others none, when done."""
        return self.spec.count - (self.finished if self.spec.before else 0)

    @property
    def state(self) -> str:
        """The word that `status` has for this group."""
        if self.failure:
            return "failed"
        if self.is_waiting:
            return "waiting"
        if self.slots and self.finished == len(self.slots):
            return "finished"
        if self.ready + self.finished >= self.spec.count:
            return "ready"
        if self.waiting:
            return "waiting"
        return "degraded" if self.was_ready else "starting"

    def note_readiness(self) -> None:
        """Remember when every slot serves, or has done what it was for."""
        self.was_ready = self.was_ready or all(
            slot.is_ready or slot.finished for slot in self.slots
        )

    def schedule_recycling(self, slot: Slot) -> None:
        """Settle when the slot's worker will be old or large enough to be replaced, if ever."""
        slot.recycle_due = None
        slot.outgrows_at = NEVER
        slot.has_outgrown = False
        if self.spec.max_rss:
            slot.outgrows_at = self.spec.max_rss * (1.0 - RSS_JITTER * self._gates.draw())
        if self.spec.max_age and slot.worker is not None and slot.is_ready:
            age = self.spec.max_age * (1.0 - AGE_JITTER * self._gates.draw())
            slot.recycle_due = slot.worker.history[Step.READY] + age

    def put_off_recycling(self, slot: Slot, now: float) -> None:
        """See to it that a worker which could not be replaced is tried again."""
        slot.has_outgrown = False
        if self.spec.max_age and slot.is_ready and slot.recycle_due is None:
            slot.recycle_due = now + self.spec.max_age * AGE_JITTER

    def forgive(self) -> None:
        """Give a group that has failed another chance, as if it had never failed."""
        self.breaker.reset()
        self._start = self._gates.of_a_start()
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
        if (spec.max_age, spec.max_rss) != (before.max_age, before.max_rss):
            for slot in self.slots:
                self.schedule_recycling(slot)

    def reopen(self) -> None:
        """Have slots whose workers have ended for good filled again, where the rules say so now."""
        for slot in self.slots:
            slot.finished = slot.is_done

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
        for slot in added:
            self.waiting.pop(slot, None)
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
        for slot in surplus:
            self.waiting.pop(slot, None)
        return surplus

    def give_up_plans(self) -> None:
        """Spawn nobody any more: the fleet stops."""
        self.breaker.due = None
        self.breaker.proof_due = NEVER
        for slot in self.slots:
            slot.restart_due = slot.recycle_due = slot.gate = None

    # --- what its workers tell ---------------------------------------------------------------------

    def worker_ready(self, slot: Slot, worker: Worker, now: float) -> None:
        """Take note that the slot's worker serves."""
        self.waiting.pop(slot, None)
        self.schedule_recycling(slot)
        self._observe(slot, worker, now)
        if self.breaker.probe == worker.id:
            self.breaker.proof_due = now + self.spec.policy.window

    def outage_reported(self, slot: Slot, worker: Worker, now: float) -> None:
        """Take note that the slot's worker says that a pool cannot connect, or can again."""
        self._observe(slot, worker, now)
        outage = worker.outage
        if outage is None:
            self.waiting.pop(slot, None)
        elif not slot.is_ready and not self.failure:
            self.waiting[slot] = outage

    def settle(self, slot: Slot, worker: Worker | None, now: float) -> None:
        """Forget what was planned for a slot, since a roll has brought a worker that serves.

        Args:
            slot: where `slot.worker` is the new one.
            worker: the one that was replaced, if there was one.
            now: the time.
        """
        slot.restart_due = None
        self.waiting.pop(slot, None)
        if worker is not None:
            if slot.gate is not None:
                slot.gate.leave(worker.id)
            if self.breaker.probe == worker.id and slot.worker is not None:
                self.breaker.probe = slot.worker.id
                self.breaker.proof_due = now + self.spec.policy.window
        slot.gate = None
        self.schedule_recycling(slot)

    def _observe(self, slot: Slot, worker: Worker, now: float) -> None:
        """Settle when the slot's worker will have proved itself, as far as can be told now."""
        if slot.gate is not None:
            serves = slot.is_ready and worker.outage is None
            slot.gate.observe(worker.id, now + self.spec.min_ready_time if serves else NEVER)

    # --- failed, and tried again -------------------------------------------------------------------

    def place_for_a_probe(self) -> Slot | None:
        """Return a place that a failed group can try a worker in, if it has one."""
        return next(
            (
                slot
                for slot in self.slots
                if slot.worker is None and not (slot.finished or slot.is_provisional)
            ),
            None,
        )

    def recover(self, now: float) -> None:
        """Take it that a failed group works again: the rest follows in a ramp."""
        self.forgive()
        for slot in self.slots:
            if slot.worker is None and not (slot.finished or slot.is_provisional):
                slot.restart_due = now
                slot.gate = self._start

    def ended_in_a_roll(self, slot: Slot, worker: Worker, now: float) -> None:
        """Forget a worker whose end a roll has accounted for."""
        if slot.gate is not None:
            slot.gate.leave(worker.id)
        self._probe_ended(worker, now)

    def _probe_ended(self, worker: Worker, now: float) -> None:
        if self.breaker.probe == worker.id:
            self.breaker.end_probe(self.spec.policy, now)

    def worker_ended(self, slot: Slot, worker: Worker, now: float) -> bool:
        """Decide what becomes of a slot whose worker ended uninvited.

        Returns:
            True when the group has failed by this.
        """
        rules = self.spec.policy
        cause = slot.cause = worker.cause
        gate, slot.gate = slot.gate, None
        self.waiting.pop(slot, None)
        had_failed = bool(self.failure)
        if had_failed:
            self._ended_in_failure(slot, worker, now)
        elif worker.failed and rules.restart is policy.Restart.NEVER:
            why = f"{worker.id} failed, and is not to be restarted{_last_words(worker)}"
            self._fail(why, cause, now, final=True)
        elif self._is_one_too_many(worker, now):
            self._fail(
                f"{len(self._intensity.times)} failures within {rules.window:g} s, at most "
                f"{rules.max_restarts} are allowed; the last was {worker.id}{_last_words(worker)}",
                cause,
                now,
            )
        elif cause is Cause.NOT_BORN or policy.wants_restart(rules.restart, failed=worker.failed):
            self._plan_restart(slot, worker, now)
        else:
            slot.finished = True
        if gate is not None:
            gate.leave(worker.id)
        return bool(self.failure) and not had_failed

    def _is_one_too_many(self, worker: Worker, now: float) -> bool:
        """Count a failure, where the group is to blame for it; what it depends on is not its own."""
        if not worker.failed or worker.cause is Cause.DEPENDENCY or self._is_spared(worker):
            return False
        waited = now - worker.spawned_at if worker.cause is Cause.STARTUP else 0.0
        return self._intensity.count_failure(self.spec.policy, now, waited)

    def _is_spared(self, worker: Worker) -> bool:
        """Tell whether a job is to blame for an end, and the group sees itself to what becomes of it."""
        return worker.by_job and self.spec.answers_for_jobs

    def _plan_restart(self, slot: Slot, worker: Worker, now: float) -> None:
        rules = self.spec.policy
        outage = worker.outage
        if worker.cause is Cause.DEPENDENCY and outage is not None:
            self.waiting[slot] = outage
            slot.gate = self._gates.of_pool(outage.pool)
        elif worker.cause is Cause.STARTUP:
            slot.gate = self._start
        if slot.gate is None:
            self._back_off(slot, worker, now)
        else:
            slot.gate.fail(worker.id, rules, now)
            slot.restart_due = now

    def _back_off(self, slot: Slot, worker: Worker, now: float) -> None:
        rules = self.spec.policy
        cause = worker.cause
        # Quiet is what has served for a whole window; to wait for a restart, or to start, is not.
        if now - worker.history.get(Step.READY, now) >= rules.window:
            slot.attempts.clear()
        attempt = slot.attempts[cause]
        if self._is_spared(worker):  # others wait for their turn, and it may never come again
            attempt = min(attempt, SPARED_DOUBLINGS)
        delay = policy.backoff_delay(
            rules, attempt, self._gates.draw, first_backoff(cause, rules.backoff)
        )
        slot.restart_due = now + max(SPAWN_RETRY if cause is Cause.NOT_BORN else 0.0, delay)
        slot.attempts[cause] += 1

    def _ended_in_failure(self, slot: Slot, worker: Worker, now: float) -> None:
        if not worker.failed and not policy.wants_restart(self.spec.policy.restart, failed=False):
            slot.finished = True
            if self.breaker.probe == worker.id:  # it has done what it was for: that is a proof
                self.breaker.probe = ""
                self.breaker.proof_due = now
        self._probe_ended(worker, now)

    def _fail(self, why: str, cause: Cause, now: float, *, final: bool = False) -> None:
        self.breaker.open(why, cause, self.spec.policy, now, final=final)
        self.waiting.clear()
        for slot in self.slots:
            slot.restart_due = None
            if slot.worker is None:
                slot.gate = None


def _last_words(worker: Worker) -> str:
    """Return what its code has raised, or else what is known of its failure and its end."""
    words = worker.error or (f"it {worker.fault}" if worker.fault else worker.ending)
    return f" ({words})" if len(words) <= MAX_ERROR else f" ({words[:MAX_ERROR]} …)"
