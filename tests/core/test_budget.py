"""The ledger of one budget, step by step, and all of them together."""

from __future__ import annotations

import pytest

from supervisor.core.budget import Ledger, Tell, Terms
from supervisor.core.budgets import Budgets
from supervisor.errors import InvariantError

TWENTY = Terms(budget=20, expected=4, surge=1, minimum=1)


def fleet(terms: Terms, count: int, maximum: int = 10) -> Ledger:
    """Return a ledger with workers w1, w2, …"""
    ledger = Ledger(terms)
    for number in range(1, count + 1):
        ledger.join(f"w{number}", maximum)
    return ledger


def allowances(ledger: Ledger, count: int) -> list[int]:
    return [ledger.allowance_of(f"w{number}") for number in range(1, count + 1)]


def test_each_worker_begins_with_its_even_part_and_a_roll_finds_its_minimum():
    """What a roll's extra worker needs is kept from the start, and the rest is divided evenly."""
    ledger = fleet(Terms(budget=17, expected=4, surge=1, minimum=1), 4)
    assert allowances(ledger, 4) == [4, 4, 4, 4]
    assert ledger.join("new", 10) == [Tell("new", 1, 1)]


def test_nothing_is_said_while_nothing_is_scarce():
    """Workers that use what they have, come and go, cause no message to anybody."""
    ledger = fleet(TWENTY, 4)
    assert ledger.heard("w1", 1, 4, 4) == []
    assert ledger.leave("w2", settled_at=None) == []
    assert len(ledger.join("w5", 10)) == 1
    assert ledger.time_passed(1e9) == []
    assert ledger.next_deadline() is None


def test_who_wants_more_gets_what_is_free_first():
    """Leases that nobody has are handed out without asking anybody, but for what is kept."""
    ledger = fleet(TWENTY, 4)
    assert ledger.heard("w1", 1, 4, 7) == [Tell("w1", 7, 2)]
    assert ledger.free == 1


def test_who_does_not_use_his_leases_gives_them_up():
    """The richest in unused ones is asked first; only his answer makes the leases free."""
    ledger = fleet(TWENTY, 4)
    ask, raised = ledger.heard("w1", 1, 4, 9)
    assert (ask, raised) == (Tell("w2", 2, 2, unused_only=True), Tell("w1", 7, 2))
    assert ledger.granted == 19
    assert ledger.heard("w2", 1, 4, 0) == []  # an answer to something else
    assert ledger.heard("w2", 2, 2, 0) == [Tell("w1", 9, 3)]
    assert ledger.granted == 19


def test_who_uses_more_than_was_known_keeps_it():
    """`unused_only` takes nothing that is in use; the answer says how much that is."""
    ledger = fleet(TWENTY, 4)
    ledger.heard("w1", 1, 4, 9)
    next_ask, *_ = ledger.heard("w2", 2, 4, 4)
    assert ledger.allowance_of("w2") == 4
    assert (next_ask.worker, next_ask.unused_only) == ("w3", True)


def test_where_all_want_more_than_there_is_it_is_divided_evenly():
    """Max-min: nobody has two more than another one who wants them too."""
    ledger = fleet(TWENTY, 4)
    tells = [Tell(f"w{number}", 4, 1) for number in (1, 2, 3, 4)]
    for tell in tells:  # each answers, and that may make more of them
        tells += ledger.heard(tell.worker, tell.serial, tell.allowance, 10)
        assert len(tells) < 30
    assert sorted(allowances(ledger, 4)) == [4, 5, 5, 5]
    assert ledger.heard("w1", 0, 4, 10) == []


def test_what_a_killed_worker_had_counts_until_the_server_has_let_go():
    """The dead one's leases are nobody's until then; others make room for its successor."""
    ledger = fleet(TWENTY, 4)
    ledger.heard("w1", 1, 4, 7)
    assert ledger.leave("w1", settled_at=12.0) == [Tell("w2", 3, 2, unused_only=True)]
    assert (ledger.granted, ledger.next_deadline()) == (19, 12.0)
    first, *_ = ledger.join("w5", 10)
    assert first.allowance == 1
    assert ledger.time_passed(11.9) == []
    assert ledger.granted == 20
    ledger.time_passed(12.0)
    assert ledger.granted == 13


