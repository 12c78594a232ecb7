"""Jobs in a database table, each carried out once: `run` is a group's entry, `sha256` a handler.

Deliberately absent: a broker. The queue is a table beside the data that the jobs are about, so
that a job's effect and its end are one transaction. Rows may be added by whoever writes that data,
in the same transaction: `INSERT INTO jobs (payload) VALUES (...)`.

    options    what `[workers.NAME.options]` may hold; Job and the handler's form
    table      what may happen to a row; fenced, and the same for all databases
    dialects   SQLite and PostgreSQL
    owner      who holds a job, and whether that process is known to be dead
    deaths     what such a process died of, as its supervisor tells
    isolation  who of a worker's jobs runs beside whom
    runner     the worker: threads, claims, attempts, leases, the stop
    __main__   python -m workers.jobs
"""

from __future__ import annotations

__all__ = ["Job", "run", "sha256"]

from workers.jobs.options import Job
from workers.jobs.runner import run
from workers.jobs.sha256 import sha256
