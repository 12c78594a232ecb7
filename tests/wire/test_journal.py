"""The journal: numbered events in a ring, and followers that lose nothing without being told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.journal import Journal


def journal(count: int, capacity: int = 5) -> Journal:
    """Return a journal in which events 1 to `count` have happened."""
    found = Journal(capacity)
    for number in range(1, count + 1):
        found.append({"n": number})
    return found


def numbers(batch) -> list[int]:
    """Return the numbers of the events in a batch."""
    return [event["n"] for event in batch.events]


def test_an_empty_journal():
    """There is nothing, and nothing was missed."""
    batch = journal(0).after(0, 10)
    assert (batch.events, batch.last, batch.missed, batch.ended) == ([], 0, 0, False)


def test_events_come_oldest_first_and_only_once():
    """Whoever asks after the last number that it has gets what is new."""
    found = journal(3)
    assert numbers(found.after(0, 2)) == [1, 2]
    assert numbers(found.after(2, 2)) == [3]
    assert found.after(3, 2).events == []
    assert found.after(3, 2).last == 3


def test_what_fell_off_the_ring_is_counted():
    """A follower that was too slow learns how many events it will never see."""
    batch = journal(12).after(3, 10)
    assert numbers(batch) == [8, 9, 10, 11, 12]
    assert (batch.missed, batch.last) == (4, 12)


def test_a_number_of_the_future_is_the_present():
    """A follower of an earlier supervisor knows higher numbers; it gets what comes from now on."""
    found = journal(3)
    assert (found.after(99, 10).events, found.after(99, 10).last) == ([], 3)
    found.append({"n": 4})
    assert numbers(found.after(3, 10)) == [4]
    assert numbers(found.after(-7, 10)) == [1, 2, 3, 4]


def test_the_end_is_told_with_the_last_event_only():
    """Whoever has not read so far yet is told later."""
    found = journal(4)
    assert not found.after(0, 10).ended
    found.ended = True
    assert not found.after(0, 3).ended
    assert found.after(3, 1).ended
    assert found.after(4, 1).ended


@given(
    capacity=st.integers(1, 8),
    steps=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=30),
)
def test_a_follower_sees_each_event_once_in_order_or_is_told_what_it_missed(capacity, steps):
    """However fast events come and however slowly it reads: seen and missed are all there is."""
    found = Journal(capacity)
    happened = after = missed = 0
    seen: list[int] = []
    for new, limit in [*steps, (0, 100)]:
        for _ in range(new):
            happened += 1
            found.append({"n": happened})
        batch = found.after(after, limit)
        assert len(batch.events) <= limit
        assert after <= batch.last <= happened
        seen += numbers(batch)
        missed += batch.missed
        after = batch.last
    assert seen == sorted(set(seen))
    assert after == found.last == happened
    assert len(seen) + missed == happened
