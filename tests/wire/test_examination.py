"""Examinations by hand: who is asked, when he is not waited for any more, and what is made of it."""

from __future__ import annotations

from supervisor import protocol
from supervisor.core import events as ev
from supervisor.core.jobs import JobSeen
from supervisor.examination import OUTSIDE, Examination, Examinations


class Bench:
    """Examinations, with what they have asked of a worker, and what was over."""

    def __init__(self, *, seen: ev.WorkerSeen | None = None, halted: str = "") -> None:
        self.asked: list[int] = []
        self.signalled: list[str] = []
        self.seen = seen
        self.halted = halted
        self.under_test = Examinations(
            lambda _worker: self.seen, lambda _worker: self.halted, self.take, self.send
        )

    def take(self, worker: str, _now: float) -> ev.StacksTaken | None:
        self.signalled.append(worker)
        return ev.StacksTaken(worker, "", self.halted) if self.halted else None

    def send(self, _worker: str, message: protocol.ToWorker) -> bool:
        assert isinstance(message, protocol.Examine)
        self.asked.append(message.number)
        return True

    def begin(self, now: float = 0.0) -> None:
        self.under_test.begin("w-1", lambda _found: None, now=now, patience=1.0)

    def over(self, now: float) -> list[Examination]:
        return self.under_test.over(now)


def test_who_answers_is_not_signalled() -> None:
    """His own stacks are taken, at once."""
    bench = Bench()
    bench.begin()
    assert bench.over(1.0 - OUTSIDE - 0.001) == []
    bench.under_test.said("w-1", protocol.Examined(number=1, stacks="his own"))
    assert bench.under_test.next_deadline() == 0.0
    (found,) = bench.over(0.1)
    assert (found.report.stacks, bench.signalled) == ("his own", [])
    assert bench.under_test.next_deadline() is None


def test_who_does_not_answer_is_looked_at_from_outside_and_not_before_his_time() -> None:
    """By signal, once; his jobs are those on his scoreboard."""
    bench = Bench(seen=ev.WorkerSeen("w-1", (JobSeen("job", 1.0),)))
    bench.begin()
    assert bench.under_test.next_deadline() == 1.0 - OUTSIDE
    bench.over(1.0 - OUTSIDE)
    bench.over(1.0 - OUTSIDE / 2)
    assert bench.signalled == ["w-1"]
    bench.under_test.stacks_taken(ev.StacksTaken("w-1", "from outside"))
    (found,) = bench.over(1.0 - OUTSIDE / 2)
    assert found.report == ev.StacksTaken("w-1", "from outside", "", (JobSeen("job", 1.0),))


def test_when_nothing_comes_it_is_over_at_its_end() -> None:
    """With the reason, and without jobs where nothing is written down."""
    bench = Bench()
    bench.begin()
    bench.over(0.9)
    (found,) = bench.over(1.0)
    assert found.report == ev.StacksTaken("w-1", "", "it wrote none in time", None)


def test_who_is_stopped_is_neither_asked_nor_waited_for() -> None:
    """The answer is there at once."""
    bench = Bench(halted="it is stopped (SIGSTOP)")
    bench.begin()
    (found,) = bench.over(0.0)
    assert (found.report.missing, bench.asked) == ("it is stopped (SIGSTOP)", [])


def test_nobody_answers_for_another_nor_a_question_that_was_not_asked() -> None:
    """Late, forged and doubled answers change nothing."""
    bench = Bench()
    bench.begin()
    for worker, number in (("w-2", 1), ("w-1", 7)):
        bench.under_test.said(worker, protocol.Examined(number=number, stacks="forged"))
    assert bench.over(0.1) == []


def test_who_ends_meanwhile_has_nothing_more_to_say() -> None:
    """Nobody waits for the dead."""
    bench = Bench()
    bench.begin()
    bench.under_test.forget("w-1")
    (found,) = bench.over(0.1)
    assert found.report.missing == "it has ended"


def test_two_that_wait_for_the_same_stacks_get_the_same() -> None:
    """A second signal would garble what the first one brings."""
    bench = Bench()
    bench.begin(0.0)
    bench.begin(0.1)
    bench.over(0.95)
    assert bench.signalled == ["w-1"]
    bench.under_test.stacks_taken(ev.StacksTaken("w-1", "both"))
    assert [found.report.stacks for found in bench.over(0.96)] == ["both", "both"]
