"""What runs before the others, among anything in any order: the world of `test_roll_stateful`, in which
some files have a group that has to end well first. What must hold in addition is checked as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import GroupSpec
from supervisor.core.policy import Restart, RestartPolicy
from tests.core.test_fleet_stateful import Process
from tests.core.test_roll_stateful import GOOD, RAISES, RollWorld, files

ERRAND = "b0"


@st.composite
def files_with_errands(draw: Callable[..., Any]) -> dict[str, GroupSpec]:
    """Draw what a file holds; three of four have a group that runs before the others."""
    found = draw(files())
    if draw(st.sampled_from([True, True, True, False])):
        spec = GroupSpec(ERRAND, 1, RestartPolicy(restart=Restart.NEVER))
        found = {**found, ERRAND: replace(spec, before=True)}
    return found  # type: ignore[no-any-return]


class BeforeWorld(RollWorld):
    """The world, and errands that have to be run first."""

    def __init__(self) -> None:
        super().__init__()
        self.done: set[int] = set()  # generations whose errand has been run, and those without one
        self.has_rolled = False

    @initialize(
        file=files_with_errands(),
        grace=st.sampled_from([30.0, 2.0, 0.3]),
        peace=st.sampled_from([40, 90]),
    )
    def start(self, file: dict[str, GroupSpec], grace: float, peace: int) -> None:
        self.note(1, file)
        super().start(file, grace, peace)

    @rule(file=files_with_errands(), quality=st.sampled_from([GOOD, GOOD, RAISES]))
    def reload(self, file: dict[str, GroupSpec], quality: str) -> None:
        self.note(len(self.files) + 1, file)
        super().reload(file, quality)

    def note(self, generation: int, file: dict[str, GroupSpec]) -> None:
        if ERRAND not in file:
            self.done.add(generation)

    def ends(self, process: Process, **how: Any) -> None:
        told = {"worker.failed", "worker.cancelled"} & set(process.told)
        if process.group == ERRAND and how == {"code": 0} and not told:
            self.done.add(self.generation_of[process.worker])
        super().ends(process, **how)

    def behaves(self, process: Process) -> bool:
        if process.group != ERRAND or process.cancels or process.signals or not process.said_hello:
            return super().behaves(process)
        quality = self.quality[self.generation_of[process.worker]]
        if {"worker.failed", "worker.drained"} & set(process.told):
            self.ends(process, code=0)
        elif quality is RAISES:
            self.happens(ev.WorkerFailed(process.worker, "ValueError", "Traceback"))
        else:
            self.happens(ev.WorkerDrained(process.worker))
        return True

    def spawned(self, action: ac.Spawn) -> None:
        self.nobody_is_spawned_before_what_comes_first_is_done(action)
        super().spawned(action)
        self.there_is_one_errand_at_a_time(action)

    def announced(self, action: ac.Announce) -> None:
        if action.event == "reload.started":
            self.has_rolled = True
        super().announced(action)
        if action.event == "reload.rejected":
            generation = action.fields["generation"]
            self.a_reload_ends_once(generation)
            self.a_rejected_reload_has_replaced_nobody(generation)
            self.ended.append(generation)

    # --- what must hold ----------------------------------------------------------------------------

    def nobody_is_spawned_before_what_comes_first_is_done(self, action: ac.Spawn) -> None:
        """Only a roll that goes back leads to a generation whose own start was superseded."""
        if action.group != ERRAND:
            assert action.generation in self.done or self.has_rolled

    def there_is_one_errand_at_a_time(self, action: ac.Spawn) -> None:
        if action.group == ERRAND:
            assert [p.worker for p in self.living() if p.group == ERRAND] == [action.worker]

    def a_rejected_reload_has_replaced_nobody(self, generation: int) -> None:
        spawned = [w for w, number in self.generation_of.items() if number == generation]
        assert {self.processes[worker].group for worker in spawned} == {ERRAND}


BeforeWorld.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestBeforeWorld = BeforeWorld.TestCase
