"""Restart policy: who is replaced, after how long, and when a group has failed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.core.policy import (
    JITTER,
    Intensity,
    Restart,
    RestartPolicy,
    backoff_delay,
    wants_restart,
)

seconds = st.floats(0.001, 1000.0)
draws = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("restart", "after_success", "after_failure"),
    [
        (Restart.ALWAYS, True, True),
        (Restart.ON_FAILURE, False, True),
        (Restart.NEVER, False, False),
    ],
)
def test_restart_types_mean_what_they_mean_in_systemd(
    restart: Restart, after_success: bool, after_failure: bool
) -> None:
    """Each type decides by whether the worker has failed, and by nothing else."""
    found = (wants_restart(restart, failed=False), wants_restart(restart, failed=True))

    assert found == (after_success, after_failure)


def test_the_back_off_doubles_up_to_its_maximum() -> None:
    """Without jitter it is 100 ms, 200 ms, ... and 27 s in the middle of what 30 s leaves."""
    policy = RestartPolicy(backoff=0.1, backoff_max=30.0)
    found = [round(backoff_delay(policy, attempt, lambda: 0.5), 6) for attempt in range(12)]

    assert found == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.24, 27.0, 27.0, 27.0]


@given(backoff=seconds, backoff_max=seconds, attempt=st.integers(0, 5000), draw=draws)
def test_the_back_off_stays_within_its_bounds(
    backoff: float, backoff_max: float, attempt: int, draw: float
) -> None:
    """It is within 20 % of its doubling, at most the maximum, for however many attempts."""
    policy = RestartPolicy(backoff=backoff, backoff_max=backoff_max)
    delay = backoff_delay(policy, attempt, lambda: draw)
    doubled = min(backoff * 2.0 ** min(attempt, 1000), backoff_max)

    assert math.nextafter(doubled * (1 - JITTER), 0) <= delay
    assert delay <= min(doubled * (1 + JITTER), backoff_max)


@given(attempt=st.integers(0, 50))
def test_jitter_spreads_at_every_attempt(attempt: int) -> None:
    """Workers that died together do not return together, not even at the maximum."""
    policy = RestartPolicy(backoff=0.1, backoff_max=30.0)
    delays = [backoff_delay(policy, attempt, lambda draw=draw: draw) for draw in (0.0, 0.5, 1.0)]  # type: ignore[misc]

    assert delays[0] < delays[1] < delays[2]


def test_with_five_the_sixth_failure_in_a_minute_is_too_many() -> None:
    """As INTERFACE has it."""
    policy, failures = RestartPolicy(max_restarts=5, window=60.0), Intensity()

    assert [failures.count_failure(policy, now) for now in (0, 10, 20, 30, 40, 50)] == [
        False,
        False,
        False,
        False,
        False,
        True,
    ]


def test_a_failure_that_is_a_whole_window_old_does_not_count() -> None:
    """The window is half open."""
    policy, failures = RestartPolicy(max_restarts=1, window=60.0), Intensity()
    failures.count_failure(policy, 0.0)

    assert not failures.count_failure(policy, 60.0)
    assert failures.count_failure(policy, 119.999)


def test_the_window_does_not_go_on_while_a_failure_is_waited_for() -> None:
    """Nor is any failure moved into the future by those that were waited for at the same time."""
    policy, failures = RestartPolicy(max_restarts=3, window=10.0), Intensity()
    assert not failures.count_failure(policy, 40.0, 40.0)
    assert not failures.count_failure(policy, 40.0, 40.0)
    assert failures.times == [40.0, 40.0]
    assert not failures.count_failure(policy, 85.0, 40.0)
    assert failures.times == [80.0, 80.0, 85.0]
    assert failures.count_failure(policy, 128.0, 40.0)
    assert not failures.count_failure(policy, 200.0, 1.0)


def test_with_none_allowed_the_first_is_too_many() -> None:
    """`max_restarts = 0` gives no second chance."""
    assert Intensity().count_failure(RestartPolicy(max_restarts=0), 0.0)


@given(
    gaps=st.lists(st.integers(0, 40), max_size=60),
    max_restarts=st.integers(0, 6),
    window=st.integers(1, 100),
)
def test_intensity_agrees_with_counting(gaps: list[int], max_restarts: int, window: int) -> None:
    """Against all failures ever, counted anew each time."""
    policy = RestartPolicy(max_restarts=max_restarts, window=float(window))
    failures, all_times, now = Intensity(), [], 0
    for gap in gaps:
        now += gap
        all_times.append(now)
        within = sum(now - at < window for at in all_times)

        assert failures.count_failure(policy, float(now)) == (within > max_restarts)
    assert len(failures.times) <= len(all_times)
