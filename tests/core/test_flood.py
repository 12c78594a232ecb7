"""How much a worker may say: pure arithmetic."""

from __future__ import annotations

from supervisor.core.flood import MOST_BYTES, MOST_MESSAGES, WINDOW, Meter


def test_as_many_as_allowed_are_no_flood():
    """Neither in one burst nor when the burst is repeated after the window."""
    meter = Meter()
    for now in (0.0, WINDOW + 0.1, 2 * WINDOW + 0.2):
        assert not any(meter.take(now, 1) for _ in range(MOST_MESSAGES))
    assert meter.take(2 * WINDOW + 0.2, 1)


def test_bytes_count_as_messages_do():
    """A few large ones are as bad as many small ones."""
    meter = Meter()
    assert not meter.take(5.0, MOST_BYTES)
    assert meter.take(5.0, 1)


def test_what_is_written_weighs_more():
    """A message that goes into the log counts as several."""
    meter = Meter()
    assert not meter.take(0.0, 1, MOST_MESSAGES)
    assert meter.take(0.0, 1)


def test_what_came_at_once_after_a_standstill_is_no_flood():
    """The supervisor slept, and its queue holds what has come meanwhile: far below the limit."""
    meter = Meter()
    assert not any(meter.take(3600.0, 200) for _ in range(2_000))
