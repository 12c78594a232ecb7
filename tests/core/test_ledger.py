"""The ledger of counters: nothing that was counted is lost, and nothing is counted twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from supervisor.core.ledger import Key, Ledger, Vector, add

JOBS: Key = ("jobs", "web")
WAIT: Key = ("wait", "web", "main")


def test_what_the_dead_have_counted_stays():
    """A total is what the living say plus what the dead had said."""
    ledger = Ledger()
    ledger.enter("web-1")
    ledger.heard("web-1", {JOBS: (3, 1)})
    ledger.close("web-1")
    ledger.enter("web-2")
    assert ledger.totals() == {JOBS: (3, 1)}
    ledger.heard("web-2", {JOBS: (2, 0)})
    assert ledger.totals() == {JOBS: (5, 1)}


def test_a_report_replaces_the_one_before():
    """What a worker says is counted from its start, not since its last report."""
    ledger = Ledger()
    ledger.enter("web-1")
    ledger.heard("web-1", {JOBS: (3, 1)})
    ledger.heard("web-1", {JOBS: (4, 1)})
    assert ledger.totals() == {JOBS: (4, 1)}


def test_an_old_report_that_comes_late_takes_nothing_back():
    """Each number counts for the most that its worker has ever said."""
    ledger = Ledger()
    ledger.enter("web-1")
    ledger.heard("web-1", {JOBS: (4, 1)})
    ledger.heard("web-1", {JOBS: (3, 2)})
    assert ledger.totals() == {JOBS: (4, 2)}


def test_strangers_and_the_dead_are_not_heard():
    """A report before a worker's account or after its end changes nothing."""
    ledger = Ledger()
    ledger.heard("web-1", {JOBS: (3, 1)})
    ledger.enter("web-1")
    ledger.close("web-1")
    ledger.heard("web-1", {JOBS: (9, 9)})
    ledger.close("web-1")
    assert ledger.totals() == {}


class Reporting(RuleBasedStateMachine):
    """Workers that count, report in any order, repeat themselves, die and are replaced."""

    workers: Bundle[str] = Bundle("workers")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.serial = 0
        self.counted: dict[str, dict[Key, Vector]] = {}
        self.said: dict[str, list[dict[Key, Vector]]] = {}
        self.heard: dict[str, dict[Key, Vector]] = {}  # the most that has got through
        self.gone: set[str] = set()
        self.before: dict[Key, Vector] = {}

    @initialize(target=workers)
    def spawn_the_first(self):
        return self.spawn_one()

    @rule(target=workers)
    def spawn(self):
        return self.spawn_one()

    def spawn_one(self):
        self.serial += 1
        worker = f"web-{self.serial}"
        self.ledger.enter(worker)
        self.counted[worker] = {}
        self.said[worker] = []
        self.heard[worker] = {}
        return worker

    @rule(
        worker=workers, key=st.sampled_from([JOBS, WAIT]), more=st.tuples(*[st.integers(0, 5)] * 2)
    )
    def count(self, worker, key, more):
        self.counted[worker][key] = add(self.counted[worker].get(key), more)

    @rule(worker=workers)
    def report(self, worker):
        self.said[worker].append(self.counted[worker].copy())
        self.deliver(worker, -1)

    @rule(worker=workers)
    def send(self, worker):
        """What is said now and comes late, or never."""
        self.said[worker].append(self.counted[worker].copy())

    @rule(worker=workers, number=st.integers(0, 3))
    def hear_late_or_again(self, worker, number):
        if self.said[worker]:
            self.deliver(worker, number % len(self.said[worker]))

    def deliver(self, worker, number):
        said = self.said[worker][number]
        self.ledger.heard(worker, said)
        if worker not in self.gone:
            for key, vector in said.items():
                old = self.heard[worker].get(key, (0, 0))
                self.heard[worker][key] = (max(old[0], vector[0]), max(old[1], vector[1]))

    @rule(worker=workers)
    def die(self, worker):
        self.ledger.close(worker)
        self.gone.add(worker)

    @invariant()
    def totals_are_what_was_heard_and_never_fall(self):
        totals = self.ledger.totals()
        expected: dict[Key, Vector] = {}
        for heard in self.heard.values():
            for key, vector in heard.items():
                expected[key] = add(expected.get(key), vector)
        assert totals == expected
        for key, vector in self.before.items():
            assert all(new >= old for new, old in zip(totals[key], vector, strict=True))
        self.before = totals


TestReporting = Reporting.TestCase
TestReporting.settings = settings(max_examples=60, stateful_step_count=25)
