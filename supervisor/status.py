"""The fleet at a glance: what the workers have reported last, who waits for a status, its words."""

from __future__ import annotations

__all__ = ["Answer", "Reports", "fleet_status", "is_stopped", "rss"]

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from supervisor import protocol
from supervisor.core.fleet import FleetSnapshot, GroupSnapshot, WorkerSnapshot

# Workers answer an inquiry from their link's thread, in a millisecond; one that holds the
# interpreter lock is shown with what it said last.
INQUIRY_DUE = 0.25
PAGE = os.sysconf("SC_PAGE_SIZE")

Answer = Callable[[dict[str, Any]], object]  # takes the status to whoever has asked for it


@dataclass(slots=True)
class _Inquiry:
    """A status that waits for the workers' reports."""

    answers: list[Answer]
    waiting: set[str]
    due: float


class Reports:
    """The last report of each worker, and the inquiries that are under way."""

    def __init__(self) -> None:
        self._last: dict[str, protocol.Report] = {}
        self._inquiries: dict[int, _Inquiry] = {}
        self._serial = 0

    def next_serial(self) -> int:
        """Return the number of the next inquiry."""
        self._serial += 1
        return self._serial

    def inquire(self, serial: int, answers: list[Answer], asked: Iterable[str]) -> None:
        """Wait for those who were asked; who does not answer in time is not waited for."""
        waiting = set(asked)
        due = time.monotonic() + (INQUIRY_DUE if waiting else 0.0)
        self._inquiries[serial] = _Inquiry(answers, waiting, due)

    def heard(self, worker: str, report: protocol.Report) -> None:
        """Take a worker's report."""
        self._last[worker] = report
        inquiry = self._inquiries.get(report.number)
        if inquiry is not None:
            inquiry.waiting.discard(worker)

    def forget(self, worker: str) -> None:
        """A worker has ended."""
        self._last.pop(worker, None)
        for inquiry in self._inquiries.values():
            inquiry.waiting.discard(worker)

    def last(self, worker: str) -> protocol.Report | None:
        """Return what a worker has said last, None where it has not said anything."""
        return self._last.get(worker)

    def next_deadline(self) -> float | None:
        """Return when the first inquiry is answered at the latest."""
        return min((inquiry.due for inquiry in self._inquiries.values()), default=None)

    def answerable(self, now: float) -> list[Answer]:
        """Return what answers those who are to be answered now, and forget that they have asked."""
        ripe = [n for n, inquiry in self._inquiries.items() if inquiry.due <= now]
        ripe += [n for n, inquiry in self._inquiries.items() if not inquiry.waiting]
        return [
            answer
            for number in dict.fromkeys(ripe)
            for answer in self._inquiries.pop(number).answers
        ]

    def open_connections(self, pools: Iterable[str]) -> dict[str, int]:
        """Return how many connections the workers have said that these pools have."""
        opened = dict.fromkeys(pools, 0)
        for report in self._last.values():
            for pool, stats in report.pools.items():
                if pool in opened:
                    opened[pool] += stats.open
        return opened


def fleet_status(
    fleet: FleetSnapshot, reports: Reports, started: str, now: float
) -> dict[str, Any]:
    """Return the fleet as `status --json` shows it; `started` is when its supervisor was."""
    return {
        "state": fleet.state,
        "generation": fleet.generation,
        "started": started,
        "deadline_in_seconds": None if fleet.deadline is None else round(fleet.deadline - now, 3),
        "outstanding": list(fleet.outstanding) if fleet.deadline is not None else [],
        "groups": {group.name: _group_status(group, now) for group in fleet.groups},
        "workers": [
            _worker_status(worker, reports.last(worker.id), now) for worker in fleet.workers
        ],
        "roll": None if fleet.roll is None else asdict(fleet.roll),
    }


def _group_status(group: GroupSnapshot, now: float) -> dict[str, Any]:
    next_restart, outage = group.next_restart, group.waiting_for
    return {
        "count": group.count,
        "ready": group.ready,
        "state": group.state,
        "restarts": group.restarts,
        "failure": group.failure,
        "cause": group.cause,
        "finished": group.finished,
        "ends_in_seconds": None if group.ends_by is None else round(group.ends_by - now, 3),
        "waiting_for": None if outage is None else {"pool": outage.pool, "error": outage.error},
        "next_restart_in_seconds": (
            None if next_restart is None else round(max(0.0, next_restart - now), 3)
        ),
    }


def _worker_status(
    worker: WorkerSnapshot, report: protocol.Report | None, now: float
) -> dict[str, Any]:
    return {
        "id": worker.id,
        "group": worker.group,
        "pid": worker.pid,
        "generation": worker.generation,
        "state": worker.state,
        "ready": worker.ready,
        "stopped": is_stopped(worker.pid),
        "in_flight": report.in_flight if report else 0,
        "jobs_done": report.jobs_done if report else 0,
        "jobs_failed": report.jobs_failed if report else 0,
        "restarts": worker.restarts,
        "uptime_seconds": round(now - worker.spawned_at, 3),
        "rss_bytes": rss(worker.pid) + rss((report and report.program_pid) or None),
        "pools": protocol.to_builtins(report.pools) if report else {},
        "status": report.status if report else "",
        "program_pid": (report and report.program_pid) or None,
    }


def rss(pid: int | None) -> int:
    """Return resident bytes, 0 for a process that is not there (any more)."""
    if pid is None:
        return 0
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return 0


def is_stopped(pid: int | None) -> bool:
    """Tell whether a process is stopped, by SIGSTOP or by a debugger."""
    if pid is None:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in {b"T", b"t"}
    except (OSError, IndexError):
        return False
