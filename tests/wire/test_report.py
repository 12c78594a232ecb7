"""The tables that people read: what stands in them, in whatever terminal."""

from __future__ import annotations

from typing import Any

from supervisor.report import status_table

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
