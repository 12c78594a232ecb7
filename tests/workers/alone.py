"""A worker without a supervisor."""

from __future__ import annotations

__all__ = ["alone"]

from typing import Any

from workers.worker import Ledger, Worker


def alone(
    worker_id: str = "w-1", *, generation: int = 1, log: Any = None, jobs: Ledger | None = None
) -> Worker:
    """Make one whose messages nobody hears."""
    return Worker(
        id=worker_id,
        group=worker_id.rpartition("-")[0],
        generation=generation,
        options={},
        pools={},
        log=log,
        on_ready=lambda: None,
        on_delay=lambda _seconds: None,
        jobs=jobs,
    )
