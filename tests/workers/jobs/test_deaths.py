"""The word on a death: waited for, for a moment, and taken for the one whom it is about."""

from __future__ import annotations

import pytest

from supervisor.protocol import Death
from workers.jobs.deaths import WORD_WITHIN, Deaths, how_it_ended
from workers.jobs.owner import Owner

OWNER = Owner("jobs-9", 99, 5, "here")


def test_word_is_waited_for_but_not_for_ever():
    """Who died under another supervisor is never told of."""
    deaths = Deaths([])
    assert deaths.awaits_word(OWNER, 10.0)
    assert deaths.awaits_word(OWNER, 10.0 + WORD_WITHIN / 2)
    assert not deaths.awaits_word(OWNER, 10.0 + WORD_WITHIN)
    assert deaths.of(OWNER) is None


def test_word_that_has_come_is_enough():
    """Of that worker and that process: a name may come again under another supervisor."""
    told = [Death("jobs-9", 98, 7, None, True), Death("jobs-8", 99, 7, None, True)]
    deaths = Deaths(told)
    assert deaths.awaits_word(OWNER, 10.0)
    told.append(Death("jobs-9", 99, None, 11, True))
    assert not deaths.awaits_word(OWNER, 10.1)
    assert deaths.of(OWNER) is told[-1]


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (None, "has died"),
        (Death("jobs-9", 99, 7, None, True), "exited with code 7"),
        (Death("jobs-9", 99, None, 11, True), "was ended by SIGSEGV"),
        (Death("jobs-9", 99, None, 999, False), "was ended by signal 999"),
    ],
)
def test_an_end_is_said_in_words(death, words):
    """With the worker's name, and where to look."""
    expected = f"jobs-9 (pid 99) {words}; `supervisor why jobs-9` may tell more"
    assert how_it_ended(OWNER, death) == expected
