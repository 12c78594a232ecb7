"""The pool's decisions one by one: events with times in, a list of actions out."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from workers.pool.settings import Settings
from workers.pool.state import (
    LOOK,
    Check,
    Close,
    Cut,
    Dial,
    Failure,
    Overdue,
    PoolState,
    Reason,
    Request,
    Slot,
    SlotState,
    Wake,
)


class Pool:
    """The decisions, with a script's shorthand."""

    def __init__(self, **settings: Any) -> None:
        self.state = PoolState(Settings(**settings))
        self.owners = 0

    def ask(self, now: float, deadline: float = inf) -> tuple[Request, Any]:
        """Ask as a new owner."""
        self.owners += 1
        request = Request(self.owners, (), deadline)
        return request, self.state.ask(request, now)

    def opened(self, now: float, draw: float = 0.5) -> Slot:
        """Open one connection and leave it idle."""
        request, (dial,) = self.ask(now)
        assert self.state.dialled(dial.slot, object(), now, draw) == [Wake(request)]
        assert self.state.give(dial.slot, now) is None
        assert isinstance(dial.slot, Slot)
        return dial.slot

    def lent(self, now: float) -> Slot:
        """Open one connection and keep it."""
        request, (dial,) = self.ask(now)
        assert isinstance(dial, Dial)
        self.state.dialled(dial.slot, object(), now, 0.5)
        slot = request.slot
        assert isinstance(slot, Slot)
        return slot


def test_an_ask_with_nothing_idle_dials():
    """The slot is taken before the dial, and the first waiter gets what it brings."""
    pool = Pool(max_open=1)
    first, (dial,) = pool.ask(0.0)
    second, nothing = pool.ask(0.0)
    assert isinstance(dial, Dial)
    assert nothing == []
    assert pool.state.stats().open == 1
    assert pool.state.dialled(dial.slot, object(), 1.0, 0.0) == [Wake(first)]
    assert first.slot is dial.slot
    assert not second.done


def test_a_return_goes_to_the_first_waiter_not_to_the_stack():
    """Direct hand-off: the connection is lent on before it could be idle."""
    pool = Pool(max_open=1)
    slot = pool.lent(0.0)
    waiter, _ = pool.ask(1.0)
    assert pool.state.give(slot, 2.0) is waiter
    assert waiter.slot is slot
    assert pool.state.idle == []
    stats = pool.state.stats()
    assert (stats.wait_count, stats.wait_seconds) == (1, 1.0)


def test_a_waiter_that_only_waits_for_its_own_dial_has_not_waited():
    """As in Go: wait_count counts those for whom there was no room."""
    pool = Pool()
    pool.opened(0.0)
    assert pool.state.stats().wait_count == 0


def test_a_slot_is_free_only_when_the_close_has_finished():
    """Until then nothing is dialled in its place."""
    pool = Pool(max_open=1)
    slot = pool.lent(0.0)
    pool.ask(1.0)
    assert pool.state.begin_return(slot, 2.0)
    assert pool.state.returned(slot, 2.0, sound=False) == [Close(slot, Reason.BROKEN)]
    assert pool.state.stats().open == 1
    (dial,) = pool.state.closed(slot, 3.0)
    assert isinstance(dial, Dial)


def test_the_pause_after_a_failed_dial_is_a_part_of_the_absence():
    """Short after a blip, a second at most while somebody waits, and never without a pause."""
    pool = Pool(max_open=1)
    _, (dial,) = pool.ask(0.0)
    for now, pause in ((0.0, 0.01), (0.3, 0.01), (2.0, 0.04), (10.0, 0.2), (100.0, 1.0)):
        assert pool.state.dial_failed(dial.slot, OSError(), now, 0.5, final=False) == []
        assert pool.state.due == pytest.approx(now + pause)
        assert pool.state.tick(now + pause * 0.9) == []
        actions: list[Any] = pool.state.tick(now + pause * 1.1)
        assert [type(action) for action in actions] == [Dial]
        (dial,) = actions


def test_the_pause_is_drawn_so_that_workers_do_not_dial_together():
    """Half as long to half as long again."""
    for draw, pause in ((0.0, 0.5), (0.999, 1.499)):
        pool = Pool(max_open=1)
        _, (dial,) = pool.ask(0.0)
        pool.state.dial_failed(dial.slot, OSError(), 100.0, draw, final=False)
        assert pool.state.due == pytest.approx(100.0 + pause)


