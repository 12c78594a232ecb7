"""The cross-process WaitGroup: every member is counted in once and counted down once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from supervisor.core.waitgroup import WaitGroup
from supervisor.errors import InvariantError


def test_members_are_outstanding_in_the_order_in_which_they_came() -> None:
    """Who is waited for is named, first come first."""
    ledger = WaitGroup()
    for member in ("b-1", "a-1", "c-1"):
        ledger.add(member)
    ledger.done("a-1")

    assert ledger.outstanding == ("b-1", "c-1")


def test_the_second_count_down_does_not_count() -> None:
    """Drained and exited are two claims of one end."""
    ledger = WaitGroup()
    ledger.add("a-1")

    assert [ledger.done("a-1"), ledger.done("a-1")] == [True, False]


@pytest.mark.parametrize("end", [False, True])
def test_nobody_is_counted_in_twice(end: bool) -> None:
    """A name that is used again, whether it has ended or not, is a bug."""
    ledger = WaitGroup()
    ledger.add("a-1")
    if end:
        ledger.done("a-1")

    with pytest.raises(InvariantError, match="a-1 was added to the WaitGroup twice"):
        ledger.add("a-1")


def test_a_stranger_cannot_be_done() -> None:
    """The counter cannot go below zero."""
    with pytest.raises(InvariantError, match="never added"):
        WaitGroup().done("a-1")


def test_who_is_outstanding_is_not_forgotten() -> None:
    """Forgetting is for those that are done."""
    ledger = WaitGroup()
    ledger.add("a-1")

    with pytest.raises(InvariantError, match="forgotten before it is done"):
        ledger.forget("a-1")
    assert ledger.outstanding == ("a-1",)


def test_a_stranger_cannot_be_forgotten() -> None:
    """Forgetting twice is a bug as well."""
    ledger = WaitGroup()
    ledger.add("a-1")
    ledger.done("a-1")
    ledger.forget("a-1")

    with pytest.raises(InvariantError, match="forgotten before it is done"):
        ledger.forget("a-1")


@given(st.integers(1, 200))
def test_the_ledger_does_not_grow_with_those_that_have_ended(members: int) -> None:
    """A thousand restarts leave nothing behind."""
    ledger = WaitGroup()
    for number in range(members):
        ledger.add(f"a-{number}")
        ledger.done(f"a-{number}")
        ledger.forget(f"a-{number}")

    assert (ledger.outstanding, ledger._done) == ((), set())


class Ledger(RuleBasedStateMachine):
    """Any order of calls, held against two plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = WaitGroup()
        self.outstanding: list[str] = []
        self.ended: set[str] = set()

    @rule(member=st.sampled_from("abcd"))
    def add(self, member: str) -> None:
        if member in self.outstanding or member in self.ended:
            with pytest.raises(InvariantError):
                self.ledger.add(member)
        else:
            self.ledger.add(member)
            self.outstanding.append(member)

    @rule(member=st.sampled_from("abcd"))
    def done(self, member: str) -> None:
        if member in self.outstanding:
            assert self.ledger.done(member)
            self.outstanding.remove(member)
            self.ended.add(member)
        elif member in self.ended:
            assert not self.ledger.done(member)
        else:
            with pytest.raises(InvariantError):
                self.ledger.done(member)

    @rule(member=st.sampled_from("abcd"))
    def forget(self, member: str) -> None:
        if member in self.ended:
            self.ledger.forget(member)
            self.ended.remove(member)
        else:
            with pytest.raises(InvariantError):
                self.ledger.forget(member)

    @invariant()
    def outstanding_is_who_was_added_and_is_not_done(self) -> None:
        assert tuple(self.outstanding) == self.ledger.outstanding


TestLedger = Ledger.TestCase