def test_who_finds_nothing_begins_with_nothing_and_gets_its_minimum_first():
    """All were killed at once: their successors wait, and are served as the server lets go."""
    ledger = fleet(Terms(4, 2, 1, 1), 2, maximum=2)
    ledger.heard("w1", 1, 1, 2)
    for worker in ("w1", "w2"):
        ledger.leave(worker, settled_at=5.0)
    first = [ledger.join(worker, 2)[0].allowance for worker in ("w3", "w4")]
    assert first == [1, 0]
    assert ledger.time_passed(5.0) == [Tell("w4", 1, 2)]


def test_what_was_not_given_back_dies_with_the_worker():
    """Told to give back and killed before its answer: all that it may have had counts."""
    ledger = fleet(TWENTY, 4)
    ledger.heard("w1", 1, 4, 7)
    ledger.change(Terms(10, 4, 1, 1))
    before, allowance = ledger.granted, ledger.allowance_of("w1")
    assert allowance < 7
    ledger.leave("w1", settled_at=5.0)
    assert ledger.granted == before


def test_others_make_room_at_once_for_one_who_finds_nothing():
    """More are here than were expected: the minimum of the last one comes from who has more."""
    ledger = fleet(Terms(4, 1, 1, 1), 2)
    assert allowances(ledger, 2) == [3, 1]
    own, *others = ledger.join("w3", 10)
    assert own == Tell("w3", 0, 1)
    assert others == [Tell("w1", 2, 2, unused_only=True)]


def test_an_answer_gives_nobody_more_than_he_had():
    """A worker that claims more, or speaks of a tell that never was, gets nothing by it."""
    ledger = fleet(TWENTY, 4)
    ledger.heard("w2", 1, 999, 0)
    ledger.heard("w2", 7, 999, 0)
    assert ledger.heard("nobody", 1, 1, 1) == []
    assert allowances(ledger, 4) == [4, 4, 4, 4]


def test_a_lower_budget_holds_once_it_is_given_back():
    """Everybody is asked, and what is in use may be finished first."""
    ledger = fleet(TWENTY, 4)
    tells = ledger.change(Terms(10, 4, 1, 1))
    assert sum(4 - tell.allowance for tell in tells) == 7
    for tell in tells:
        ledger.heard(tell.worker, tell.serial, tell.allowance, 0)
    assert ledger.granted == 9


def test_the_arithmetic_of_what_cannot_fit():
    """It is in the sentence."""
    assert Terms(5, 4, 1, 1).misfit == ""
    assert "(4 + 1) x 1 = 5 connections, and the budget is 4" in Terms(4, 4, 1, 1).misfit


def test_between_two_generations_both_fit():
    """During a roll the larger numbers count, and the smaller guarantee."""
    assert Terms(10, 2, 1, 2).joined(Terms(8, 6, 1, 1)) == Terms(10, 6, 1, 1)


def test_to_join_twice_is_a_bug():
    """It crashes loudly."""
    with pytest.raises(InvariantError):
        fleet(TWENTY, 1).join("w1", 10)


def test_pools_have_budgets_of_their_own():
    """What is said of one changes nothing in the other; one that is gone is forgotten."""
    budgets = Budgets()
    budgets.change({"a": TWENTY, "b": Terms(8, 4, 1, 1)})
    first, others = budgets.join("w1", {"a": 10, "b": 10})
    assert {pool: tell.allowance for pool, tell in first.items()} == {"a": 4, "b": 1}
    assert others == []
    assert budgets.heard("w1", "a", 1, 4, 6) == [("a", Tell("w1", 6, 2))]
    assert budgets.heard("w1", "nobody's", 1, 4, 6) == []
    assert budgets.granted() == {"a": 6, "b": 1}
    budgets.leave("w1", 3.0)
    assert budgets.next_deadline() == 3.0
    budgets.time_passed(3.0)
    assert budgets.granted() == {"a": 0, "b": 0}
    budgets.change({"a": TWENTY})
    assert budgets.terms() == {"a": TWENTY}
