"""The machine: every decision about the fleet as a whole. Events in, actions out.

Theory of operation. `handle(event, now)` takes one thing that has happened and returns what to do,
in order. `next_deadline()` says when `TimePassed` is wanted at the latest; after that has been
handled the next one lies in the future, so the loop cannot spin. Nothing else changes the state.

Decisions are made in five places, none of which knows the one above it: about one worker in
`worker`, about one group's places and restarts in `group`, about one roll in `roll`, about what is
rolled when in `rolls`, and here about the rest: when the fleet is ready, how it stops, with what code
it ends.

    STARTING  -- every group has been complete once -->  READY
    STARTING, READY  -- a reload -->  RELOADING  -- its end -->  back to where it was
    any of them  -- stop requested, or a group failed that is not to be survived -->  STOPPING
    STOPPING  -- every process group is gone -->  STOPPED

The supervisor runs until it is stopped: groups whose workers have all ended as they should, or that
have failed, are no reason to go. Members of the WaitGroup are added before they are spawned and
counted down by `drained` or by their end. The stop is complete when every process group is gone: an
acknowledgement is a claim.

If an event comes much later than `TimePassed` was wanted, the supervisor itself stood still: it was
stopped, or starved. Who had its chance in that time cannot be told, so nobody is judged in that turn
and everything due is due that much later. Twice in a row counts as a machine that is slow, not as
one that slept: there a deadline is a deadline.
"""

from __future__ import annotations

__all__ = [
    "MEASURE_EVERY",
    "RECEIPT_DUE",
    "STACKS_DUE",
    "STOOD_STILL",
    "STOP_NOW_GRACE",
    "Fleet",
    "FleetSnapshot",
    "GroupSnapshot",
    "GroupSpec",
    "Phase",
    "WorkerSnapshot",
]

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from operator import itemgetter
from typing import Any, assert_never

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core import snapshot
from supervisor.core.causes import Cause, OomKills
from supervisor.core.group import Group, Slot
from supervisor.core.roll import Failure
from supervisor.core.rolls import Rolls
from supervisor.core.slowstart import Gates
from supervisor.core.snapshot import FleetSnapshot, GroupSnapshot, WorkerSnapshot
from supervisor.core.spec import GroupSpec
from supervisor.core.waitgroup import WaitGroup
from supervisor.core.worker import (
    CRASHES,
    NEVER,
    RECEIPT_DUE,
    STACKS_DUE,
    STOP_NOW_GRACE,
    Notice,
    Step,
    Terms,
    Worker,
)
from supervisor.errors import InvariantError

# Seconds that `TimePassed` may be late before it means that the supervisor stood still. A turn of
# the loop takes milliseconds, with hundreds of workers tens of them.
STOOD_STILL = 1.0
# Seconds between two looks at the memory of workers that are to be replaced for their size. It is
# the supervisor that wakes up for it, and only where a group asks for that.
MEASURE_EVERY = 10.0


class Phase(Enum):
    """What the supervisor as a whole is about."""

    STARTING = "starting"
    READY = "ready"
    RELOADING = "reloading"
    STOPPING = "stopping"
    STOPPED = "stopped"

    @property
    def shown(self) -> str:
        """The word that `status` has for this phase."""
        return Phase.STOPPING.value if self is Phase.STOPPED else self.value


