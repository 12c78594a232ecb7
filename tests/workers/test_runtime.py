"""A worker's own times in a stop."""

from __future__ import annotations

from workers.runtime import _close_limit


def test_half_of_the_time_for_aborting_is_kept_for_the_way_out():
    """Between the moment at which work in flight is cancelled and the deadline."""
    assert _close_limit(abort_at=20.0, deadline=30.0, now=5.0) == 25.0


def test_a_stop_that_is_hurried_leaves_half_of_what_there_is():
    """The moment for aborting has passed: what is lent has until half-way from now all the same."""
    assert _close_limit(abort_at=-4.0, deadline=5.5, now=5.0) == 5.25
    assert _close_limit(abort_at=5.0, deadline=5.5, now=5.0) == 5.25
