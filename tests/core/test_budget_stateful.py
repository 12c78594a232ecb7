"""The ledger among workers that open, wait, answer late or never, and die: whatever the order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from supervisor.core.budget import Ledger, Tell, Terms

SETTLE = 2.0


@dataclass
class Worker:
    """A worker's pool as it really is, and the two roads between it and the ledger."""

    name: str
    maximum: int
    allowance: int
    serial: int
    done: int
    wants: int = 0  # how many it would use
    in_use: int = 0
    idle: int = 0
    latest: int = 1  # serial of the last tell that is on its way to it
    owes: bool = False
    said: int = 0
    inbox: deque[Tell] = field(default_factory=deque)
    outbox: deque[tuple[int, int, int]] = field(default_factory=deque)

    @property
    def open(self) -> int:
        return self.in_use + self.idle

    def told(self, tell: Tell) -> None:
        """Close the idle surplus at once; what is in use goes as it comes back."""
        allowance = tell.allowance
        if tell.unused_only:
            allowance = max(allowance, min(self.in_use, self.allowance))
        takes_away = tell.allowance < self.allowance
        self.allowance, self.serial = allowance, tell.serial
        self.owes = self.owes or takes_away
        if not self.owes:
            self.done = self.serial
        self.idle = min(self.idle, max(0, allowance - self.in_use))

    def end_transactions(self) -> None:
        """Give all back, and borrow again what is allowed."""
        self.in_use, self.idle = 0, min(self.in_use + self.idle, self.allowance)
        self.work()

    def work(self) -> None:
        """Use as much as is wanted and allowed; say so when there is not enough, and once less."""
        if self.wants < self.in_use:
            self.idle = min(
                self.idle + self.in_use - self.wants, max(0, self.allowance - self.wants)
            )
            self.in_use = self.wants
        room = max(0, self.allowance - self.in_use)
        more = max(0, min(self.wants - self.in_use, room))
        self.in_use += more
        self.idle = max(0, min(self.idle - more, self.allowance - self.in_use))
        self.answer()
        wanted = min(self.wants, self.maximum)
        if (self.in_use < wanted > self.said) or wanted < self.said:
            self.say()

    def answer(self) -> None:
        if self.owes and self.open <= self.allowance:
            self.owes = False
            self.done = self.serial
            self.say()

    def say(self) -> None:
        self.said = min(self.wants, self.maximum)
        self.outbox.append((self.done, self.allowance, self.said))


