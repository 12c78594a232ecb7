"""Anything in any order: the fleet beside a simulated world, and what must hold whatever happens.

The world has processes that are born late or never, serve, raise, die, go mute, lie, double and
delay what they say; whose jobs take long, with and without a word of it; who are stopped and
continued; strangers; clocks that jump; stops at any time. It carries out what the fleet
wants as a kernel would: SIGKILL is honoured, SIGTERM may be ignored. Every invariant is a method
whose name says it, and is checked on each action as it is carried out, or after each event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import STACKS_DUE, STOOD_STILL, STOP_NOW_GRACE, Fleet, GroupSpec, Phase
from supervisor.core.jobs import JobSeen
from supervisor.core.lifecycle import State
from supervisor.core.policy import Restart, RestartPolicy

NEVER = float("inf")
TOLERANCE = 1e-6  # what is announced is rounded to microseconds

# The order of one worker's events, each at most once; a worker may raise at any time.
ORDER = [
    "worker.spawned",
    "worker.ready",
    "worker.hung",
    "worker.cancelled",
    "worker.acknowledged",
    "worker.drained",
    "worker.killed",
    "worker.exited",
]
REPORTS: list[Callable[[str], ev.Event]] = [
    ev.WorkerRegistered,
    ev.WorkerReady,
    ev.WorkerAcknowledged,
    ev.WorkerDrained,
    lambda worker: ev.WorkerFailed(worker, "ValueError", "Traceback"),
    lambda worker: ev.WorkerLeaving(worker, "SIGTERM from outside"),
    lambda worker: ev.WorkerFailed(worker, "PoolTimeout", "Traceback", "main"),
    lambda worker: ev.WorkerUnreachable(worker, "main", "refused"),
    lambda worker: ev.WorkerUnreachable(worker, "other", "refused"),
    lambda worker: ev.WorkerReachable(worker, "main"),
    lambda worker: ev.StacksTaken(worker, "stacks"),
]


@dataclass
class Process:
    """What the world knows of one worker, from what was asked for and what it did itself."""

    worker: str
    group: str
    ready_due: float
    pid: int | None = None
    said_hello: bool = False
    given_up: bool = False  # killed before it was born
    kill_sent: bool = False
    ended: bool = False
    told: list[str] = field(default_factory=list)  # its events
    signals: list[str] = field(default_factory=list)  # what was sent to it, in order
    cancels: list[float] = field(default_factory=list)  # its deadlines, less the slack by then
    may_die_at: float = NEVER  # no kill before; the world's own reckoning
    stacks_asked_at: float = NEVER
    stacks_came: bool = False
    serves_since: float = NEVER
    jobs: list[JobSeen] = field(default_factory=list)
    halted: bool = False


class World(RuleBasedStateMachine):
    """The fleet under test, and everything around it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.processes: dict[str, Process] = {}
        self.waited_for: list[str] = []  # the WaitGroup, kept by hand
        self.finishes: list[ac.Finish] = []
        self.events: list[str] = []
        self.stopping = False
        self.killed_in_stop = False
        self.slack = 0.0  # time that was given back after the supervisor stood still
        self.has_excused = False
        self.oom_kills = 7
        self.failed: dict[str, ac.Announce] = {}  # groups that have failed and not recovered
        self.waiting: set[str] = set()  # groups that were said to wait
        self.fleet: Any = None

    @initialize(
        groups=st.lists(
            st.tuples(
                st.sampled_from([2, 1, 3, 0]),
                st.sampled_from(Restart),
                st.integers(0, 4),
                st.sampled_from([0.0, 0.1, 5.0]),
                st.sampled_from([30.0, 2.0]),
                st.booleans(),
                st.sampled_from([5.0, 0.0, 0.4]),
            ),
            min_size=1,
            max_size=2,
        ),
        grace=st.sampled_from([30.0, 2.0, 0.3, 0.0]),
        margin=st.sampled_from([0.0, 0.25, 1.0]),
        draw=st.floats(0.0, 1.0),
        peace=st.sampled_from([20, 5, 0, 40]),
    )
    def start(
        self, groups: list[Any], grace: float, margin: float, draw: float, peace: int
    ) -> None:
        """Set up the groups and start them; `peace` is how much happens before a stop may come."""
        self.grace = grace
        self.peace = peace
        self.specs = {
            f"g{n}": GroupSpec(
                f"g{n}",
                count,
                RestartPolicy(restart, restarts, 60.0, backoff),
                timeout,
                exit_,
                hang_timeout=hang,
            )
            for n, (count, restart, restarts, backoff, timeout, exit_, hang) in enumerate(groups)
        }
        self.fleet = Fleet(
            tuple(self.specs.values()),
            grace=grace,
            abort_margin=grace * margin,
            draw=lambda: draw,
            oom_kills=self.oom_kills,
        )
        self.carry_out(self.fleet.start(self.now))

    # --- what can happen -------------------------------------------------------------------------

    def backs_off(self) -> bool:
        """Tell whether every group has a back-off as long as the default."""
        return all(spec.policy.backoff >= 0.1 for spec in self.specs.values())

    def pick(self, index: int, wanted: Callable[[Process], bool]) -> Process:
        found = [process for process in self.processes.values() if wanted(process)]
        return found[index % len(found)]

    def some(self, wanted: Callable[[Process], bool]) -> bool:
        return any(wanted(process) for process in self.processes.values())

    @precondition(lambda self: self.some(is_unborn))
    @rule(index=st.integers(0, 9))
    def birth(self, index: int) -> None:
        process = self.pick(index, is_unborn)
        process.pid = 1 + len(self.events)
        self.happens(ev.WorkerBorn(process.worker, process.pid))

    @precondition(lambda self: self.some(is_unborn))
    @rule(index=st.integers(0, 9), by_application=st.booleans())
    def no_birth(self, index: int, by_application: bool) -> None:
        process = self.pick(index, is_unborn)
        process.ended = True
        self.happens(ev.WorkerNotBorn(process.worker, "EAGAIN", by_application))

    @precondition(lambda self: self.some(is_unborn))
    @rule()
    def everybody_starts_well(self) -> None:
        while self.some(is_unborn):
            self.birth(0)
        while self.some(is_new):
            self.hello(0)
            self.goes_on(-1)

    @precondition(lambda self: self.some(is_new))
    @rule(index=st.integers(0, 9))
    def hello(self, index: int) -> None:
        process = self.pick(index, is_new)
        process.said_hello = True
        self.happens(ev.WorkerRegistered(process.worker))

    @precondition(lambda self: self.some(is_known))
    @rule(index=st.integers(-1, 9))
    def goes_on(self, index: int) -> None:
        """A worker does what it should do next, by what it has been told."""
        process = self.pick(index, is_known)
        if "worker.acknowledged" in process.told:
            self.happens(ev.WorkerDrained(process.worker, {"main": {"closed": 1, "leaked": []}}))
        elif process.cancels:
            self.happens(ev.WorkerAcknowledged(process.worker))
        else:
            self.happens(ev.WorkerReady(process.worker))

    @precondition(lambda self: self.some(is_known))
    @rule(index=st.integers(0, 9), seconds=st.sampled_from([0.1, 0.0, 0.9]))
    def somebody_else_sends_it_away(self, index: int, seconds: float) -> None:
        process = self.pick(index, is_known)
        self.happens(ev.WorkerLeaving(process.worker, "SIGTERM from outside"))
        self.now += seconds

    @precondition(lambda self: self.some(is_known))
    @rule(index=st.integers(0, 9))
    def its_code_raises(self, index: int) -> None:
        process = self.pick(index, is_known)
        self.happens(ev.WorkerFailed(process.worker, "ValueError", "Traceback"))

    @precondition(lambda self: self.some(is_known))
    @rule(index=st.integers(0, 9), pool=st.sampled_from(["main", "main", "other"]))
    def its_database_is_away(self, index: int, pool: str) -> None:
        process = self.pick(index, is_known)
        self.happens(ev.WorkerUnreachable(process.worker, pool, "refused"))

    @precondition(lambda self: self.some(is_known))
    @rule(index=st.integers(0, 9), code=st.sampled_from([1, 0]))
    def it_ends_for_want_of_its_database(self, index: int, code: int) -> None:
        process = self.pick(index, is_known)
        self.happens(ev.WorkerFailed(process.worker, "PoolTimeout", "Traceback", "main"))
        self.ends(process, code=code)

    @precondition(lambda self: self.some(is_alive))
    @rule(index=st.integers(0, 9))
    def the_machine_runs_out_of_memory(self, index: int) -> None:
        process = self.pick(index, is_alive)
        self.oom_kills += 1
        self.ends(process, signal=9, oom_kills=self.oom_kills)

    @precondition(lambda self: self.some(is_alive))
    @rule(index=st.integers(0, 9))
    def somebody_else_kills_it(self, index: int) -> None:
        self.ends(self.pick(index, is_alive), signal=9, oom_kills=self.oom_kills)

    @precondition(lambda self: self.backs_off())
    @rule(for_database=st.booleans())
    def for_twelve_seconds_every_start_fails(self, for_database: bool) -> None:
        before = len(self.processes)
        end = self.now + 12.0
        while self.fleet.phase not in (Phase.STOPPING, Phase.STOPPED):
            for process in [p for p in self.processes.values() if is_unborn(p)]:
                process.pid = 1 + len(self.events)
                self.happens(ev.WorkerBorn(process.worker, process.pid))
            for process in [p for p in self.processes.values() if is_new(p)]:
                process.said_hello = True
                self.happens(ev.WorkerRegistered(process.worker))
                if for_database:
                    self.happens(ev.WorkerUnreachable(process.worker, "main", "refused"))
                self.ends(process, code=1)
            self.starts_that_fail_are_bounded(len(self.processes) - before)
            due = self.fleet.next_deadline()
            if self.some(is_unborn):
                continue
            if due is None or due >= end:
                break
            self.now = max(self.now, due)
            self.time_passes()

    @precondition(lambda self: self.some(is_known))
    @rule(index=st.integers(0, 9), busy=st.sampled_from([None, 0.0, 20.0]))
    def it_begins_a_job(self, index: int, busy: float | None) -> None:
        """Perhaps one that says until when it will be busy."""
        until = 0.0 if busy is None else self.now + busy
        self.pick(index, is_known).jobs.append(JobSeen("job", self.now, until))

    @precondition(lambda self: self.some(self.is_watched))
    @rule(
        index=st.integers(0, 9),
        busy=st.sampled_from([None, 20.0, 0.0]),
        turns=st.integers(1, 6),
        answers=st.booleans(),
    )
    def its_job_takes_long(self, index: int, busy: float | None, turns: int, answers: bool) -> None:
        """Nothing else happens in the next turns of the loop, which are in time."""
        process = self.pick(index, self.is_watched)
        process.jobs.append(JobSeen("long", self.now, 0.0 if busy is None else self.now + busy))
        for _ in range(turns):
            due = self.fleet.next_deadline()
            if due is not None:
                self.now = max(self.now, due)
                self.time_passes()
            if answers and is_suspect(process):
                self.happens(ev.StacksTaken(process.worker, "stacks"))

    @precondition(lambda self: self.some(lambda process: process.jobs))
    @rule(index=st.integers(0, 9))
    def its_jobs_end(self, index: int) -> None:
        self.pick(index, lambda process: bool(process.jobs)).jobs.clear()

    @precondition(lambda self: self.some(is_known))
    @rule(index=st.integers(0, 9))
    def somebody_stops_or_continues_it(self, index: int) -> None:
        process = self.pick(index, is_known)
        process.halted = not process.halted

    @precondition(lambda self: self.some(is_suspect))
    @rule(index=st.integers(0, 9))
    def its_stacks_come(self, index: int) -> None:
        self.happens(ev.StacksTaken(self.pick(index, is_suspect).worker, "stacks"))

    @precondition(lambda self: self.some(is_alive))
    @rule(
        index=st.integers(0, 9),
        how=st.sampled_from([{"code": 0}, {"code": 1}, {"signal": 11}, {"signal": 15}]),
    )
    def end(self, index: int, how: dict[str, int]) -> None:
        self.ends(self.pick(index, is_alive), **how)

    @precondition(lambda self: self.some(lambda process: process.kill_sent and not process.ended))
    @rule(index=st.integers(0, 9))
    def the_kernel_kills(self, index: int) -> None:
        process = self.pick(index, lambda process: process.kill_sent and not process.ended)
        self.ends(process, signal=9)

    @precondition(lambda self: self.processes)
    @rule(index=st.integers(0, 99), what=st.sampled_from(REPORTS))
    def anybody_says_anything(self, index: int, what: Callable[[str], ev.Event]) -> None:
        """Out of turn, again, after its end, before its birth: whatever can be put on a wire."""
        self.happens(what(self.pick(index, lambda _: True).worker))

    @rule(what=st.sampled_from(REPORTS), name=st.sampled_from(["", "g0", "g0-0", "x-1", "g9-9"]))
    def a_stranger_says_anything(self, what: Callable[[str], ev.Event], name: str) -> None:
        self.happens(what(name))

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.2, 1.0, 7.0, 45.0]))
    def the_clock_goes_on(self, seconds: float) -> None:
        """And nobody looks at it: what happens next is handled late."""
        self.now += seconds

    @rule(late=st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.001, 0.5, 1.0, 100.0]))
    def time_comes(self, late: float) -> None:
        """The next deadline is reached, or overslept."""
        due = self.fleet.next_deadline()
        if due is not None:
            self.now = max(self.now, due + late)
        self.time_passes()

    @rule()
    def time_is_looked_at(self) -> None:
        self.time_passes()

    @precondition(lambda self: len(self.events) >= self.peace)
    @rule(grace=st.none() | st.sampled_from([0.0, 0.5, 10.0, 100.0]))
    def stop(self, grace: float | None) -> None:
        self.told_to_stop(self.grace if grace is None else grace)
        self.happens(ev.StopRequested("SIGTERM", grace))

    @precondition(lambda self: len(self.events) >= self.peace)
    @rule()
    def stop_now(self) -> None:
        self.told_to_stop(STOP_NOW_GRACE)
        self.happens(ev.StopNowRequested("SIGQUIT"))

    # --- how the world carries on -----------------------------------------------------------------

    def ends(self, process: Process, **how: Any) -> None:
        process.ended = True
        self.happens(ev.WorkerExited(process.worker, **how))

    def told_to_stop(self, grace: float) -> None:
        if self.fleet.phase is not Phase.STOPPED:
            self.stopping = True
            for process in self.processes.values():
                self.may_die(process, grace)

    def may_die(self, process: Process, after: float) -> None:
        """Note that this worker may be killed in so many seconds, if not sooner."""
        process.may_die_at = min(process.may_die_at, self.now + after)

    def happens(self, event: ev.Event) -> None:
        process = self.processes.get(getattr(event, "worker", ""))
        if isinstance(event, ev.StacksTaken) and process is not None:
            process.stacks_came = True
        before, excused_before = self.observed(), self.has_excused
        actions = self.handed_over(event)
        if self.has_excused is excused_before:
            self.the_dead_and_strangers_change_nothing(event, before, actions)
        self.carry_out(actions)
        self.what_is_said_twice_changes_nothing(event)

    def time_passes(self) -> None:
        self.carry_out(self.handed_over(ev.TimePassed()))
        self.after_time_has_passed_the_next_deadline_lies_ahead()

    def handed_over(self, event: ev.Event) -> list[ac.Action]:
        """Hand over one event, and keep the books about a supervisor that comes late."""
        late = self.now - self.first_due()
        actions: list[ac.Action] = self.fleet.handle(event, self.now)
        if late >= STOOD_STILL and not self.has_excused:
            self.has_excused = True
            self.slack += late + 1.0
            self.who_stood_still_judges_nobody(event, actions)
        elif late >= 0 and isinstance(event, ev.TimePassed):
            self.has_excused = False
        return actions

    def first_due(self) -> float:
        """Return when the first worker is to be judged; restarts are nobody's judgement."""
        return min((worker.due for worker in self.fleet._workers.values()), default=NEVER)

    def observed(self) -> Any:
        return (self.fleet.snapshot(), self.fleet.next_deadline())

    def carry_out(self, actions: list[ac.Action]) -> None:
        for action in actions:
            match action:
                case ac.Spawn():
                    self.spawned(action)
                case ac.Announce():
                    self.announced(action)
                case ac.Look():
                    self.looked_at(action)
                case ac.Finish():
                    self.finishes.append(action)
                    self.the_supervisor_ends_once_and_after_everybody()
                    self.the_exit_code_tells_of_kills_and_failed_groups(action)
                case _:
                    self.signalled(action)

    def spawned(self, action: ac.Spawn) -> None:
        self.nobody_is_spawned_in_a_stop(action)
        self.no_name_is_used_twice(action)
        due = self.now + self.specs[action.group].ready_timeout
        self.processes[action.worker] = Process(action.worker, action.group, due)
        self.waited_for.append(action.worker)

    def looked_at(self, action: ac.Look) -> None:
        """As the loop does: the answer comes at once."""
        process = self.processes[action.worker]
        self.nobody_is_looked_at_in_vain(process)
        halted = "it is stopped (SIGSTOP)" if process.halted else ""
        self.happens(ev.WorkerSeen(process.worker, tuple(process.jobs), halted))

    def announced(self, action: ac.Announce) -> None:
        self.events.append(action.event)
        worker = action.fields.get("worker")
        if action.event.startswith("group."):
            self.group_changed(action)
        if action.event == "supervisor.stopping":
            self.told_to_stop(action.fields["grace_seconds"])
        if not action.event.startswith("worker."):
            return
        assert worker is not None
        process = self.processes[worker]
        self.every_event_says_who_it_is_about(action, process)
        self.events_of_a_worker_come_in_order_and_once(action.event, process)
        process.told.append(action.event)
        if action.event == "worker.ready":
            process.serves_since = self.now
        if action.event == "worker.cancelled":
            self.may_die(process, action.fields["grace_seconds"])
        if action.event in {"worker.failed", "worker.drained"}:  # by itself, or in a cancel's time
            self.may_die(process, self.grace)
        if action.event in {"worker.drained", "worker.exited", "worker.not_spawned"}:
            self.count_down(worker)

    def group_changed(self, action: ac.Announce) -> None:
        name = action.fields["group"]
        if action.event == "group.failed":
            self.waiting_never_becomes_failed(action)
            self.failed[name] = action
            self.waiting.discard(name)
        elif action.event == "group.probing":
            assert name in self.failed
        elif action.event == "group.waiting":
            assert name not in self.failed
            self.waiting.add(name)
        elif action.event == "group.recovered" and action.fields["was"] == "failed":
            self.who_has_failed_recovers_by_a_proof_and_not_for_good(self.failed.pop(name))
        elif action.event == "group.recovered":
            self.waiting.remove(name)

    def count_down(self, worker: str) -> None:
        if worker in self.waited_for:
            self.waited_for.remove(worker)

    def signalled(self, action: ac.Action) -> None:
        process = self.processes[action.worker]  # type: ignore[union-attr]
        if process.pid is None:
            self.the_unborn_are_given_up_once(action, process)
            process.given_up = True
            return
        self.nobody_signals_the_dead(action, process)
        self.cancel_before_term_before_kill_each_once(action, process)
        match action:
            case ac.SendCancel():
                self.a_deadline_is_never_put_off(action, process)
                process.cancels.append(action.deadline - self.slack)
            case ac.TakeStacks() if self.state_of(process) is State.SUSPECT:
                self.nobody_is_suspected_before_its_time(process)
                process.signals.append("Suspect")
                return
            case ac.TakeStacks():
                self.nobody_is_killed_before_its_deadline(process)
                process.stacks_asked_at = self.now
                process.stacks_came = False
            case ac.Kill():
                self.nobody_is_killed_before_its_stacks_had_their_time(process)
                process.kill_sent = True
                self.killed_in_stop = self.killed_in_stop or self.stopping
        process.signals.append(type(action).__name__)

    def state_of(self, process: Process) -> State:
        return self.fleet._workers[process.worker].state  # type: ignore[no-any-return]

    def hang_timeout_of(self, process: Process) -> float:
        return self.specs[process.group].hang_timeout

    def is_watched(self, process: Process) -> bool:
        watched = is_known(process) and self.hang_timeout_of(process) > 0.0
        return watched and self.state_of(process) is State.READY

    # --- what must hold on each action -----------------------------------------------------------

    def nobody_is_spawned_in_a_stop(self, action: ac.Spawn) -> None:
        assert not self.stopping, action

    def no_name_is_used_twice(self, action: ac.Spawn) -> None:
        assert action.worker not in self.processes

    def the_supervisor_ends_once_and_after_everybody(self) -> None:
        assert len(self.finishes) == 1
        assert [p for p in self.processes.values() if not p.ended] == []
        assert self.events.count("supervisor.stopped") == 1

    def the_exit_code_tells_of_kills_and_failed_groups(self, finish: ac.Finish) -> None:
        failed = {group.name for group in self.fleet.snapshot().groups if group.failure}
        assert failed <= set(self.failed)  # the others were asked to restart
        assert finish.exit_code == int(self.killed_in_stop or bool(failed))

    def waiting_never_becomes_failed(self, action: ac.Announce) -> None:
        """Save where a worker is never to be restarted: that is taken at its word."""
        rules = self.fleet._groups[action.fields["group"]].spec.policy
        assert action.fields["cause"] != "dependency" or rules.restart is Restart.NEVER

    def who_has_failed_recovers_by_a_proof_and_not_for_good(self, failed: ac.Announce) -> None:
        assert failed.fields["next_try_seconds"] is not None

    def starts_that_fail_are_bounded(self, spawns: int) -> None:
        """Each place may have had a restart coming; then each group has one who tries for all."""
        places = sum(spec.count for spec in self.specs.values())
        assert spawns <= places + 5 * len(self.specs), spawns

    def every_event_says_who_it_is_about(self, action: ac.Announce, process: Process) -> None:
        who = {key: action.fields[key] for key in ("worker", "group", "pid", "generation")}
        assert who == {
            "worker": process.worker,
            "group": process.group,
            "pid": process.pid,
            "generation": 1,
        }

    def events_of_a_worker_come_in_order_and_once(self, event: str, process: Process) -> None:
        told = process.told
        if event in {"worker.stopped", "worker.continued"}:
            self.stopped_and_continued_take_turns(event, process)
            return
        assert event not in told, (told, event)
        assert "worker.exited" not in told
        assert "worker.not_spawned" not in told
        assert event in {"worker.spawned", "worker.not_spawned"} or "worker.spawned" in told
        if event in ORDER:
            last = [ORDER.index(old) for old in told if old in ORDER]
            assert ORDER.index(event) > max(last, default=-1), (told, event)
        if event == "worker.acknowledged":
            assert "worker.cancelled" in told

        if event == "worker.hung":
            assert "Suspect" in process.signals

    def stopped_and_continued_take_turns(self, event: str, process: Process) -> None:
        before = [old for old in process.told if old in {"worker.stopped", "worker.continued"}]
        assert (event == "worker.stopped") == (len(before) % 2 == 0)
        assert process.halted == (event == "worker.stopped")

    def nobody_is_looked_at_in_vain(self, process: Process) -> None:
        assert self.hang_timeout_of(process)
        assert self.state_of(process) is State.READY

    def nobody_is_suspected_before_its_time(self, process: Process) -> None:
        timeout = self.hang_timeout_of(process)
        assert "Suspect" not in process.signals
        assert not process.halted
        assert self.now >= process.serves_since + timeout - TOLERANCE
        assert [
            job
            for job in process.jobs
            if self.now >= max(job.since + timeout, job.until) - TOLERANCE
        ]

    def the_unborn_are_given_up_once(self, action: ac.Action, process: Process) -> None:
        assert isinstance(action, ac.Kill)
        assert not process.given_up
        assert not process.ended
        assert self.now >= process.ready_due or self.stopping

    def nobody_signals_the_dead(self, action: ac.Action, process: Process) -> None:
        assert not process.ended, action

    def cancel_before_term_before_kill_each_once(self, action: ac.Action, process: Process) -> None:
        name, sent = type(action).__name__, process.signals
        match action:
            case ac.SendCancel():
                assert "TakeStacks" not in sent
                assert "worker.cancelled" in process.told
            case ac.Terminate():
                assert name not in sent
                assert "TakeStacks" not in sent
                assert "worker.cancelled" in process.told
            case ac.TakeStacks():
                assert name not in sent
                assert "Kill" not in sent
            case ac.Kill():
                assert name not in sent
                assert "TakeStacks" in sent
                assert process.told[-1] == "worker.killed"

    def a_deadline_is_never_put_off(self, action: ac.SendCancel, process: Process) -> None:
        assert action.abort_at <= action.deadline
        assert action.deadline - self.slack <= min(process.cancels, default=NEVER) + TOLERANCE

    def nobody_is_killed_before_its_deadline(self, process: Process) -> None:
        earliest = process.may_die_at
        assert "worker.hung" not in process.told or "worker.ready" in process.told
        if not {"worker.ready", "worker.cancelled", "worker.failed"} & set(process.told):
            earliest = min(earliest, process.ready_due)  # it has not said hello in time
        assert self.now >= earliest - 2 * TOLERANCE, (self.now, earliest)

    def nobody_is_killed_before_its_stacks_had_their_time(self, process: Process) -> None:
        waited = self.now - process.stacks_asked_at
        assert process.stacks_came or waited >= STACKS_DUE - TOLERANCE

    def who_stood_still_judges_nobody(self, event: ev.Event, actions: list[ac.Action]) -> None:
        judged = [a for a in actions if isinstance(a, ac.Kill | ac.TakeStacks | ac.Terminate)]
        assert judged == [] or not isinstance(event, ev.TimePassed)
        assert self.first_due() >= self.now

    # --- what must hold after each event ----------------------------------------------------------

    def the_dead_and_strangers_change_nothing(
        self, event: ev.Event, before: Any, actions: list[ac.Action]
    ) -> None:
        worker = getattr(event, "worker", None)
        if worker is None:
            return
        process = self.processes.get(worker)
        unheard = process is None or "worker.exited" in process.told
        if unheard:
            assert actions == []
            assert self.observed() == before

    def what_is_said_twice_changes_nothing(self, event: ev.Event) -> None:
        if isinstance(event, ev.WorkerEvent):
            before = self.observed()
            assert self.fleet.handle(event, self.now) == []
            assert self.observed() == before

    def after_time_has_passed_the_next_deadline_lies_ahead(self) -> None:
        due = self.fleet.next_deadline()
        assert due is None or due > self.now

    @invariant()
    def books(self) -> None:
        if self.fleet is not None:
            self.forget_what_was_asked_for()
            self.never_more_workers_than_places()
            self.the_waitgroup_counts_each_member_once()
            self.the_books_show_who_lives()
            self.whoever_is_to_end_has_a_deadline()
            self.ready_is_announced_at_most_once_and_never_after_a_stop()
            if self.fleet.phase not in (Phase.STOPPING, Phase.STOPPED):
                self.a_gate_lets_through_the_living_one_at_first_then_more()
                self.who_has_failed_is_tried_again_or_failed_for_good()
                self.who_waits_says_for_what()

    def a_gate_lets_through_the_living_one_at_first_then_more(self) -> None:
        groups = self.fleet._groups.values()
        gates = {slot.gate for group in groups for slot in group.slots if slot.gate is not None}
        for gate in gates | set(self.fleet._gates._by_pool.values()):
            assert gate.on_their_way <= set(self.fleet._workers)
            assert len(gate.on_their_way) <= gate.room or gate.room == 1
            if gate.works_since == NEVER:  # not since the last failure
                assert gate.room == 1

    def who_has_failed_is_tried_again_or_failed_for_good(self) -> None:
        for group in self.fleet._groups.values():
            breaker = group.breaker
            if not breaker.reason:
                continue
            if breaker.probe:
                assert breaker.due is None
                assert breaker.probe in self.fleet._workers
            is_final = group.spec.policy.restart is Restart.NEVER
            assert is_final or breaker.probe or breaker.due is not None or breaker.proof_due < NEVER

    def who_waits_says_for_what(self) -> None:
        for group in self.fleet.snapshot().groups:
            waits = group.waiting_for is not None
            assert waits is (group.name in self.waiting)
            assert not (waits and group.failure)
            for_others = self.fleet._groups[group.name].is_waiting  # for what runs before it
            assert waits or for_others or group.state != "waiting"

    def forget_what_was_asked_for(self) -> None:
        """Groups that have failed are made good by a restart, and a reload takes groups away."""
        groups = {group.name: group for group in self.fleet.snapshot().groups}
        self.failed = {n: a for n, a in self.failed.items() if n in groups and groups[n].failure}
        self.waiting &= set(groups)

    def never_more_workers_than_places(self) -> None:
        for name, spec in self.specs.items():
            living = [p for p in self.processes.values() if p.group == name and not p.ended]
            assert len(living) <= spec.count

    def the_waitgroup_counts_each_member_once(self) -> None:
        for process in self.processes.values():
            if process.ended:
                self.count_down(process.worker)
        assert list(self.fleet.snapshot().outstanding) == self.waited_for

    def the_books_show_who_lives(self) -> None:
        living = {p.worker for p in self.processes.values() if not p.ended}
        assert {worker.id for worker in self.fleet.snapshot().workers} == living

    def whoever_is_to_end_has_a_deadline(self) -> None:
        ending = {"worker.hung", "worker.cancelled", "worker.failed", "worker.drained"}
        for worker in self.fleet.snapshot().workers:
            if ending & set(self.processes[worker.id].told):
                assert worker.deadline is not None, worker

    def ready_is_announced_at_most_once_and_never_after_a_stop(self) -> None:
        assert self.events.count("supervisor.ready") <= 1
        if "supervisor.stopping" in self.events:
            assert "supervisor.ready" not in self.events[self.events.index("supervisor.stopping") :]

    # --- the end ----------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Stop, and let nobody help: deaf workers, mute templates, a kernel that honours SIGKILL."""
        if self.fleet is None:
            return
        self.time_passes()  # what was overslept until here is not the stop's
        self.stop(None)
        self.a_stop_always_ends_in_bounded_time(self.now + max(self.grace, 1.0) + STACKS_DUE)

    def a_stop_always_ends_in_bounded_time(self, at_the_latest: float) -> None:
        for _ in range(10 * len(self.processes) + 10):
            for process in list(self.processes.values()):
                if process.kill_sent and not process.ended:
                    self.ends(process, signal=9)
                elif process.given_up and process.pid is None and not process.ended:
                    process.ended = True
                    self.happens(ev.WorkerNotBorn(process.worker, "given up"))
            if self.finishes:
                break
            due = self.fleet.next_deadline()
            assert due is not None, "nobody is waited for, but the stop has not ended"
            self.now = max(self.now, due)
            self.time_passes()
        assert len(self.finishes) == 1
        assert self.now <= at_the_latest + TOLERANCE


def is_unborn(process: Process) -> bool:
    """Tell whether it may still be born, or turn out not to be."""
    return process.pid is None and not process.ended


def is_alive(process: Process) -> bool:
    """Tell whether it is a process that can still do what it likes."""
    return process.pid is not None and not process.ended


def is_new(process: Process) -> bool:
    """Tell whether it has yet to say hello."""
    return is_alive(process) and not process.said_hello


def is_known(process: Process) -> bool:
    """Tell whether it has said hello, and lives."""
    return is_alive(process) and process.said_hello


def is_suspect(process: Process) -> bool:
    """Tell whether it is being examined, or was."""
    return is_alive(process) and "Suspect" in process.signals


World.TestCase.settings = settings(
    max_examples=160,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestWorld = World.TestCase