def test_a_minimum_that_nobody_waits_for_is_in_no_hurry():
    """Ten seconds between two tries of a server that has been away long."""
    pool = Pool(min=1)
    (dial,) = pool.state.resize(pool.state.settings, 0.0)
    assert isinstance(dial, Dial)
    pool.state.dial_failed(dial.slot, OSError(), 5000.0, 0.5, final=True)
    pool.state.tick(5000.0)
    assert pool.state.due == pytest.approx(5010.0)
    _, actions = pool.ask(5001.5)
    assert [type(action) for action in actions] == [Dial], "but whoever asks is"


def test_a_lifetime_is_drawn_once_within_the_last_fifth():
    """And looked at again only by the clock."""
    for draw, lifetime in ((0.0, 100.0), (0.5, 90.0), (0.999, 80.02)):
        pool = Pool(max_lifetime=100.0)
        slot = pool.opened(0.0, draw)
        assert slot.expires_at == pytest.approx(lifetime)


def test_one_broken_connection_makes_the_others_of_its_time_suspect():
    """They are tried before they are lent; those opened later are not to blame."""
    pool = Pool(max_open=3)
    old, broken, spare = pool.lent(0.0), pool.lent(0.0), pool.lent(0.0)
    pool.state.give(old, 0.0)
    pool.state.begin_return(broken, 0.1)
    pool.state.returned(broken, 0.1, sound=False)
    assert pool.state.take(0.2, 9, ()) is old
    assert old.state is SlotState.CHECKING
    request = Request(9, (), inf)
    assert pool.state.second_look(old, request, 0.2) == []
    assert pool.state.must_answer(old, 0.2)
    assert pool.state.checked(old, request, 0.3, sound=True) == []
    assert (old.state, old.generation) == (SlotState.LENT, pool.state.generation)
    assert pool.state.give(spare, 0.3) is LOOK, "what was lent through it is suspect too"


def test_a_deaf_connection_condemns_the_others_of_its_time():
    """One check is paid for, not one for each of them."""
    pool = Pool(max_open=3)
    slots = [pool.lent(0.0) for _ in range(3)]
    for slot in slots:
        pool.state.give(slot, 0.0)
    taken = pool.state.take(50.0, 9, ())
    assert taken is not None
    request = Request(9, (), inf)
    pool.state.second_look(taken, request, 50.0)
    actions = pool.state.checked(taken, request, 51.0, sound=False, deaf=True)
    assert sorted(action.slot.number for action in actions if isinstance(action, Close)) == [
        1,
        2,
        3,
    ]
    assert pool.state.idle == []
    assert list(pool.state.waiting) == [request], "and its asker is first in line"


def test_who_got_a_bad_connection_keeps_its_place():
    """It is before everybody who came later."""
    pool = Pool(max_open=1)
    pool.opened(0.0)
    slot = pool.state.take(50.0, 9, ())
    assert slot is not None
    unlucky = Request(9, (), inf)
    pool.state.second_look(slot, unlucky, 50.0)
    later, _ = pool.ask(50.5)
    pool.state.checked(slot, unlucky, 51.0, sound=False)
    assert list(pool.state.waiting) == [unlucky, later]


def test_a_round_trip_that_takes_too_long_is_cut_once():
    """At its asker's deadline or after a second, whichever comes first."""
    for deadline, cut_at in ((inf, 51.0), (50.2, 50.2)):
        pool = Pool()
        pool.opened(0.0)
        slot = pool.state.take(50.0, 9, ())
        assert slot is not None
        pool.state.second_look(slot, Request(9, (), deadline), 50.0)
        pool.state.guard(slot, 50.0, deadline)
        assert pool.state.due <= cut_at
        assert pool.state.tick(cut_at - 0.01) == []
        assert pool.state.tick(cut_at) == [Cut(slot)]
        assert pool.state.tick(cut_at + 1) == []


def test_a_loan_is_overdue_once():
    """At its threshold, with what was known of it then."""
    pool = Pool(leak_threshold=5.0)
    slot = pool.lent(10.0)
    assert pool.state.tick(14.9) == []
    assert pool.state.due == 15.0
    assert pool.state.tick(15.0) == [Overdue(slot, 10.0, slot.owner, ())]
    assert pool.state.tick(30.0) == []
    assert pool.state.stats().leaks == 1


