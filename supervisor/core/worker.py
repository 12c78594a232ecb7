"""One worker: every decision about it from its spawn to its end. It knows nothing of other workers.

Theory of operation. `report` takes what the worker or the world says of it, `cancel` has it end,
`time_passed` takes the steps that are due. What to do is put into the outbox, in order.

The way down, for a worker that is told to end by its deadline D:

    cancel  -- no receipt within RECEIPT_DUE -->  SIGTERM
       | acknowledged, drained, exited
       +-- still there at D -->  its stacks  -- at most STACKS_DUE -->  SIGKILL to its process group

One that serves and has a `hang_timeout` is looked at from outside: when its oldest job would be
overdue, and at least once in each `hang_timeout`, since a job may have begun just after the last look.
A job that is overdue makes it suspect:

    its stacks  -- at most SUSPECT_STACKS_DUE -->  `worker.hung`, and the way down, with the usual grace

One that is stopped (SIGSTOP) can do nothing about its jobs: it is not judged, and its clocks begin
anew when it is seen to run. So they do where the supervisor itself stood still, since both may
have been frozen; but not twice within two `hang_timeout`, or a slow machine would find no hang.

One that has not said hello has no work yet, and no socket to be told over: it gets SIGTERM at once.
One that is not born is waited for like a receipt, then given up. One that ends by itself (its code
returned or raised) is not cancelled, but D is set for it all the same: nothing waits for ever. One
that must end, since others wait for that, has until `ready_timeout`; to become ready is nothing then.
"""

from __future__ import annotations

__all__ = [
    "CRASHES",
    "NEVER",
    "RECEIPT_DUE",
    "STACKS_DUE",
    "STOP_NOW_GRACE",
    "SUSPECT_STACKS_DUE",
    "Notice",
    "Step",
    "Terms",
    "Worker",
]

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, assert_never

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.causes import Cause, Outage, cause_of
from supervisor.core.jobs import JobSeen, limit_of, told
from supervisor.core.lifecycle import Decision, State, after_decision, after_report
from supervisor.core.policy import Restart

# Seconds from cancel to its receipt. It comes from a thread that does nothing else, so after that
# this thread is taken for dead.
RECEIPT_DUE = 1.0
# Seconds from the deadline to SIGKILL, for the stacks to be written and read.
STACKS_DUE = 0.25
# The same for a worker that hangs: there is no hurry, and other work in it goes on.
SUSPECT_STACKS_DUE = 1.25
# With STACKS_DUE and a slow turn of the loop this keeps "SIGKILL after at most one second".
STOP_NOW_GRACE = 0.5

NEVER = float("inf")
# Signals by which a program ends itself: SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS.
CRASHES = frozenset({4, 5, 6, 7, 8, 11, 31})


@dataclass(frozen=True, slots=True)
class Notice:
    """By when a worker has to be gone, how long before that its work is cancelled, and why."""

    deadline: float
    abort_margin: float
    cause: str


@dataclass(frozen=True, slots=True)
class Terms:
    """How much time workers have to end, in seconds; `abort_margin` is not above `grace`."""

    grace: float
    abort_margin: float

    def notice(self, now: float, cause: str, grace: float | None = None) -> Notice:
        """Return a notice given now; less time than usual leaves the same share for aborting."""
        if grace is None:
            grace = self.grace
        share = min(1.0, grace / self.grace) if self.grace else 1.0
        return Notice(now + grace, self.abort_margin * share, cause)

    def notice_at_once(self, now: float, cause: str) -> Notice:
        """Return the shortest notice: all of its moment is for aborting."""
        return Notice(now + STOP_NOW_GRACE, STOP_NOW_GRACE, cause)


class Step(Enum):
    """What a worker has gone through. The value is what the ladder of a kill shows."""

    SPAWNED = "spawned"
    REGISTERED = "registered"
    READY = "ready"
    HUNG = "hung"
    FAILED = "failed"
    CANCELLED = "cancel"
    TERMINATED = "SIGTERM"
    ACKNOWLEDGED = "acknowledged"
    DRAINED = "drained"
    STACKS = "stacks"
    KILLED = "SIGKILL"
    EXITED = "exited"


