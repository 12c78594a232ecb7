"""The handlers that the chaos tests' workers run."""

from __future__ import annotations

__all__ = ["hash_and_record"]

import random
import sqlite3
from typing import Any

from workers.jobs import Job, sha256


def hash_and_record(job: Job, conn: Any) -> str:
    """Hash the file and record an effect, with pauses in which a kill may come: before, after."""
    pauses = random.Random(f"{job.id} {job.attempts}")
    digest = sha256(job, conn)
    job.ctx.wait(pauses.uniform(0.0, 0.06))
    job.ctx.check()
    mark = "?" if isinstance(conn, sqlite3.Connection) else "%s"
    conn.execute(
        "INSERT INTO effects (job, attempt) VALUES (?, ?)".replace("?", mark),
        (job.id, job.attempts),
    )
    # SQLite has one write lock for all, and this holds it.
    job.ctx.wait(pauses.uniform(0.0, 0.004 if isinstance(conn, sqlite3.Connection) else 0.06))
    job.ctx.check()
    return digest
