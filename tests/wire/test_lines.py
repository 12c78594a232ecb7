"""How loud an event is in the log."""

from __future__ import annotations

import pytest

from supervisor.core.actions import Announce
from supervisor.lines import Lines


def failed(group="jobs", **fields):
    """Return that a worker of this group has failed."""
    return Announce("worker.failed", {"group": group, "error": "E", "traceback": "T", **fields})


def test_an_outage_is_told_at_length_once_until_it_is_over():
    """The first try has its traceback; the others are a warning each, until the group recovers."""
    lines = Lines()
    assert lines.of(failed(pool="main")) == ("error", failed(pool="main").fields)
    for _ in range(3):
        expected = {"group": "jobs", "error": "E", "pool": "main"}
        assert lines.of(failed(pool="main")) == ("warning", expected)
    assert lines.of(failed("web", pool="main"))[0] == "error", "another group"
    assert lines.of(failed(pool="cache"))[0] == "error", "another pool"
    assert lines.of(failed())[0] == "error", "no pool is to blame"
    lines.of(Announce("group.recovered", {"group": "jobs", "was": "waiting"}))
    assert lines.of(failed(pool="main"))[0] == "error"
    assert lines.of(failed("web", pool="main"))[0] == "warning"


@pytest.mark.parametrize(
    ("cause", "level"),
    [(None, "info"), ("dependency", "info"), ("crashed", "warning"), ("killed", "warning")],
)
def test_an_end_that_says_no_other_word_is_a_warning(cause, level):
    """Who ended as it was told to, or waits for a database, has been told of already."""
    fields = {} if cause is None else {"cause": cause}
    assert Lines().of(Announce("worker.exited", fields))[0] == level


def test_everything_else_is_news():
    """What has no level of its own is information."""
    assert Lines().of(Announce("worker.ready"))[0] == "info"
    assert Lines().of(Announce("group.failed"))[0] == "error"