def test_a_pool_at_rest_is_left_alone():
    """With nothing lent, the next turn is when the idle connection leaves."""
    pool = Pool(max_idle_time=600.0, max_lifetime=0.0, leak_threshold=5.0)
    slot = pool.opened(0.0)
    assert pool.state.tick(5.0) == []
    assert pool.state.due == 600.0
    assert pool.state.tick(600.0) == [Close(slot, Reason.IDLE_TIME)]
    pool.state.closed(slot, 600.0)
    assert pool.state.tick(600.0) == []
    assert pool.state.due == inf


def test_keepalive_tries_what_is_idle_and_lets_it_age():
    """A try does not make it less idle."""
    pool = Pool(keepalive=10.0, max_idle_time=25.0, max_lifetime=0.0)
    slot = pool.opened(0.0)
    for now in (10.0, 20.0):
        assert pool.state.tick(now) == [Check(slot)]
        assert pool.state.checked(slot, None, now, sound=True) == []
    assert pool.state.tick(25.0) == [Close(slot, Reason.IDLE_TIME)]


def test_the_deadlock_rule_needs_every_connection_in_the_circle():
    """One holder who does not wait may give back at any time: nobody is failed."""
    pool = Pool(max_open=2)
    mine, other = pool.lent(0.0), pool.lent(0.0)
    first, _ = pool.ask(1.0)
    assert pool.state.keeps(first, [(mine, mine.lent_at)], 1.0) == []
    second, _ = pool.ask(2.0)
    assert pool.state.keeps(second, [(other, other.lent_at)], 2.0) == [Wake(second)]
    assert second.failure is Failure.DEADLOCK
    assert not first.done


def test_the_deadlock_rule_does_not_believe_an_old_loan():
    """A connection that went to somebody else meanwhile is not held by who had it."""
    pool = Pool(max_open=1)
    slot = pool.lent(0.0)
    before = slot.lent_at
    other, _ = pool.ask(1.0)
    assert pool.state.give(slot, 2.0) is other
    waiter, _ = pool.ask(3.0)
    assert pool.state.keeps(waiter, [(slot, before)], 3.0) == []


def test_close_refuses_at_once_what_comes_later():
    """After close every ask fails, and every end of a dial is closed."""
    pool = Pool(max_open=1)
    waiter, (dial,) = pool.ask(0.0)
    assert pool.state.close() == [Wake(waiter)]
    assert waiter.failure is Failure.CLOSED
    late, actions = pool.ask(1.0)
    assert (late.failure, actions) == (Failure.CLOSED, [])
    assert pool.state.outstanding == 0, "a dial is not waited for"
    assert pool.state.dialled(dial.slot, object(), 2.0, 0.5) == [
        Close(dial.slot, Reason.POOL_CLOSED)
    ]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_open": 0}, "max_open must be a whole number of at least 1, not 0"),
        ({"max_open": 2.5}, "max_open must be a whole number"),
        ({"max_idle": 11}, r"max_idle must be between 0 and max_open \(10\), not 11"),
        ({"min": -1}, "min must be between 0 and max_open"),
        ({"acquire_timeout": -1}, "acquire_timeout must be a number of seconds"),
        ({"leak_threshold": float("nan")}, "leak_threshold must be a number of seconds"),
        ({"max_lifetime": "30m"}, "max_lifetime must be a number of seconds"),
        ({"connect_timeout": 0}, "connect_timeout must be a number of seconds above 0"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(settings, what):
    """With its value and what it would have to be."""
    with pytest.raises(ValueError, match=what):
        Settings(**settings)


def test_max_idle_and_min_follow_max_open_down():
    """A pool that shrinks needs no second setting."""
    settings = Settings(max_open=10, max_idle=8, min=5).changed(max_open=3)
    assert (settings.max_open, settings.max_idle, settings.min) == (3, 3, 3)
    assert Settings().changed(max_open=30).max_idle is None


def test_a_check_that_ends_after_the_close_is_answered_by_the_failure_alone():
    """Found by the state machine: the asker was told of the close and had the connection as well."""
    pool = Pool()
    slot = pool.opened(0.0)
    request, _ = pool.ask(1000.0)
    assert request.slot is slot
    assert slot.state is SlotState.CHECKING
    pool.state.close()

    actions = pool.state.checked(slot, request, 1000.1, sound=True)

    assert request.failure is Failure.CLOSED
    answer: object = request.slot
    assert answer is None
    assert actions == [Close(slot, Reason.POOL_CLOSED)]