class Machine(RuleBasedStateMachine):
    """The ledger, its workers, and the server that counts."""

    @initialize(
        minimum=st.integers(1, 3),
        expected=st.integers(1, 4),
        surge=st.integers(1, 2),
        more=st.integers(0, 15),
        maximum=st.integers(1, 10),
    )
    def start(self, minimum: int, expected: int, surge: int, more: int, maximum: int) -> None:
        self.now = 0.0
        self.terms = Terms((expected + surge) * minimum + more, expected, surge, minimum)
        self.limit = self.terms.budget  # above it for as long as a lowered budget is not settled
        self.maximum = maximum
        self.ledger = Ledger(self.terms)
        self.workers: dict[str, Worker] = {}
        self.dead: list[tuple[int, float]] = []
        self.born = 0
        self.told = 0

    def deliver(self, tells: list[Tell]) -> None:
        for tell in tells:
            self.told += 1
            self.workers[tell.worker].inbox.append(tell)
            self.workers[tell.worker].latest = tell.serial

    def pick(self, index: int) -> Worker:
        return list(self.workers.values())[index % len(self.workers)]

    some = precondition(lambda self: bool(self.workers))

    @precondition(lambda self: len(self.workers) < self.terms.expected + self.terms.surge)
    @rule()
    def birth(self) -> None:
        self.born += 1
        name = f"w{self.born}"
        first, *others = self.ledger.join(name, self.maximum)
        assert first.worker == name
        self.workers[name] = Worker(name, self.maximum, first.allowance, first.serial, first.serial)
        self.deliver(others)

    @some
    @rule(index=st.integers(0, 9), wants=st.integers(0, 14))
    def want(self, index: int, wants: int) -> None:
        worker = self.pick(index)
        worker.wants = wants
        worker.work()

    @some
    @rule(index=st.integers(0, 9))
    def hear(self, index: int) -> None:
        worker = self.pick(index)
        if worker.inbox:
            worker.told(worker.inbox.popleft())

    @some
    @rule(index=st.integers(0, 9))
    def works_on(self, index: int) -> None:
        self.pick(index).end_transactions()

    @some
    @rule(index=st.integers(0, 9))
    def say(self, index: int) -> None:
        worker = self.pick(index)
        if worker.outbox:
            self.deliver(self.ledger.heard(worker.name, *worker.outbox.popleft()))

    @some
    @rule(index=st.integers(0, 9), serial=st.integers(-1, 9), n=st.sampled_from([0, -1, 1, 20]))
    def repeat_old_news(self, index: int, serial: int, n: int) -> None:
        """A message of an old serial, whatever it says, gives nobody a lease."""
        worker = self.pick(index)
        if serial != worker.latest:
            self.deliver(self.ledger.heard(worker.name, serial, n, worker.said))

    @some
    @rule(index=st.integers(0, 9), killed=st.booleans())
    def death(self, index: int, killed: bool) -> None:
        worker = self.pick(index)
        del self.workers[worker.name]
        settled = self.now + SETTLE if killed else None
        if killed:
            self.dead.append((worker.open, self.now + SETTLE))
        self.deliver(self.ledger.leave(worker.name, settled_at=settled))
        assert self.ledger.heard(worker.name, 1, 99, 99) == []

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self.dead = [(n, at) for n, at in self.dead if at > self.now]
        self.deliver(self.ledger.time_passed(self.now))

    @rule(expected=st.integers(1, 5), more=st.integers(0, 15))
    def reconfigure(self, expected: int, more: int) -> None:
        budget = (expected + self.terms.surge) * self.terms.minimum + more
        self.limit = max(self.limit, budget)
        self.terms = Terms(budget, expected, self.terms.surge, self.terms.minimum)
        self.deliver(self.ledger.change(self.terms))

    @rule()
    def everything_is_said_and_done(self) -> None:
        """With time and answers, all is quiet, and each has its fair share."""
        self.time(SETTLE)
        before = self.told
        for _ in range(200):
            busy = False
            for worker in self.workers.values():
                while worker.inbox:
                    busy = True
                    worker.told(worker.inbox.popleft())
                worker.end_transactions()
                while worker.outbox:
                    busy = True
                    self.deliver(self.ledger.heard(worker.name, *worker.outbox.popleft()))
            if not busy:
                break
        else:
            raise AssertionError("they never stop talking")
        assert self.told - before <= 12 * max(1, len(self.workers)), "they talk too much"
        if self.crowd_fits():
            self.limit = self.terms.budget
            self.check_shares()

    def crowd_fits(self) -> bool:
        """Whether no more are here than the numbers in force know of."""
        return len(self.workers) <= self.terms.expected + self.terms.surge

    def check_shares(self) -> None:
        """Each has its minimum; who wants more than it has is at the common level."""
        assert self.ledger.granted <= self.terms.budget
        allowances = {name: self.ledger.allowance_of(name) for name in self.workers}
        minimum = min(self.terms.minimum, self.maximum)
        for name, worker in self.workers.items():
            assert worker.allowance == allowances[name] >= minimum
            wanted = min(worker.wants, self.maximum)
            if wanted <= allowances[name]:
                continue
            # Nothing is free, nobody has what it does not want, and nobody has two more.
            missing = self.terms.expected + self.terms.surge - len(self.workers)
            assert self.ledger.free <= max(0, missing) * self.terms.minimum
            for other in self.workers:
                theirs = allowances[other]
                claim = max(minimum, min(self.workers[other].wants, self.maximum))
                assert theirs <= claim, "somebody keeps what another one wants"
                assert theirs <= max(minimum, allowances[name] + 1), "that is not fair"

    @invariant()
    def never_more_than_the_budget(self) -> None:
        if not hasattr(self, "workers"):
            return
        opened = sum(worker.open for worker in self.workers.values())
        opened += sum(n for n, _ in self.dead)
        assert opened <= self.ledger.granted <= self.limit

    @invariant()
    def nobody_has_more_than_the_ledger_knows(self) -> None:
        for worker in getattr(self, "workers", {}).values():
            assert worker.open <= self.maximum


TestLedger = Machine.TestCase
TestLedger.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
