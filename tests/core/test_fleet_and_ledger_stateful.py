"""The fleet and a budget together: rolls, deaths, scaling and changed settings move leases, in any order.

The world of `test_roll_stateful`, whose workers have a pool each. What the loop does between the two
machines is done here: who is spawned joins the ledger, who ends leaves it before its successor asks,
and the budget does for every generation that there is. What the server counts is kept by hand: what
workers have open, and what those have left open that were killed.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.budget import Ledger, Tell, Terms
from supervisor.core.budgets import LET_GO, SETTLE
from supervisor.core.fleet import GroupSpec
from tests.core.test_budget_stateful import Worker
from tests.core.test_roll_stateful import RollWorld, files

MAXIMUM = 4  # max_open of each worker


class LendingWorld(RollWorld):
    """Workers that have, want and lose connections."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 0  # what the budget has beyond the least that fits
        self.maximum = MAXIMUM
        self.counts: dict[str, int] = {}  # of groups that were scaled
        self.pools: dict[str, Worker] = {}
        self.closed: set[str] = set()  # who has said that all is closed
        self.dead: list[tuple[int, float]] = []
        self.kept = {1}
        self.settled_in_force = 1

    @initialize(
        file=files(),
        grace=st.sampled_from([30.0, 2.0]),
        peace=st.sampled_from([40, 90]),
        more=st.integers(0, 9),
    )
    def start_with_a_budget(
        self, file: dict[str, GroupSpec], grace: float, peace: int, more: int
    ) -> None:
        self.more = more
        self.files[1] = file
        self.ledger = Ledger(self.terms())
        self.limit = self.ledger.terms.budget
        super().start(file, grace, peace)

    def start(self) -> None:
        """Have only the one above begin it."""

    # --- as the loop does it -----------------------------------------------------------------------

    def terms(self) -> Terms:
        """Return what the budget has to do for: what is in force, and where a roll leads from and to."""
        joined: Terms | None = None
        for generation in sorted(self.kept):
            own = generation == self.settled_in_force
            file = self.files[generation]
            expected = sum(
                self.counts.get(spec.name, spec.count) if own else spec.count
                for spec in file.values()
            )
            surge = sum(spec.surge for spec in file.values())
            terms = Terms(expected + surge + self.more, expected, surge, 1)
            joined = terms if joined is None else joined.joined(terms)
        assert joined is not None
        return joined

    def rebudget(self) -> None:
        terms = self.terms()
        self.limit = max(self.limit, terms.budget)
        self.deliver(self.ledger.change(terms))

    def deliver(self, tells: list[Tell]) -> None:
        for tell in tells:
            self.pools[tell.worker].inbox.append(tell)

    def reload(self, file: dict[str, GroupSpec], quality: str) -> None:
        generation = len(self.files) + 1
        self.files[generation] = file
        self.kept.add(generation)
        self.rebudget()
        del self.files[generation]
        super().reload(file, quality)

    def handed_over(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.WorkerDrained) and event.worker in self.pools:
            pool = self.pools[event.worker]
            if self.fleet.worker_of(event.worker).state in ("ready", "draining"):
                pool.wants = pool.in_use = pool.idle = 0
                self.closed.add(event.worker)
        if isinstance(event, ev.WorkerExited | ev.WorkerNotBorn):
            self.leaves(event)
        return super().handed_over(event)

    def leaves(self, event: ev.WorkerExited | ev.WorkerNotBorn) -> None:
        if event.worker not in self.pools or not self.processes[event.worker].ended:
            return  # nobody but the kernel says so
        pool = self.pools.pop(event.worker)
        settled_at = None
        if isinstance(event, ev.WorkerExited):
            settled_at = self.now + (LET_GO if event.worker in self.closed else SETTLE)
            self.dead.append((pool.open, settled_at))
        self.deliver(self.ledger.leave(event.worker, settled_at=settled_at))

    def spawned(self, action: ac.Spawn) -> None:
        super().spawned(action)
        first, *others = self.ledger.join(action.worker, self.maximum)
        self.pools[action.worker] = Worker(
            action.worker, self.maximum, first.allowance, first.serial, first.serial
        )
        self.deliver(others)

    def carry_out(self, actions: list[ac.Action]) -> None:
        super().carry_out(actions)
        for action in actions:
            if isinstance(action, ac.Retire):
                in_force = self.fleet.snapshot().generation
                if in_force != self.settled_in_force:
                    self.settled_in_force = in_force
                    self.counts.clear()
                self.kept.discard(action.generation)
                self.rebudget()
            elif isinstance(action, ac.Announce) and action.event == "group.scaled":
                self.counts[action.fields["group"]] = action.fields["count"]
                self.rebudget()

    def time_passes(self) -> None:
        super().time_passes()
        self.settle()

    def settle(self) -> None:
        self.dead = [(count, at) for count, at in self.dead if at > self.now]
        self.deliver(self.ledger.time_passed(self.now))

    # --- what pools do -----------------------------------------------------------------------------

    def some_pool(self, index: int) -> Worker:
        return list(self.pools.values())[index % len(self.pools)]

    @precondition(lambda self: self.pools)
    @rule(index=st.integers(0, 9), wants=st.integers(0, 6))
    def want(self, index: int, wants: int) -> None:
        pool = self.some_pool(index)
        if self.processes[pool.name].said_hello and pool.name not in self.closed:
            pool.wants = wants
            pool.work()

    @precondition(lambda self: self.pools)
    @rule(index=st.integers(0, 9))
    def hear_and_say(self, index: int) -> None:
        pool = self.some_pool(index)
        if self.processes[pool.name].said_hello:
            if pool.inbox:
                pool.told(pool.inbox.popleft())
                pool.work()
            if pool.outbox:
                self.deliver(self.ledger.heard(pool.name, *pool.outbox.popleft()))

    @precondition(lambda self: self.fleet.takes_settings)
    @rule(data=st.data(), more=st.integers(0, 9), maximum=st.sampled_from([2, 4, 6]))
    def settings_change(self, data: st.DataObject, more: int, maximum: int) -> None:
        """Other counts and rules, another budget and size, for those who run."""
        file = {
            name: replace(
                spec,
                count=data.draw(st.integers(0, 3)),
                policy=replace(spec.policy, max_restarts=5),
                max_age=data.draw(st.sampled_from([0.0, 100.0])),
            )
            for name, spec in self.files[self.in_force].items()
        }
        self.files[self.in_force] = self.specs = file
        self.counts.clear()
        self.more, self.maximum = more, maximum
        self.deliver(self.ledger.bound(maximum))
        for pool in self.pools.values():
            pool.maximum = maximum
        self.rebudget()
        self.carry_out(
            self.handed_over(ev.SettingsChanged(tuple(file.values()), self.grace, self.grace / 4))
        )

    @precondition(lambda self: not self.is_stopping())
    @rule()
    def all_is_said_and_done(self) -> None:
        """At rest, everybody has what he is guaranteed, and no more than the budget is out."""
        self.the_world_behaves()
        if self.is_stopping():
            return
        self.now += SETTLE
        self.settle()
        for _ in range(200):
            busy = [pool for pool in self.pools.values() if pool.inbox or pool.outbox]
            if not busy:
                break
            for pool in busy:
                while pool.inbox:
                    pool.told(pool.inbox.popleft())
                pool.end_transactions()
                while pool.outbox:
                    self.deliver(self.ledger.heard(pool.name, *pool.outbox.popleft()))
        else:
            raise AssertionError("they never stop talking")
        assert self.ledger.granted <= self.ledger.terms.budget
        assert all(self.ledger.allowance_of(name) <= self.maximum for name in self.pools)
        self.limit = self.ledger.terms.budget
        if not self.ledger.terms.misfit:
            for name in self.pools:
                assert self.ledger.allowance_of(name) >= 1

    # --- what must hold ----------------------------------------------------------------------------

    @invariant()
    def leases_never_exceed_the_budget(self) -> None:
        if hasattr(self, "ledger"):
            opened = sum(pool.open for pool in self.pools.values())
            opened += sum(count for count, _ in self.dead)
            assert opened <= self.ledger.granted <= self.limit

    @invariant()
    def everybody_who_lives_has_an_account_and_nobody_else(self) -> None:
        if hasattr(self, "ledger"):
            assert set(self.pools) == {process.worker for process in self.living()}


LendingWorld.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLendingWorld = LendingWorld.TestCase
