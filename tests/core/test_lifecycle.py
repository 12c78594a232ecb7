"""The table of a worker's states, walked whole: every pair has an outcome that somebody chose."""

from __future__ import annotations

from typing import get_args

import pytest

from supervisor.core import events as ev
from supervisor.core.lifecycle import (
    DECISIONS,
    TRANSITIONS,
    Decision,
    State,
    after_decision,
    after_report,
)
from supervisor.errors import InvariantError

REPORTS: list[ev.WorkerEvent] = [
    ev.WorkerBorn("w", 1),
    ev.WorkerNotBorn("w", ""),
    ev.WorkerRegistered("w"),
    ev.WorkerReady("w"),
    ev.WorkerAcknowledged("w"),
    ev.WorkerDrained("w"),
    ev.WorkerFailed("w", "", ""),
    ev.WorkerLeaving("w", ""),
    ev.StacksTaken("w", ""),
    ev.WorkerUnreachable("w", "main", ""),
    ev.WorkerReachable("w", "main"),
    ev.WorkerExited("w", code=0),
    ev.WorkerSeen("w"),
    ev.WorkerDelayed("w", 1.0),
]

# The table once more, in another shape: a change of one must be a change of both.
# Columns as in REPORTS; "." is ignored, "=" is heard and changes nothing.
EXPECTED = """
            born     not_born registered  ready acknowledged drained failed  leaving stacks unreach. reach. exited seen delayed
SPAWNING    STARTING EXITED   .           .     .            .       .       .       .      .        .      .      .    .
DOOMED      EVICTED  EXITED   .           .     .            .       .       .       .      .        .      .      .    .
ABANDONED   EVICTED  EXITED   .           .     .            .       .       .       .      .        .      .      .    .
STARTING    .        .        REGISTERED  .     .            .       .       =       .      .        .      EXITED .    .
REGISTERED  .        .        .           READY .            DRAINED FAILING =       .      =        =      EXITED .    =
READY       .        .        .           .     .            DRAINED FAILING =       .      =        =      EXITED =    .
SUSPECT     .        .        .           .     .            DRAINED FAILING =       =      =        =      EXITED .    .
FAILING     .        .        .           .     .            DRAINED .       =       .      .        .      EXITED .    .
CANCELLING  .        .        .           .     DRAINING     DRAINED =       .       .      .        .      EXITED .    .
EVICTED     .        .        TERMINATING .     .            .       .       .       .      .        .      EXITED .    .
TERMINATING .        .        .           .     DRAINING     DRAINED =       .       .      .        .      EXITED .    .
DRAINING    .        .        .           .     .            DRAINED =       .       .      .        .      EXITED .    .
DRAINED     .        .        .           .     .            .       .       .       .      .        .      EXITED .    .
DUMPING     .        .        .           .     .            .       .       .       =      .        .      EXITED .    .
KILLED      .        .        .           .     .            .       .       .       .      .        .      EXITED .    .
EXITED      .        .        .           .     .            .       .       .       .      .        .      .      .    .
"""

# The same for decisions; "!" is a bug.
EXPECTED_DECISIONS = """
            suspect cancel      terminate   give_up   take_stacks kill
SPAWNING    !       DOOMED      !           ABANDONED !           !
DOOMED      !       =           !           ABANDONED !           !
ABANDONED   !       =           !           !         !           !
STARTING    !       EVICTED     !           !         DUMPING     !
REGISTERED  !       CANCELLING  !           !         !           !
READY       SUSPECT CANCELLING  !           !         !           !
SUSPECT     !       CANCELLING  !           !         !           !
FAILING     !       CANCELLING  !           !         DUMPING     !
CANCELLING  !       =           TERMINATING !         DUMPING     !
EVICTED     !       =           !           !         DUMPING     !
TERMINATING !       =           !           !         DUMPING     !
DRAINING    !       =           !           !         DUMPING     !
DRAINED     !       =           !           !         DUMPING     !
DUMPING     !       =           !           !         !           KILLED
KILLED      !       =           !           !         !           !
EXITED      !       !           !           !         !           !
"""


def cells(table: str) -> list[tuple[State, int, str]]:
    """Return (state, column, word) for each cell of a table above."""
    rows = [line.split() for line in table.strip("\n").splitlines()[1:]]
    return [(State[row[0]], n, word) for row in rows for n, word in enumerate(row[1:])]


def word(before: State, after: State | None, nothing: str) -> str:
    """Return how the tables above write an outcome."""
    if after is None:
        return nothing
    return "=" if after is before else after.name


@pytest.mark.parametrize(("state", "column", "expected"), cells(EXPECTED))
def test_every_report_in_every_state(state: State, column: int, expected: str) -> None:
    """Each report moves the worker, is heard where it stands, or is ignored, as chosen."""
    assert word(state, after_report(state, REPORTS[column]), ".") == expected


@pytest.mark.parametrize(("state", "column", "expected"), cells(EXPECTED_DECISIONS))
def test_every_decision_in_every_state(state: State, column: int, expected: str) -> None:
    """Each decision moves the worker, leaves it where it stands, or is a bug, as chosen."""
    decision = list(Decision)[column]
    if expected == "!":
        with pytest.raises(InvariantError, match=f"BUG: {decision.value} .* {state.name}"):
            after_decision(state, decision)
    else:
        assert word(state, after_decision(state, decision), "!") == expected


def test_the_tables_above_leave_nothing_out() -> None:
    """All states, all reports and all decisions are in them."""
    assert {type(report) for report in REPORTS} == set(get_args(ev.WorkerReport))
    assert len(cells(EXPECTED)) == len(State) * len(REPORTS)
    assert len(cells(EXPECTED_DECISIONS)) == len(State) * len(Decision)
    assert set(TRANSITIONS) == set(DECISIONS) == set(State)


def test_every_state_can_be_reached() -> None:
    """From SPAWNING, by what is reported and decided."""
    reached, news = {State.SPAWNING}, {State.SPAWNING}
    while news:
        nexts = {after for state in news for after in TRANSITIONS[state].values()}
        nexts |= {after for state in news for after in DECISIONS[state].values()}
        news = nexts - reached
        reached |= news

    assert reached == set(State)


def test_exited_is_absorbing() -> None:
    """Nothing is heard of and nothing is decided about a worker that has gone."""
    assert (dict(TRANSITIONS[State.EXITED]), dict(DECISIONS[State.EXITED])) == ({}, {})


def test_the_end_is_heard_in_every_state() -> None:
    """A process can end at any time; what is not born can turn out never to be."""
    for state in set(State) - {State.EXITED}:
        ends = {after for after in TRANSITIONS[state].values() if after is State.EXITED}
        assert ends == {State.EXITED}, state


def test_nothing_but_a_decision_kills() -> None:
    """No report leads to KILLED: words do not kill."""
    assert not [s for s, reports in TRANSITIONS.items() if State.KILLED in reports.values()]


def test_the_way_to_a_kill_is_bounded() -> None:
    """By decisions alone no state comes back, so no chain of them is longer than the states."""

    def steps(state: State, seen: frozenset[State]) -> int:
        assert state not in seen
        nexts = [after for after in DECISIONS[state].values() if after is not state]
        return 1 + max((steps(after, seen | {state}) for after in nexts), default=0)

    assert max(steps(state, frozenset()) for state in State) <= len(State)


def test_shown_words_are_those_of_the_interface() -> None:
    """`status` knows no others."""
    assert {state.shown for state in State} == {
        "starting",
        "ready",
        "draining",
        "drained",
        "exited",
        "failed",
    }
