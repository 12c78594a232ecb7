"""Which job, or which request, a line of the log belongs to.

It is looked up when a line is written, so a job in which none is written pays nothing for it. A job
of a thread is found by its thread. Tasks share one, so there a job is bound to the context of
its task, and goes with it to the tasks and threads that this one starts. One that has ended is
nobody's any more, wherever it was bound.
"""

from __future__ import annotations

__all__ = ["bind", "fields_of"]

import sys
from _thread import get_ident
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from itertools import count
from typing import Any

from workers.worker import Job, Worker

DEEP = 4  # jobs within each other that are remembered

Fields = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

_bound: ContextVar[tuple[tuple[Job, Fields], ...]] = ContextVar("ackvisor.jobs", default=())
_numbers = count(1)


def bind(job: Job, fields: Fields = {}) -> None:  # noqa: B006 (never written to)
    """Bind a job to the calling task, or to the calling thread. Once more: with other fields.

    Args:
        job: begun or about to begin.
        fields: that its lines are to have beside its name, or what returns them; where there are
            none, lines have a number as its id.
    """
    around = _bound.get()
    if around and around[0][0] is job:
        around = around[1:]
    _bound.set(((job, fields), *around[: DEEP - 1]))


def fields_of(worker: Worker) -> dict[str, Any]:
    """Return the fields of what the caller has in hand: the job, and the span where there are spans."""
    fields = _of_job(worker)
    if worker.tracing is not None:
        fields |= worker.tracing.ids()
    return fields


def _of_job(worker: Worker) -> dict[str, Any]:
    in_flight = worker.jobs.in_flight()
    if not in_flight:
        return {}
    mine: list[tuple[Job, Fields]] = [item for item in _bound.get() if item[0] in in_flight]
    if not _runs_a_loop():  # else it could be any task's
        ident, known = get_ident(), [job for job, _ in mine]
        mine += [(job, {}) for job in in_flight if job.ident == ident and job not in known]
    if not mine:
        return {}
    if len(mine) > 1:
        mine.sort(key=lambda item: item[0].since)
    newest, _ = mine[-1]
    found = {"job": newest.name}
    for _, fields in mine:  # what lies around it tells more about it
        found |= fields() if callable(fields) else fields
    if len(found) == 1:
        found["job_id"] = f"{worker.id}.{_number(newest)}"
    return found


def _number(job: Job) -> int:
    """Return the number of a job: it has one from its first line on."""
    if not hasattr(job, "number"):
        job.number = next(_numbers)
    return job.number


def _runs_a_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None  # noqa: SLF001
