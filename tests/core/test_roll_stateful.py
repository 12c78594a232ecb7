"""Rolls among anything in any order: the world of `test_fleet_stateful`, with an operator in it.

The operator reloads (good code, broken code, other counts, groups that come and go), restarts, scales,
and does it again before the last has ended; workers grow old. What must hold is checked on each
action as it is carried out, and, whenever the world behaves for a while, that all comes to rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import Fleet, GroupSpec, Phase
from supervisor.core.policy import Restart, RestartPolicy
from tests.core.test_fleet_stateful import TOLERANCE, Process, World

NAMES = ["g0", "g1", "g2"]
ENDS = ["reload.done", "reload.rolled_back", "reload.superseded"]
# How code behaves that is not in force yet, when the world behaves.
GOOD, RAISES, MUTE, DIES_PROVING = "good", "raises", "mute", "dies proving"

POLICIES = st.builds(
    RestartPolicy,
    restart=st.sampled_from([Restart.ALWAYS, Restart.ALWAYS, Restart.ON_FAILURE, Restart.NEVER]),
    max_restarts=st.sampled_from([5, 1, 0]),
    backoff=st.sampled_from([0.1, 0.0, 5.0]),
)
SPECS = st.builds(
    GroupSpec,
    name=st.just(""),
    count=st.sampled_from([2, 1, 3, 0]),
    policy=POLICIES,
    ready_timeout=st.sampled_from([30.0, 2.0]),
    exit_on_failed=st.sampled_from([False, False, False, True]),
    surge=st.sampled_from([1, 2]),
    min_ready_time=st.sampled_from([1.0, 0.0, 5.0]),
    max_age=st.sampled_from([0.0, 0.0, 100.0]),  # all can be replaced in that time
)


@st.composite
def files(draw: Callable[..., Any]) -> dict[str, GroupSpec]:
    """Draw what a configuration file holds: the groups by name."""
    names = draw(st.sampled_from([["g0"], ["g0", "g1"], ["g1"], ["g2", "g0"], NAMES]))
    found = {}
    for name in names:
        spec = draw(SPECS)
        found[name] = GroupSpec(
            name,
            spec.count,
            spec.policy,
            spec.ready_timeout,
            spec.exit_on_failed,
            spec.surge,
            spec.min_ready_time,
            spec.max_age,
        )
    return found


class RollWorld(World):
    """The world, and somebody who wants it to change."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[int, dict[str, GroupSpec]] = {}  # by generation
        self.quality: dict[int, str] = {}
        self.generation_of: dict[str, int] = {}
        self.ready_at: dict[str, float] = {}
        self.successors: set[str] = set()  # those for whom somebody was replaced
        self.retired: list[int] = []
        self.ended: list[int] = []  # the reloads that have come to an end, by generation
        self.under_way: int | None = None  # the reload that has started
        self.in_force = 1

    @initialize(
        file=files(), grace=st.sampled_from([30.0, 2.0, 0.3]), peace=st.sampled_from([40, 90])
    )
    def start(self, file: dict[str, GroupSpec], grace: float, peace: int) -> None:
        """Set up the groups of a first file and start them."""
        self.grace = grace
        self.peace = peace
        self.files[1], self.quality[1] = file, GOOD
        self.fleet = Fleet(
            tuple(file.values()), grace=grace, abort_margin=grace / 4, draw=lambda: 0.5
        )
        self.carry_out(self.fleet.start(self.now))

    def backs_off(self) -> bool:
        """Starts are not counted here: a roll has its own, and tries again in its own time."""
        return False

    # --- what the operator does -------------------------------------------------------------------

    @rule(file=files(), quality=st.sampled_from([GOOD, GOOD, RAISES, MUTE, DIES_PROVING]))
    def reload(self, file: dict[str, GroupSpec], quality: str) -> None:
        generation = len(self.files) + 1
        self.files[generation], self.quality[generation] = file, quality
        request = ev.ReloadRequested(generation, tuple(file.values()), self.grace, self.grace / 4)
        self.is_asked_for(request)

    @rule(quality=st.sampled_from([GOOD, RAISES, DIES_PROVING]))
    def reload_the_same_file(self, quality: str) -> None:
        self.reload(self.files[len(self.files)], quality)

    @rule(whom=st.sampled_from([*NAMES, "g0-1", "g0-2", "g1-1", "g0-5"]))
    def restart(self, whom: str) -> None:
        self.is_asked_for(ev.RestartRequested(whom))

    @rule(group=st.sampled_from(NAMES), count=st.sampled_from([3, 0, 1, 2, 4]))
    def scale(self, group: str, count: int) -> None:
        self.is_asked_for(ev.ScaleRequested(group, count))

    @precondition(lambda self: not self.is_stopping())
    @rule()
    def the_world_behaves(self) -> None:
        """Every worker does what it should, broken new code fails as it must: all comes to rest."""
        for _ in range(600):
            if self.is_stopping() or self.is_at_rest():
                break
            if not [process for process in self.living() if self.behaves(process)]:
                due = self.fleet.next_deadline()
                assert due is not None, "nothing is on its way, but it is not at rest"
                self.now = max(self.now, due)
                self.time_passes()
        if not self.is_stopping():
            self.a_roll_always_ends()
            self.at_rest_everybody_is_of_the_generation_in_force()
            self.at_rest_every_reload_has_come_to_one_end()
            self.at_rest_only_the_generation_in_force_is_kept()

    def hang_timeout_of(self, process: Process) -> float:
        """Nobody is watched here: a hang is one more way to fail."""
        return 0.0

    # --- how the world carries on -----------------------------------------------------------------

    def is_stopping(self) -> bool:
        return self.fleet.phase in (Phase.STOPPING, Phase.STOPPED)

    def is_asked_for(self, request: ev.Event) -> None:
        self.carry_out(self.handed_over(request))

    def living(self) -> list[Process]:
        return [process for process in self.processes.values() if not process.ended]

    def behaves(self, process: Process) -> bool:
        """Let a worker do what is next for it; False when it has nothing to do."""
        told, worker = process.told, process.worker
        generation = self.generation_of[worker]
        quality = GOOD if generation == self.in_force else self.quality[generation]
        if process.pid is None:
            self.comes_or_does_not(process)
        elif process.kill_sent:
            self.ends(process, signal=9)
        elif "TakeStacks" in process.signals:
            return False  # whatever it says now, it is out of time
        elif "Terminate" in process.signals or {"worker.drained", "worker.failed"} & set(told):
            self.ends(process, code=0)
        elif process.cancels:
            heard = "worker.acknowledged" in told
            self.happens((ev.WorkerDrained if heard else ev.WorkerAcknowledged)(worker))
        elif not process.said_hello:
            process.said_hello = True
            self.happens(ev.WorkerRegistered(worker))
        elif quality is RAISES:
            self.happens(ev.WorkerFailed(worker, "ValueError", "Traceback"))
        elif "worker.ready" not in told and quality is not MUTE:
            self.happens(ev.WorkerReady(worker))
        elif quality is DIES_PROVING and worker not in self.successors:
            self.ends(process, signal=11)
        elif outages := [*self.fleet._workers[worker]._outages]:
            self.happens(ev.WorkerReachable(worker, outages[0]))
        else:
            return False
        return True

    def comes_or_does_not(self, process: Process) -> None:
        if process.given_up:
            process.ended = True
            self.happens(ev.WorkerNotBorn(process.worker, "given up"))
        else:
            process.pid = 1 + len(self.events)
            self.happens(ev.WorkerBorn(process.worker, process.pid))

    def is_at_rest(self) -> bool:
        rolls = self.fleet._rolls
        return (
            rolls._roll is None
            and rolls._next is None
            and not rolls._queue
            and all(
                slot.is_ready or slot.finished or group.failure
                for group in self.fleet._groups.values()
                for slot in group.slots
            )
        )

    def carry_out(self, actions: list[ac.Action]) -> None:
        for action in actions:
            if isinstance(action, ac.Retire):
                self.a_generation_is_retired_once_and_when_nobody_runs_it(action.generation)
                self.retired.append(action.generation)
            else:
                super().carry_out([action])

    def spawned(self, action: ac.Spawn) -> None:
        self.nobody_is_spawned_from_a_retired_generation(action)
        self.nobody_is_spawned_whom_its_generation_does_not_know(action)
        self.specs = self.files[action.generation]
        self.generation_of[action.worker] = action.generation
        super().spawned(action)

    def announced(self, action: ac.Announce) -> None:
        super().announced(action)
        worker = action.fields.get("worker", "")
        if action.event == "worker.ready":
            self.ready_at[worker] = self.now
        elif action.event == "worker.cancelled" and action.fields["cause"] == "replaced":
            self.nobody_is_replaced_before_its_successor_has_proved_itself(worker)
        elif action.event == "reload.started":
            assert self.under_way is None
            self.under_way = action.fields["generation"]
        elif action.event in ENDS:
            self.reload_ended(action)

    def reload_ended(self, action: ac.Announce) -> None:
        generation = action.fields.get("failed_generation", action.fields["generation"])
        self.a_reload_ends_once(generation)
        self.ended.append(generation)
        if action.event == "reload.superseded":
            self.only_what_is_older_is_superseded(generation)
        else:
            assert generation == self.under_way
            if action.event == "reload.done":
                self.in_force = generation
            assert action.fields["generation"] == self.in_force
            self.after_a_reload_everybody_is_of_the_generation_in_force()
        if generation == self.under_way:
            self.under_way = None

    # --- what must hold on each action -----------------------------------------------------------

    def nobody_is_spawned_from_a_retired_generation(self, action: ac.Spawn) -> None:
        assert action.generation not in self.retired

    def nobody_is_spawned_whom_its_generation_does_not_know(self, action: ac.Spawn) -> None:
        assert action.group in self.files[action.generation]

    def a_generation_is_retired_once_and_when_nobody_runs_it(self, generation: int) -> None:
        assert generation not in self.retired
        assert generation != self.fleet.snapshot().generation
        assert [p for p in self.living() if self.generation_of[p.worker] == generation] == []

    def nobody_is_replaced_before_its_successor_has_proved_itself(self, worker: str) -> None:
        successor = self.fleet._slot_of[worker].worker
        assert successor.id != worker
        assert successor.id not in self.successors
        assert {w.id for w in self.fleet.snapshot().workers if w.ready} >= {successor.id}
        spec = self.files[successor.generation][successor.group]
        assert self.now >= self.ready_at[successor.id] + spec.min_ready_time - TOLERANCE
        self.successors.add(successor.id)

    def a_reload_ends_once(self, generation: int) -> None:
        assert generation not in self.ended

    def only_what_is_older_is_superseded(self, generation: int) -> None:
        assert generation < len(self.files)

    def after_a_reload_everybody_is_of_the_generation_in_force(self) -> None:
        assert {self.generation_of[process.worker] for process in self.living()} <= {self.in_force}

    def every_event_says_who_it_is_about(self, action: ac.Announce, process: Process) -> None:
        who = {key: action.fields[key] for key in ("worker", "group", "pid", "generation")}
        assert who == {
            "worker": process.worker,
            "group": process.group,
            "pid": process.pid,
            "generation": self.generation_of[process.worker],
        }

    def the_unborn_are_given_up_once(self, action: ac.Action, process: Process) -> None:
        assert isinstance(action, ac.Kill)
        assert not process.given_up
        assert not process.ended
        told = self.fleet._workers[process.worker].deadline  # the unborn are told to end in silence
        assert self.now >= process.ready_due or told is not None

    def the_exit_code_tells_of_kills_and_failed_groups(self, finish: ac.Finish) -> None:
        failed = [group for group in self.fleet.snapshot().groups if group.failure]
        assert finish.exit_code == int(self.killed_in_stop or bool(failed))

    # --- what must hold after each event ----------------------------------------------------------

    def never_more_workers_than_places(self) -> None:
        """And never more than `surge` beyond them, those apart that have been sent away."""
        roll = self.fleet._rolls._roll
        leaving = {worker.id for worker in roll._leaving} if roll is not None else set()
        if self.is_stopping():
            return
        for name, group in self.fleet._groups.items():
            living = [p for p in self.living() if p.group == name and p.worker not in leaving]
            surge = 0 if roll is None else group.rolling_spec.surge
            assert len(living) <= len(group.slots) + surge
            if roll is None:
                assert len(group.slots) == group.spec.count

    # --- what must hold at rest -------------------------------------------------------------------

    def a_roll_always_ends(self) -> None:
        assert self.is_at_rest()
        assert self.fleet.phase in (Phase.STARTING, Phase.READY)

    def at_rest_everybody_is_of_the_generation_in_force(self) -> None:
        assert self.fleet.snapshot().generation == self.in_force
        self.after_a_reload_everybody_is_of_the_generation_in_force()
        assert {process.group for process in self.living()} <= set(self.files[self.in_force])

    def at_rest_every_reload_has_come_to_one_end(self) -> None:
        assert sorted(self.ended) == list(range(2, len(self.files) + 1))

    def at_rest_only_the_generation_in_force_is_kept(self) -> None:
        kept = set(self.files) - set(self.retired)
        assert kept == {self.in_force}

    # --- the end ----------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let the world behave, go on as before, and stop in the middle of a roll."""
        if self.fleet is not None and not self.is_stopping():
            self.the_world_behaves()
        if self.fleet is not None and not self.is_stopping():
            self.reload_the_same_file(GOOD)
        super().teardown()


RollWorld.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRollWorld = RollWorld.TestCase
