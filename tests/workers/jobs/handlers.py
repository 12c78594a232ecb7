"""The handler that tests of the worker name in its options: the payload says what it does."""

from __future__ import annotations

__all__ = ["ACTIONS", "call"]

import sqlite3
from collections.abc import Callable
from typing import Any

from workers.jobs import Job

Action = Callable[[Job, Any], Any]

# What a payload stands for; a test enters its own and the fixture empties it.
ACTIONS: dict[str, Action] = {}


def call(job: Job, conn: Any) -> Any:
    """Write one effect, then do what the payload stands for and return what that returns.

    Where the payload begins with "bare" it is the action that writes.
    """
    if not job.payload.startswith("bare"):
        mark = "?" if isinstance(conn, sqlite3.Connection) else "%s"
        conn.execute("INSERT INTO effects VALUES (?, ?)".replace("?", mark), (job.id, job.attempts))
    action = ACTIONS.get(job.payload.partition(":")[0])
    return action(job, conn) if action is not None else job.payload