_LATE_STACKS = "it wrote none in time"
_NO_WORDS = "it did not answer, and without a hang_timeout nothing is written down"
_REMEDY = "let it run in the foreground, as with -F, --foreground, --no-daemon or 'daemon off'"
_ENDS_SERVICE = (Step.CANCELLED, Step.DRAINED, Step.FAILED)
_LAST_WORDS = (*_ENDS_SERVICE, Step.KILLED)  # after which an end is no riddle
_BEFORE_THE_LADDER = (Step.SPAWNED, Step.REGISTERED, Step.READY)


class Worker:
    """One incarnation, from its spawn to its end. Written by its own methods only.

    Args:
        worker_id: its name, never used again.
        group: the name of its group.
        generation: of the code that it runs.
        ready_timeout: seconds from its spawn until it must be ready, or have ended.
        must_end: whether it has to end by itself in that time.
        hang_timeout: seconds that one of its jobs may take, 0: as long as it likes.
        stop_signal: by which it may end when it is told to end.
        terms: how much time it has to end.
        now: when its spawn was asked for.
        outbox: where actions are put.
        reason: why it takes the place of another one; "" where it does not.
        program: when it is restarted, where it is the parent of a program; else None.
    """

    __slots__ = (
        "_abort_margin",
        "_cause",
        "_halted",
        "_hang_timeout",
        "_has_stacks",
        "_outages",
        "_outbox",
        "_overdue",
        "_program",
        "_ready_timeout",
        "_stop_signal",
        "_terms",
        "_watched_since",
        "by_job",
        "by_memory",
        "cause",
        "crashed_itself",
        "deadline",
        "due",
        "ending",
        "ends_by",
        "error",
        "failed",
        "fault",
        "generation",
        "group",
        "history",
        "id",
        "kill_reason",
        "leaving",
        "life",
        "pid",
        "reason",
        "reports",
        "spawned_at",
        "state",
    )

    def __init__(
        self,
        worker_id: str,
        group: str,
        generation: int,
        *,
        ready_timeout: float,
        must_end: bool = False,
        hang_timeout: float,
        stop_signal: int,
        terms: Terms,
        now: float,
        outbox: list[ac.Action],
        reason: str = "",
        program: Restart | None = None,
    ) -> None:
        self._program = program
        self.id = worker_id
        self.group = group
        self.generation = generation
        self.reason = reason
        self.pid: int | None = None
        self.state = State.SPAWNING
        self.spawned_at = now
        self.due = now + ready_timeout  # when its next step is due
        self.deadline = NEVER  # by when it must be gone, once that is settled
        self.ends_by = self.due if must_end else NEVER  # by when it has to end by itself
        self.history: dict[Step, float] = {}  # when each step was taken, in the order of the steps
        self.reports: Mapping[str, Any] = {}  # pool -> close report, as it said
        self.life: Mapping[str, Any] = {}  # what it has done, as it said
        self._has_stacks = False  # some event has its stacks
        self.fault = ""  # why it counts as failed even when it ends with code 0
        self.error = ""  # what its code has raised, or why it was not even born
        self.ending = ""  # how its process ended
        self.failed = False  # settled by its end, as is the cause
        self.cause = Cause.RETURNED
        self.by_job = False  # it died uninvited with a job in flight, or a job of it hung
        self.crashed_itself = False  # and nobody from outside did that
        self.by_memory = False  # an OOM kill is accounted for by its end; written by Fleet
        self._outages: dict[str, str] = {}  # pools that cannot connect, and what their drivers say
        self.kill_reason = ""
        self.leaving = ""  # who else told it to end
        self._abort_margin = 0.0  # this and the cause are what it is told beside the deadline
        self._cause = ""
        self._ready_timeout = ready_timeout
        self._hang_timeout = hang_timeout
        self._watched_since = now  # no job's clock begins before that
        self._halted = ""  # why its process did not run when it was seen last
        self._overdue: tuple[JobSeen, ...] = ()  # what was in flight when it became suspect
        self._stop_signal = stop_signal
        self._terms = terms
        self._outbox = outbox

    @property
    def who(self) -> dict[str, Any]:
        """The fields that every event about this worker has."""
        return {
            "worker": self.id,
            "group": self.group,
            "pid": self.pid,
            "generation": self.generation,
        }

    @property
    def outage(self) -> Outage | None:
        """The first pool that it says cannot connect; None where all can, as far as is known."""
        return next((Outage(*item) for item in self._outages.items()), None)

    # --- what is reported of it ------------------------------------------------------------------

    def report(self, report: ev.WorkerReport, now: float) -> bool:
        """Take a report; False when it is stale, doubled or forged, and has changed nothing."""
        state = after_report(self.state, report)
        if state is None:
            return False
        if self._has_said(report):
            return False  # what does not change its state
        if self.state is State.SUSPECT and state is not State.SUSPECT:
            self._tell_hung("", "it went on before they had come", now)
        self.state = state
        match report:
            case ev.WorkerBorn():
                self._born(report.pid, now)
            case ev.WorkerNotBorn():
                self._not_born(report)
            case ev.WorkerRegistered():
                self._registered(now)
            case ev.WorkerReady():
                self._ready(now)
            case ev.WorkerDelayed():
                self.due = max(self.due, now + report.seconds)
                self.ends_by = self.ends_by if self.ends_by == NEVER else self.due
            case ev.WorkerAcknowledged():
                self._acknowledged(now)
            case ev.WorkerDrained():
                self._drained(report, now)
            case ev.WorkerFailed():
                self._raised(report, now)
            case ev.WorkerUnreachable() | ev.WorkerReachable():
                self._reaches(report)
            case ev.WorkerLeaving():
                self.leaving = report.why
                self.cancel(self._terms.notice(now, report.why), now)
            case ev.StacksTaken():
                self._stacks_taken(report, now)
            case ev.WorkerSeen():
                self._seen(report, now)
            case ev.WorkerExited():
                self._exited(report, now)
            case _:
                assert_never(report)
        return True

    def _has_said(self, report: ev.WorkerReport) -> bool:
        match report:
            case ev.WorkerFailed():
                return Step.FAILED in self.history
            case ev.WorkerUnreachable():
                return report.pool in self._outages
            case ev.WorkerReachable():
                return report.pool not in self._outages
            case _:
                return False

    def _reaches(self, report: ev.WorkerUnreachable | ev.WorkerReachable) -> None:
        if isinstance(report, ev.WorkerUnreachable):
            self._outages[report.pool] = report.error
        else:
            self._outages.pop(report.pool)

    def _stacks_taken(self, report: ev.StacksTaken, now: float) -> None:
        if self.state is State.SUSPECT:
            self._bring_down(report.stacks, report.missing, now)
        else:
            self._kill(report, now)

    def _born(self, pid: int, now: float) -> None:
        self.pid = pid
        self.history[Step.SPAWNED] = now
        self._announce("worker.spawned", **({"reason": self.reason} if self.reason else {}))
        if self.state is State.EVICTED:
            if self.deadline == NEVER:  # it was given up for being late, and here it is
                self._take(self._terms.notice(now, self.fault))
            # Born after its deadline it is due now, not long since: it is late, we are not.
            self.deadline = max(self.deadline, now)
            self._evict(now)

    def _not_born(self, report: ev.WorkerNotBorn) -> None:
        self.due = NEVER
        self.failed = report.by_application or bool(self.fault)
        self.cause = Cause.STARTUP if self.failed else Cause.NOT_BORN
        self.error = f"it {self.fault}: {report.why}" if self.fault else report.why
        if self.deadline == NEVER:  # else it was not wanted any more
            self._announce("worker.not_spawned", error=self.error)

    def _registered(self, now: float) -> None:
        self.history[Step.REGISTERED] = now
        if self.state is State.TERMINATING:
            self._send_cancel()

    def _ready(self, now: float) -> None:
        self.history[Step.READY] = self._watched_since = now  # until here ready_timeout counts
        self._look_later(now)
        self._announce("worker.ready", seconds=_round(now - self.spawned_at))

    def _acknowledged(self, now: float) -> None:
        self.history[Step.ACKNOWLEDGED] = now
        self.due = self.deadline
        self._announce("worker.acknowledged", **self._since_cancel(now))

    def _drained(self, report: ev.WorkerDrained, now: float) -> None:
        self.history[Step.DRAINED] = now
        self.reports = report.reports
        self.life = report.life
        if self.deadline == NEVER:  # its code has returned by itself
            self.deadline = now + self._terms.grace
        self.due = self.deadline
        self._announce("worker.drained", reports=report.reports, **self._since_cancel(now))

    def _raised(self, report: ev.WorkerFailed, now: float) -> None:
        self.history[Step.FAILED] = now
        if Step.HUNG not in self.history:
            self.fault = "failed"
        self.error = report.error
        self._outages.clear()  # what it says by this is more exact
        if report.pool:
            self._outages[report.pool] = report.error
        if self.state is State.FAILING:  # nobody has told it to end: it drains itself
            self.deadline = self.due = now + self._terms.grace
        pool = {"pool": report.pool} if report.pool else {}
        self._announce("worker.failed", error=report.error, traceback=report.traceback, **pool)

    def _exited(self, report: ev.WorkerExited, now: float) -> None:
        self.history[Step.EXITED] = now
        self.due = NEVER
        did_as_told = Step.CANCELLED in self.history and report.signal == self._stop_signal
        self._look_for_a_daemon(report)
        hung = Step.HUNG in self.history
        died = report.signal is not None and not did_as_told
        self.failed = bool(report.code) or died or bool(self.fault)
        self.cause = cause_of(
            failed=self.failed,
            was_ready=Step.READY in self.history,
            # To die of the signal that it was told to end by, for a fault of its own, is that fault.
            signal=None if did_as_told and self.fault else report.signal,
            is_ours=bool(self.kill_reason),
            by_memory=self.by_memory,
            hung=hung,
            for_dependency=self.outage is not None,
        )
        self.by_job = self._died_of_a_job(report)
        by_itself = report.signal is None or report.signal in CRASHES
        self.crashed_itself = self.by_job and not hung and by_itself
        how = {"code": report.code} if report.signal is None else {"signal": report.signal}
        ((what, number),) = how.items()
        self.ending = f"it ended with {what} {number}"
        details = {
            "reason": self.fault,
            "cause": self._cause_shown(died),
            "cancel_cause": self._cause,
            "why": self.kill_reason,
            "error": self.error,
            "leftovers": list(report.leftovers),
            "stacks": report.stacks,
            "has_stacks": self._has_stacks or bool(report.stacks),
            **self._durations(now),
            "in_flight": told(report.jobs, now),
            "jobs": self.life.get("jobs"),
            "in_stop": self.life.get("in_stop"),
            "pools": self._pools_at_the_end(),
            "max_rss_bytes": report.max_rss_bytes,
            "cpu_seconds": _round(report.cpu_seconds),
        }
        self._announce(
            "worker.exited",
            **how,
            uptime_seconds=_round(now - self.spawned_at),
            **{name: value for name, value in details.items() if value},
        )

    def _look_for_a_daemon(self, report: ev.WorkerExited) -> None:
        """Say so where a program has left itself running, and ended to let its caller go on.

        Where it is always restarted that is a failure: it would come up for ever, and never stay.
        """
        told_to = Step.CANCELLED in self.history or self.fault
        if not self._program or told_to or report.code != 0 or not report.leftovers:
            return
        self.error = f"it went into the background (left running: {report.leftovers[0]}); {_REMEDY}"
        if self._program is Restart.ALWAYS:
            self.fault = "went into the background"

    def _died_of_a_job(self, report: ev.WorkerExited) -> bool:
        """Tell whether a job in flight is the only thing known that it can have died of."""
        if Step.HUNG in self.history:
            return True
        return bool(report.jobs) and not any(step in self.history for step in _LAST_WORDS)

    def _durations(self, now: float) -> dict[str, float]:
        """Return how long each part of its life took, as far as it has come."""
        took = self.history
        ends = (
            ("ready_seconds", self.spawned_at, took.get(Step.READY)),
            ("serving_seconds", took.get(Step.READY), self._first(*_ENDS_SERVICE) or now),
            ("drain_seconds", took.get(Step.CANCELLED), took.get(Step.DRAINED)),
            ("exit_seconds", took.get(Step.DRAINED) or took.get(Step.KILLED), now),
        )
        return {
            name: _round(end - begin)
            for name, begin, end in ends
            if begin is not None and end is not None
        }

    def _first(self, *steps: Step) -> float | None:
        return min((self.history[step] for step in steps if step in self.history), default=None)

    def _pools_at_the_end(self) -> dict[str, dict[str, Any]]:
        """Return of each pool how it was used, and how many connections were closed and lost."""
        used = self.life.get("pools", {})
        return {
            pool: {**use, "closed": report["closed"], "leaked": len(report["leaked"])}
            for pool, use in used.items()
            if (report := self.reports.get(pool)) is not None
        }

    def _cause_shown(self, died: bool) -> str:
        """Return why it ended, "" where it was told to, or has done what it was for."""
        told_to = Step.CANCELLED in self.history or self.kill_reason
        by_others = died and self.cause in {Cause.KILLED, Cause.MEMORY}  # also while it drained
        is_plain = self.cause is Cause.RETURNED or (told_to and not self.fault and not by_others)
        return "" if is_plain else self.cause.value

    # --- what is decided about it ----------------------------------------------------------------

    def cancel(self, notice: Notice, now: float) -> None:
        """Have it end by the notice's deadline, or sooner where that was said before."""
        if self.state is State.SUSPECT:
            self._tell_hung("", "it was told to end before they had come", now)
        self._cancel(notice, now)

    def _cancel(self, notice: Notice, now: float) -> None:
        before, self.state = self.state, after_decision(self.state, Decision.CANCEL)
        hurried = self._take(notice)
        match self.state:
            case State.CANCELLING if before is not State.CANCELLING:
                self._announce_cancelled(now)
                self._send_cancel()
                self.due = min(now + RECEIPT_DUE, self.deadline)
            case State.EVICTED if before is State.STARTING:
                self._evict(now)
            case State.DOOMED if before is State.SPAWNING:
                self.due = min(now + RECEIPT_DUE, self.deadline)
            case State.CANCELLING | State.TERMINATING | State.DRAINING:
                self.due = min(self.due, self.deadline)
                if hurried:
                    self._send_cancel()
            case State.DOOMED | State.EVICTED | State.DRAINED:
                self.due = min(self.due, self.deadline)
            case _:
                pass  # given up, or out of time: there is nothing left to hurry

    def take(self, terms: Terms) -> None:
        """Have other terms for what is decided from now on."""
        self._terms = terms

    def time_passed(self, now: float) -> None:
        """Take every step that is due; afterwards the next one lies in the future."""
        while self.due <= now:
            self._next_step(now)

    def excuse(self, seconds: float, now: float) -> None:
        """Leave out of account that the supervisor stood still for so long.

        Whatever was due is due that much later, and not before the worker has had the time of a
        receipt in which to be heard.
        """
        earliest = now + RECEIPT_DUE
        if now - self._watched_since >= 2 * self._hang_timeout:
            self._watched_since = now
        if self.due < NEVER:
            self.due = max(self.due + seconds, earliest)
        self.deadline = max(self.deadline + seconds, earliest)
        self.ends_by = max(self.ends_by + seconds, earliest)

    def _next_step(self, now: float) -> None:
        match self.state:
            case State.SPAWNING:
                self.fault = self._late("was not spawned")
                self._give_up()
            case State.DOOMED:
                self._give_up()
            case State.STARTING:
                self.fault = self._late("did not say hello")
                self.deadline = now
                self._take_stacks(now)
            case State.REGISTERED:
                must_end = self.ends_by < NEVER
                self.fault = self._late("did not end" if must_end else "was not ready")
                self.cancel(self._terms.notice(now, self.fault), now)
            case State.READY if self.ends_by <= now:
                self.fault = self._late("did not end")
                self.cancel(self._terms.notice(now, self.fault), now)
            case State.READY:
                self._look_later(now)  # unless what is seen says otherwise
                self._outbox.append(ac.Look(self.id))
            case State.SUSPECT:
                self._bring_down("", _LATE_STACKS, now)
            case State.CANCELLING if now < self.deadline:
                self._terminate(now)
            case State.DUMPING:
                self._kill(ev.StacksTaken(self.id, "", _LATE_STACKS), now)
            case _:
                self._take_stacks(now)

    def _seen(self, report: ev.WorkerSeen, now: float) -> None:
        """Settle when to look again, or that it hangs."""
        self._look_later(now)
        if report.halted:
            if not self._halted:
                self._announce("worker.stopped", why=report.halted, jobs=told(report.jobs, now))
        else:
            if self._halted:
                self._watched_since = now
                self._announce("worker.continued")
            self._judge(report.jobs, now)
        self._halted = report.halted

    def _look_later(self, now: float) -> None:
        self.due = min(now + self._hang_timeout if self._hang_timeout else NEVER, self.ends_by)

    def _judge(self, jobs: tuple[JobSeen, ...], now: float) -> None:
        limits = [
            (limit_of(job, self._hang_timeout, self._watched_since), job.since, place)
            for place, job in enumerate(jobs)
        ]
        limit, _, first = min(limits, default=(NEVER, 0.0, 0))
        if limit <= now:
            self._suspect(jobs[first], jobs, now)
        else:
            self.due = min(self.due, limit)

    def _suspect(self, job: JobSeen, jobs: tuple[JobSeen, ...], now: float) -> None:
        self.state = after_decision(self.state, Decision.SUSPECT)
        self.history[Step.HUNG] = now
        since = f"its job {job.name!r} is in flight for {now - job.since:.3g} s"
        allowed = f"{self._hang_timeout:g} s are allowed"
        if job.until > job.since + self._hang_timeout:
            allowed = f"it was to be busy until {now - job.until:.3g} s ago"
        self.fault = f"hung: {since}, and {allowed}"
        self._overdue = jobs
        self.due = now + SUSPECT_STACKS_DUE
        self._outbox.append(ac.TakeStacks(self.id, SUSPECT_STACKS_DUE))

    def _bring_down(self, stacks: str, missing: str, now: float) -> None:
        """Tell that it hangs, and have it end."""
        self._tell_hung(stacks, missing, now)
        self._cancel(self._terms.notice(now, "hang"), now)

    def _give_up(self) -> None:
        self.state = after_decision(self.state, Decision.GIVE_UP)
        self.due = NEVER
        self._outbox.append(ac.Kill(self.id))

    def _evict(self, now: float) -> None:
        self._announce_cancelled(now)
        self.history[Step.TERMINATED] = now
        self.due = self.deadline
        self._outbox.append(ac.Terminate(self.id))

    def _terminate(self, now: float) -> None:
        self.state = after_decision(self.state, Decision.TERMINATE)
        self.history[Step.TERMINATED] = now
        self.due = self.deadline
        self._outbox.append(ac.Terminate(self.id))

    def _take_stacks(self, now: float) -> None:
        self.state = after_decision(self.state, Decision.TAKE_STACKS)
        self.history[Step.STACKS] = now
        self.due = now + STACKS_DUE
        self._outbox.append(ac.TakeStacks(self.id, STACKS_DUE))

    def _kill(self, report: ev.StacksTaken, now: float) -> None:
        self.state = after_decision(self.state, Decision.KILL)
        self.history[Step.KILLED] = now
        self.due = NEVER
        self.kill_reason = self._why_killed()
        self._has_stacks |= bool(report.stacks)
        self._announce(
            "worker.killed",
            why=self.kill_reason,
            ladder=self._ladder(),
            jobs=told(report.jobs or (), now),
            stacks=report.stacks,
            **({"stacks_missing": report.missing} if report.missing else {}),
            **({"jobs_missing": _NO_WORDS} if report.jobs is None else {}),
        )
        self._outbox.append(ac.Kill(self.id))

    # --- what it is told --------------------------------------------------------------------------

    def _take(self, notice: Notice) -> bool:
        """Settle the deadline; False when what has been said before leaves no more time."""
        before = (self.deadline, self._abort_margin)
        self.deadline = min(self.deadline, notice.deadline)
        self._abort_margin = max(self._abort_margin, notice.abort_margin)
        self._cause = self._cause or notice.cause
        return (self.deadline, self._abort_margin) != before

    def _send_cancel(self) -> None:
        abort_at = self.deadline - self._abort_margin
        self._outbox.append(ac.SendCancel(self.id, self.deadline, abort_at, self._cause))

    # --- what is told of it -----------------------------------------------------------------------

    def _announce(self, event: str, **fields: Any) -> None:
        self._outbox.append(ac.Announce(event, self.who | fields))

    def _tell_hung(self, stacks: str, missing: str, now: float) -> None:
        self._has_stacks |= bool(stacks)
        self._announce(
            "worker.hung",
            why=f"it {self.fault}",
            jobs=told(self._overdue, now),
            stacks=stacks,
            **({"stacks_missing": missing} if missing else {}),
        )

    def _announce_cancelled(self, now: float) -> None:
        self.history[Step.CANCELLED] = now
        left = _round(self.deadline - now)
        self._announce("worker.cancelled", cause=self._cause, grace_seconds=left)

    def _since_cancel(self, now: float) -> dict[str, float]:
        cancelled = self.history.get(Step.CANCELLED)
        return {} if cancelled is None else {"seconds": _round(now - cancelled)}

    def _late(self, what: str) -> str:
        return f"{what} within {self._ready_timeout:g} s"

    def _ladder(self) -> list[tuple[str, float]]:
        """Return the steps since it was to end, each with the seconds since the first of them."""
        steps = [item for item in self.history.items() if item[0] not in _BEFORE_THE_LADDER]
        began = steps[0][1]
        return [(step.value, _round(at - began)) for step, at in steps]

    def _why_killed(self) -> str:
        """Say the last thing that it did as it should, what is missing, and since when."""
        if Step.DRAINED in self.history:
            what = "it said that it was drained but did not exit"
        elif Step.ACKNOWLEDGED in self.history:
            what = "it acknowledged the cancel but did not drain by its deadline"
        elif Step.CANCELLED in self.history:
            heard = Step.REGISTERED in self.history
            missing = "acknowledge the cancel" if heard else "say hello"
            what = f"it did not {missing} and did not end by its deadline"
        elif Step.FAILED in self.history:
            what = "its code raised and it did not end by its deadline"
        else:
            return f"it {self.fault}"
        if Step.HUNG in self.history:
            what = f"it {self.fault}; {what}"
        ladder = self._ladder()
        return f"{what}: {ladder[-1][1]:.3g} s after {ladder[0][0]}"


def _round(seconds: float) -> float:
    return round(seconds, 6)
