"""Jobs in flight as they are seen from outside, and how long each may take. Pure arithmetic."""

from __future__ import annotations

__all__ = ["JobSeen", "limit_of", "told"]

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class JobSeen:
    """One job that a worker has declared. Times are absolute CLOCK_MONOTONIC.

    `until` is what `busy_until` has declared last, 0 where nothing was. `thread` is the ident of
    the thread that began it, by which its stack is found; 0 where that is not known.
    """

    name: str
    since: float
    until: float = 0.0
    thread: int = 0


def limit_of(job: JobSeen, hang_timeout: float, watched_since: float) -> float:
    """Return when a job counts as hung: nobody's clock begins before `watched_since`."""
    return max(max(job.since, watched_since) + hang_timeout, job.until)


def told(jobs: Iterable[JobSeen], now: float) -> list[dict[str, Any]]:
    """Return jobs as events show them: the oldest first, with the seconds since their begin."""
    return [
        {
            "name": job.name,
            "seconds": round(max(0.0, now - job.since), 3),
            # As faulthandler writes it: so the job's stack can be found among the others.
            **({"thread": f"0x{job.thread:016x}"} if job.thread else {}),
        }
        for job in sorted(jobs, key=lambda job: job.since)
    ]
