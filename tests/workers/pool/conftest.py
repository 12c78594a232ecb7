"""What the pool's tests share."""

from __future__ import annotations

import pytest

from workers.context import Context


@pytest.fixture(scope="session", autouse=True)
def deadline_thread() -> None:
    """Have the one thread for deadlines there from the start: it is no test's own."""
    Context.background().with_timeout(60).on_done(lambda: None)()