class Fleet:
    """The decisions of one supervisor. Not thread-safe: the loop owns it.

    Args:
        groups: what to keep running.
        grace: seconds from a cancel to its deadline.
        abort_margin: seconds before the deadline at which work in flight is cancelled; not above
            `grace`.
        draw: uniform numbers from 0 to 1, for jitter.
        oom_kills: the kernel's count of them at the start; None where it tells none.
    """

    def __init__(
        self,
        groups: tuple[GroupSpec, ...],
        *,
        grace: float,
        abort_margin: float,
        draw: Callable[[], float],
        oom_kills: int | None = None,
    ) -> None:
        self._terms = Terms(grace, abort_margin)
        self._phase = Phase.STARTING
        self._was_ready = False  # the whole fleet has been ready once
        self._gates = Gates(draw)
        self._oom_kills = OomKills(oom_kills)
        self._groups = {spec.name: Group(spec, self._gates, 1) for spec in groups}
        self._rolls = Rolls(self._groups, self, self._gates)
        # Those that have not ended, each with its place. Invariant: the worker is in that slot.
        self._workers: dict[str, Worker] = {}
        self._slot_of: dict[str, Slot] = {}
        self._serials: Counter[str] = Counter()  # the last number given, by group
        self._waitgroup = WaitGroup()
        self._outbox: list[ac.Action] = []  # shared with every worker; emptied by _take
        self._began = 0.0
        self._stop_began = 0.0
        self._stop_causes: list[str] = []  # who asked for it, and who hurried it
        self._stop_deadline = NEVER
        self._killed_before: set[str] = set()  # whose SIGKILL is no doing of the stop
        self._ended: list[Worker] = []  # those that ended during the stop, for its report
        self._measured_at = 0.0  # when workers' memory was last asked for
        self._has_excused = False  # since something that was due was last acted on

    # --- the three entries -----------------------------------------------------------------------

    def start(self, now: float) -> list[ac.Action]:
        """Return what brings up every group. Called once, before anything else."""
        self._began = self._measured_at = now
        if not self._rolls.prepare_start(now):
            for slot in self._slots():
                self._spawn(slot, now)
        self._note_readiness(now)
        return self._take()

    def handle(self, event: ev.Event, now: float) -> list[ac.Action]:
        """Return what to do about `event`. `now` never goes back.

        Raises:
            InvariantError: a bug of ours.
        """
        self._excuse_if_it_stood_still(now)  # before this event makes anything due
        match event:
            case ev.WorkerEvent():
                self._reported(event, now)
            case ev.StopRequested():
                self._stop(event.cause, self._terms.notice(now, "stop", event.grace), now)
            case ev.StopNowRequested():
                self._stop(event.cause, self._terms.notice_at_once(now, "stop"), now)
            case (
                ev.ReloadRequested()
                | ev.SettingsChanged()
                | ev.RestartRequested()
                | ev.ScaleRequested()
            ):
                if self._phase not in (Phase.STOPPING, Phase.STOPPED):
                    self._requested(event, now)
            case ev.MemoryMeasured():
                if self.watches_memory:
                    self._recycle_what_has_outgrown(event.sizes, now)
            case ev.TimePassed():
                self._time_passed(now)
            case _:
                assert_never(event)
        self._note_outages(now)
        self._note_readiness(now)
        return self._take()

    def next_deadline(self) -> float | None:
        """Return the moment by which `TimePassed` is wanted, or None when nothing is due."""
        due = min(self._first_due(), self._rolls.due, self._measure_due())
        for slot in self._slots():
            restart_due = None if self._rolls.fills(slot) else slot.restart_due
            if slot.gate is not None:  # seldom
                restart_due = None if restart_due is None else slot.next_try
                due = min(due, slot.proof_due)
            for wanted in (restart_due, slot.recycle_due):
                if wanted is not None and wanted < due:
                    due = wanted
        for group in self._groups.values():
            for wanted in (group.breaker.due, group.breaker.proof_due):
                if wanted is not None and wanted < due:
                    due = wanted
        return None if due == NEVER else due

    def _take(self) -> list[ac.Action]:
        actions = self._outbox.copy()
        self._outbox.clear()
        return actions

    # --- workers come and go ---------------------------------------------------------------------

    def _spawn(self, slot: Slot, now: float) -> None:
        if slot.worker is not None:
            raise InvariantError(f"BUG: a second worker for a slot of {slot.group.spec.name}")
        slot.restart_due = None
        slot.worker = self._make(slot, slot.generation, slot.group.spec, slot.lost, now)
        if slot.gate is not None:
            slot.gate.enter(slot.worker.id)

    def _make(
        self, slot: Slot, generation: int, spec: GroupSpec, reason: str, now: float
    ) -> Worker:
        """Make a worker, on the books before it can possibly end.

        `reason` says why it is made in the place of another one, if it is.
        """
        if self._phase is Phase.STOPPING:
            raise InvariantError(f"BUG: a spawn for {spec.name} in a stop")
        worker = Worker(
            self._next_id(spec.name),
            spec.name,
            generation,
            hang_timeout=spec.hang_timeout,
            ready_timeout=spec.ready_timeout,
            must_end=spec.before,
            stop_signal=spec.stop_signal,
            terms=self._terms,
            now=now,
            outbox=self._outbox,
            reason=reason if slot.births else "",
            program=spec.policy.restart if spec.is_program else None,
        )
        self._workers[worker.id] = worker
        self._slot_of[worker.id] = slot
        self._waitgroup.add(worker.id)
        self._outbox.append(ac.Spawn(worker.id, worker.group, worker.generation))
        return worker

    def _next_id(self, group: str) -> str:
        """Return a name that was never used before, also when a group of this name was gone."""
        self._serials[group] += 1
        return f"{group}-{self._serials[group]}"

    def _reported(self, report: ev.WorkerReport, now: float) -> None:
        worker = self._workers.get(report.worker)
        if isinstance(report, ev.WorkerExited) and worker is not None and not worker.kill_reason:
            worker.by_memory = self._oom_kills.explains(report.oom_kills)
        if worker is None or not worker.report(report, now):
            return  # it has ended, or says what it has said before
        slot = self._slot_of[worker.id]
        match report:
            case ev.WorkerBorn():
                slot.births += 1
            case ev.WorkerReady():
                if slot.worker is worker:
                    slot.group.worker_ready(slot, worker, now)
                self._rolls.became_ready(worker, slot, now)
            case ev.WorkerUnreachable() | ev.WorkerReachable():
                if slot.worker is worker:
                    slot.group.outage_reported(slot, worker, now)
            case ev.WorkerFailed():
                self._rolls.failed(
                    worker, slot, Failure(worker.id, report.error, report.traceback), now
                )
            case ev.WorkerDrained():
                self._waitgroup.done(worker.id)
                self._rolls.review(now)
            case ev.WorkerLeaving() | ev.StacksTaken():
                self._rolls.review(now)
            case ev.WorkerNotBorn() | ev.WorkerExited():
                self._worker_ended(worker, slot, report, now)
            case _:
                pass  # nobody's business but the worker's

    def _worker_ended(
        self, worker: Worker, slot: Slot, report: ev.WorkerNotBorn | ev.WorkerExited, now: float
    ) -> None:
        """Take the worker off the books, once, and decide what comes after it."""
        how = _how_it_ended(worker, report)
        del self._workers[worker.id], self._slot_of[worker.id]
        if slot.worker is worker:
            slot.worker = None
            slot.recycle_due = None
            slot.lost = _why_lost(worker, report) or slot.lost
        self._waitgroup.done(worker.id)
        self._waitgroup.forget(worker.id)
        if self._phase is Phase.STOPPING:
            self._ended.append(worker)
            self._finish_if_all_ended(now)
            return
        if slot.group.spec.answers_for_jobs and isinstance(report, ev.WorkerExited) and report.jobs:
            self._outbox.append(
                ac.TellDeath(
                    worker.group,
                    worker.id,
                    worker.pid,
                    report.code,
                    report.signal,
                    by_itself=worker.crashed_itself,
                )
            )
        if self._rolls.ended(worker, slot, how, now):
            slot.group.ended_in_a_roll(slot, worker, now)
        else:
            if slot.group.worker_ended(slot, worker, now) and not self._rolls.is_to_blame(
                worker, slot, how, now
            ):
                self._group_failed(slot.group, worker, now)
            self._rolls.go_on(now)
        self._spawn_what_is_due(now)

    def _group_failed(self, group: Group, last: Worker, now: float) -> None:
        due = group.breaker.due
        group.told = None  # it does not wait any more: it has failed
        self.announce(
            "group.failed",
            **last.who,
            reason=group.failure,
            cause=group.breaker.cause.value,
            next_try_seconds=None if due is None else _round(due - now),
        )
        if group.spec.exit_on_failed:
            cause = f"group {group.spec.name} has failed"
            self._stop(cause, self._terms.notice(now, "stop"), now)

    def _note_outages(self, now: float) -> None:
        """Announce which group begins to wait for which pool, and whose wait is over."""
        if self._phase in (Phase.STOPPING, Phase.STOPPED):
            return
        for group in self._groups.values():
            if group.failure:
                continue
            outage, told = group.outage, group.told
            if outage is not None and (told is None or told.pool != outage.pool):
                group.told = outage
                group.waiting_since = now if told is None else group.waiting_since
                self.announce(
                    "group.waiting", group=group.spec.name, pool=outage.pool, error=outage.error
                )
            elif outage is None and told is not None:
                group.told = None
                self._announce_recovered(group, "waiting", now - group.waiting_since, told.pool)

    def _announce_recovered(self, group: Group, was: str, seconds: float, pool: str = "") -> None:
        self.announce(
            "group.recovered",
            group=group.spec.name,
            was=was,
            seconds=_round(seconds),
            **({"pool": pool} if pool else {}),
        )

    def _note_readiness(self, now: float) -> None:
        for group in self._groups.values():
            group.note_readiness()
        if self._phase is Phase.RELOADING and not self._rolls.is_reloading:
            self._phase = Phase.READY if self._was_ready else Phase.STARTING
        if self._phase is Phase.STARTING and all(g.was_ready for g in self._groups.values()):
            self._phase = Phase.READY
            self._was_ready = True
            self.announce(
                "supervisor.ready",
                generation=self._rolls.generation,
                workers=len(self._workers),
                seconds=_round(now - self._began),
            )

    # --- rolls: what they need of the fleet --------------------------------------------------------

    def _requested(
        self, event: ev.ReloadRequested | ev.SettingsChanged | ev.Request, now: float
    ) -> None:
        match event:
            case ev.ReloadRequested():
                self._phase = Phase.RELOADING
                self._rolls.request_reload(event, now)
            case ev.SettingsChanged():
                self.take_force(event)
                self._rolls.drop_overtaken_scaling()
                for worker in self._workers.values():
                    worker.take(self._terms)
                for spec in event.groups:
                    self._take_spec(spec, now)
                self._spawn_what_is_due(now)
            case _:
                self._rolls.request(event, now)

    def _take_spec(self, spec: GroupSpec, now: float) -> None:
        group = self._groups.get(spec.name)
        if group is None:
            return
        count = group.spec.count
        group.take(replace(spec, count=count))
        group.reopen()
        group.refill(now)
        if spec.count != count:
            self._rolls.request(ev.ScaleRequested(spec.name, spec.count), now)

    def spawn_successor(self, slot: Slot, generation: int, now: float) -> Worker:
        """Spawn a worker beside the slot's own, under the rules that its roll brings."""
        if slot.group.failure and generation != self._rolls.generation:
            slot.group.forgive()
        reason = "recycled" if self._rolls.is_recycling else "rolled"
        return self._make(slot, generation, slot.group.rolling_spec, reason, now)

    def swap(self, slot: Slot, successor: Worker, now: float) -> None:
        """Make the successor the slot's worker, and cancel the old one."""
        old, slot.worker = slot.worker, successor
        slot.generation = successor.generation
        slot.finished = False
        slot.group.settle(slot, old, now)
        if old is not None:
            old.cancel(self._terms.notice(now, "replaced"), now)

    def give_up(self, worker: Worker, now: float) -> None:
        """Cancel a worker that is not wanted any more."""
        worker.cancel(self._terms.notice(now, "not wanted any more"), now)

    def start_failed(self, failure: Failure, now: float) -> None:
        """End: what had to run before the others has failed, so there is nobody to keep."""
        name = failure.worker.rpartition("-")[0]
        group = self._groups.get(name)
        if group is not None:
            reason = f"{failure.worker}: {failure.error}"
            group.breaker.open(reason, Cause.STARTUP, group.spec.policy, now, final=True)
        self.announce(
            "group.failed",
            worker=failure.worker,
            group=name,
            reason=failure.error,
            cause=Cause.STARTUP.value,
            next_try_seconds=None,
        )
        self._stop(f"group {name} has failed", self._terms.notice(now, "stop"), now)

    def has_workers_of(self, generation: int) -> bool:
        """Tell whether a worker of this generation has not ended."""
        return any(worker.generation == generation for worker in self._workers.values())

    def retire(self, generation: int) -> None:
        """No worker of this generation will be spawned any more."""
        self._outbox.append(ac.Retire(generation))

    def take_force(self, request: ev.ReloadRequested | ev.SettingsChanged) -> None:
        """Let other terms be in force from now on."""
        self._terms = Terms(request.grace, request.abort_margin)

    # --- the stop --------------------------------------------------------------------------------

    def _stop(self, cause: str, notice: Notice, now: float) -> None:
        """Begin the stop, or bring the end of the one that is under way nearer."""
        if self._phase is Phase.STOPPED or notice.deadline >= self._stop_deadline:
            return
        if self._phase is not Phase.STOPPING:
            self._phase = Phase.STOPPING
            self._stop_began = now
            self._rolls.drop_all()
            self._killed_before = {w.id for w in self._workers.values() if w.kill_reason}
            for group in self._groups.values():
                group.give_up_plans()
        self._stop_deadline = notice.deadline
        self._stop_causes.append(cause)
        self.announce(
            "supervisor.stopping",
            cause=cause,
            workers=len(self._workers),
            grace_seconds=_round(notice.deadline - now),
        )
        for worker in self._workers.values():
            worker.cancel(notice, now)
        self._finish_if_all_ended(now)

    def _finish_if_all_ended(self, now: float) -> None:
        if self._workers:
            return
        if self._waitgroup.outstanding:
            raise InvariantError(f"BUG: {self._waitgroup.outstanding} ended but are outstanding")
        self._phase = Phase.STOPPED
        outcomes = tuple(self._outcome(worker) for worker in self._ended if worker.pid is not None)
        killed = [outcome.worker for outcome in outcomes if outcome.killed]
        failed = [group.spec.name for group in self._groups.values() if group.failure]
        exit_code = 1 if killed or failed else 0
        self.announce(
            "supervisor.stopped",
            exit_code=exit_code,
            workers=len(outcomes),
            drained=sum(outcome.drained is not None for outcome in outcomes),
            killed=killed,
            failed_groups=failed,
            **self._account(outcomes, now),
        )
        self._outbox.append(ac.Finish(exit_code, outcomes))

    def _account(self, outcomes: tuple[ac.Outcome, ...], now: float) -> dict[str, Any]:
        """Return what the whole stop came to: one line tells it all."""
        cause, *hurried_by = self._stop_causes
        reports = [report for outcome in outcomes for report in outcome.reports.values()]
        in_stop = [worker.life["in_stop"] for worker in self._ended if worker.life]
        return {
            "cause": cause,
            **({"hurried_by": hurried_by} if hurried_by else {}),
            "grace_seconds": _round(self._stop_deadline - self._stop_began),
            "seconds": _round(now - self._stop_began),
            "acknowledged": sum(outcome.acknowledged is not None for outcome in outcomes),
            "jobs": {what: sum(each[what] for each in in_stop) for what in ("finished", "aborted")},
            "connections": {
                "closed": sum(report["closed"] for report in reports),
                "leaked": sum(len(report["leaked"]) for report in reports),
            },
        }

    def _outcome(self, worker: Worker) -> ac.Outcome:
        def since(step: Step) -> float | None:
            at = worker.history.get(step)
            return None if at is None else _round(at - self._stop_began)

        return ac.Outcome(
            worker=worker.id,
            acknowledged=since(Step.ACKNOWLEDGED),
            drained=since(Step.DRAINED),
            exited=since(Step.EXITED),
            killed="" if worker.id in self._killed_before else worker.kill_reason,
            reports=worker.reports,
        )

    # --- time ------------------------------------------------------------------------------------

    def _time_passed(self, now: float) -> None:
        if self._first_due() <= now:
            self._has_excused = False
        for worker in list(self._workers.values()):
            worker.time_passed(now)
        self._rolls.time_passed(now)
        self._recycle_what_is_due(now)
        self._take_what_is_proved(now)
        self._probe_what_has_failed(now)
        self._spawn_what_is_due(now)
        if self._measure_due() <= now:
            self._measured_at = now
            self._outbox.append(ac.MeasureMemory())

    def _measure_due(self) -> float:
        return self._measured_at + MEASURE_EVERY if self.watches_memory else NEVER

    def _recycle_what_has_outgrown(self, sizes: Mapping[str, int], now: float) -> None:
        for slot in self._slots():
            worker = slot.worker
            if worker is None or not slot.is_ready or slot.has_outgrown:
                continue
            size = sizes.get(worker.id, 0)
            if size > slot.outgrows_at:
                slot.has_outgrown = True
                limit = slot.group.spec.max_rss
                self.announce("worker.outgrown", **worker.who, rss_bytes=size, max_rss_bytes=limit)
                self._rolls.request(ev.RestartRequested(worker.id, ev.RECYCLE), now)

    def _take_what_is_proved(self, now: float) -> None:
        """Let others follow those who have shown that it helps to start."""
        for slot in self._slots():
            if slot.gate is not None and slot.worker is not None and slot.proof_due <= now:
                slot.gate.prove(slot.worker.id, now)
                slot.gate = None
        for group in self._groups.values():
            if group.breaker.proof_due <= now:
                began = group.breaker.opened_at
                group.recover(now)
                self._announce_recovered(group, "failed", now - began)

    def _probe_what_has_failed(self, now: float) -> None:
        """Try one worker in each group that has failed and whose pause is over."""
        for group in self._groups.values():
            if group.breaker.due is None or group.breaker.due > now:
                continue
            slot = group.place_for_a_probe()
            if slot is None or self._rolls.fills(slot):
                group.breaker.end_probe(group.spec.policy, now)
                continue
            self._spawn(slot, now)
            assert slot.worker is not None
            group.breaker.start_probe(slot.worker.id)
            self.announce(
                "group.probing",
                group=group.spec.name,
                worker=slot.worker.id,
                probe=group.breaker.probes,
            )

    def _recycle_what_is_due(self, now: float) -> None:
        for slot in self._slots():
            if slot.recycle_due is not None and slot.recycle_due <= now:
                slot.recycle_due = None
                if slot.worker is not None:
                    self._rolls.request(ev.RestartRequested(slot.worker.id, ev.RECYCLE), now)

    def _excuse_if_it_stood_still(self, now: float) -> None:
        late = now - self._first_due()
        if late < STOOD_STILL or self._has_excused:
            return
        self._has_excused = True
        self._stop_deadline = max(self._stop_deadline + late, now + RECEIPT_DUE)
        for worker in self._workers.values():
            worker.excuse(late, now)

    def _first_due(self) -> float:
        """Return when the next worker's step is due. Restarts do not count: late is no harm."""
        return min((worker.due for worker in self._workers.values()), default=NEVER)

    def _spawn_what_is_due(self, now: float) -> None:
        due = [
            (slot.restart_due, slot)
            for slot in self._slots()
            if slot.restart_due is not None and slot.restart_due <= now and slot.worker is None
        ]
        # Who has waited for longest goes first: behind a gate, the others have not tried since.
        for _, slot in sorted(due, key=itemgetter(0)):
            if not self._rolls.fills(slot) and (slot.gate is None or slot.gate.due <= now):
                self._spawn(slot, now)

    # --- small things ----------------------------------------------------------------------------

    def _slots(self) -> Iterator[Slot]:
        for group in list(self._groups.values()):
            yield from list(group.slots)

    def announce(self, event: str, **fields: Any) -> None:
        """Tell the world."""
        self._outbox.append(ac.Announce(event, fields))

    # --- for status and tests --------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the supervisor as a whole is about."""
        return self._phase

    @property
    def watches_memory(self) -> bool:
        """Whether a worker that is too large would be replaced."""
        return self._phase not in (Phase.STOPPING, Phase.STOPPED) and any(
            group.spec.max_rss for group in self._groups.values()
        )

    @property
    def is_rolling(self) -> bool:
        """Whether workers are being replaced, or are about to be."""
        return not self._rolls.is_at_rest

    @property
    def takes_settings(self) -> bool:
        """Whether other rules can be put in force without a roll.

        Not while a reload is under way. And a reload gives a group that has failed another chance.
        """
        return self._phase in (Phase.STARTING, Phase.READY) and not any(
            group.failure for group in self._groups.values()
        )

    def worker_of(self, worker_id: str) -> WorkerSnapshot | None:
        """Return one living worker, or None."""
        worker = self._workers.get(worker_id)
        return None if worker is None else self._snapshot_of(worker)

    def snapshot(self, *, with_workers: bool = True) -> FleetSnapshot:
        """Return the fleet as it is now, its workers one by one where that is wanted."""
        members: dict[str, list[Worker]] = {name: [] for name in self._groups}
        for worker in self._workers.values():
            members.setdefault(worker.group, []).append(worker)
        return FleetSnapshot(
            state=self._phase.shown,
            generation=self._rolls.generation,
            groups=tuple(
                snapshot.of_group(group, members[name]) for name, group in self._groups.items()
            ),
            workers=tuple(
                self._snapshot_of(worker) for worker in self._workers.values() if with_workers
            ),
            outstanding=self._waitgroup.outstanding,
            deadline=None if self._stop_deadline == NEVER else self._stop_deadline,
            roll=self._rolls.progress(),
        )

    def _snapshot_of(self, worker: Worker) -> WorkerSnapshot:
        return snapshot.of_worker(worker, self._slot_of[worker.id].restarts)


def _how_it_ended(worker: Worker, report: ev.WorkerNotBorn | ev.WorkerExited) -> Failure:
    """Say why a worker has failed that ended before it had proved itself."""
    if isinstance(report, ev.WorkerNotBorn):
        return Failure(worker.id, worker.error, "")
    fault = f"it {worker.fault}: " if worker.fault else ""
    return Failure(worker.id, f"{fault}{worker.ending}", report.stacks)


def _why_lost(worker: Worker, report: ev.WorkerNotBorn | ev.WorkerExited) -> str:
    """Return the reason for the worker that will take its place, as metrics name it."""
    if isinstance(report, ev.WorkerNotBorn):
        return ""  # it never was there
    if Step.HUNG in worker.history:
        return "hung"
    if worker.fault or worker.kill_reason or report.code or report.signal in CRASHES:
        return "failed"
    return "killed" if report.signal is not None or worker.leaving else "exited"


def _round(seconds: float) -> float:
    return round(seconds, 6)
