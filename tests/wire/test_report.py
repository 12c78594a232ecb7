"""The tables that people read: what stands in them, in whatever terminal."""

from __future__ import annotations

import io
from typing import Any, cast

import pytest

from supervisor.client import Client
from supervisor.core.actions import Finish, Outcome
from supervisor.errors import SupervisorError
from supervisor.protocol import Accepted, EventBatch
from supervisor.report import status_table, stop_summary
from supervisor.rolling import follow

WORKER = {
    "id": "web-1",
    "state": "ready",
    "stopped": False,
    "pid": 4711,
    "generation": 1,
    "in_flight": 0,
    "jobs_done": 0,
    "restarts": 0,
    "uptime_seconds": 1.0,
    "rss_bytes": 1 << 20,
    "pools": {"main": {"in_use": 0, "open": 0, "max_open": 10, "waiting": 1}},
    "status": "",
}


def group(state: str, **more: Any) -> dict[str, Any]:
    shown = {"count": 1, "ready": 0, "restarts": 0, "failure": "", "cause": "", "waiting_for": None}
    return {**shown, "state": state, "next_restart_in_seconds": None, **more}


def lines(**groups: dict[str, Any]) -> list[str]:
    """Return the table of a status with these groups."""
    status = {
        "name": "orders",
        "state": "starting",
        "generation": 1,
        "pid": 4710,
        "started": "2026-11-24T16:46:13.000000Z",
        "outstanding": [],
        "budgets": {},
        "groups": groups,
        "workers": [WORKER, {**WORKER, "id": "web-2", "pools": {}, "status": "warm-up"}],
    }
    return status_table(status).splitlines()


def test_a_long_note_does_not_widen_the_lines_of_the_others() -> None:
    """A terminal of 80 columns wraps the one line that is long, and no other."""
    outage = {"pool": "main", "error": "connection refused " * 20}
    shown = lines(web=group("ready"), jobs=group("waiting", waiting_for=outage))
    assert [line for line in shown if line != line.rstrip()] == []
    (long,) = [line for line in shown if len(line) > 100]
    assert long.startswith("jobs")


def test_a_group_that_waits_says_for_what() -> None:
    """For a pool, or for what is to run to its end first."""
    outage = {"pool": "main", "error": "refused"}
    shown = lines(web=group("waiting", waiting_for=outage), jobs=group("waiting"))
    assert [line.split() for line in shown if "waiting  " in line] == [
        ["web", "waiting", "0/1", "0", "pool", "main:", "refused"],
        ["jobs", "waiting", "0/1", "0", "for", "what", "runs", "before", "it"],
    ]


def test_a_group_says_what_of_it_has_finished_and_what_the_others_wait_for() -> None:
    """Those that have all finished say so by their state."""
    shown = lines(
        web=group("ready", finished=1, ends_in_seconds=None),
        once=group("finished", finished=1, ends_in_seconds=None),
        migrate=group("starting", finished=0, ends_in_seconds=59.4),
    )
    assert [line.split()[4:] for line in shown if line.split()[2:3] == ["0/1"]] == [
        ["1", "finished"],
        [],
        ["the", "others", "wait", "for", "it,", "59", "s", "at", "most"],
    ]


def test_what_a_worker_did_before_the_stop_has_no_time_in_it() -> None:
    """One that was being replaced already had acknowledged: before, not after -2.8 s."""
    outcome = Outcome("web-1", -2.8, 0.004, 0.012, "", {})
    (line,) = [line for line in stop_summary(Finish(0, (outcome,))).splitlines() if "web-1" in line]
    assert line.split() == ["web-1", "before", "4.0", "ms", "12.0", "ms", "0", "0"]


class OneBatch:
    """Answers the one request with these events."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self._batch = EventBatch(events=list(events), last=len(events), missed=0, ended=False)

    def ask(self, _request: object, _timeout: float | None = None) -> EventBatch:
        return self._batch


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"worker": "web-2", "error": "it raised"}, "scale failed: web-2: it raised"),
        ({"error": "superseded by a reload"}, "scale failed: superseded by a reload"),
    ],
)
def test_a_failure_names_the_worker_if_there_is_one(fields: dict[str, str], said: str) -> None:
    """Nothing stands between two colons."""
    client = OneBatch({"event": "scale.failed", "target": "web", "request": 3, **fields})
    accepted = Accepted(after=0, request=3)
    with pytest.raises(SupervisorError) as caught:
        follow(cast("Client", client), "scale", accepted, io.StringIO())
    assert str(caught.value) == said
