"""What servers show of a worker's connections."""

from __future__ import annotations

from supervisor.protocol import MAX_NAME, application_name

TOKEN = "0123456789abcdef0123456789abcdef"


def test_it_tells_supervisor_group_and_worker():
    """And the end of its token, by which it is one process's and no other's."""
    assert application_name("orders", "jobs-3", TOKEN) == "orders/jobs-3#89abcdef"


def test_a_name_that_is_too_long_keeps_what_tells_workers_apart():
    """The server would cut off its end."""
    long = application_name("s" * 64, f"{'g' * 40}-17", TOKEN)
    assert (len(long), long.endswith(f"{'g' * 40}-17#89abcdef")) == (MAX_NAME, True)
    assert long.startswith("sss")
    longest = application_name("s" * 64, f"{'g' * 64}-17", TOKEN)
    assert (len(longest), longest.endswith("g-17#89abcdef")) == (MAX_NAME, True)
