"""The fleet at one moment, as `status` shows it and tests assert on it. Reads, decides nothing."""

from __future__ import annotations

__all__ = ["FleetSnapshot", "GroupSnapshot", "WorkerSnapshot", "of_group", "of_worker"]

from collections.abc import Sequence
from dataclasses import dataclass

from supervisor.core.causes import Cause, Outage
from supervisor.core.group import Group
from supervisor.core.lifecycle import State
from supervisor.core.roll import Progress
from supervisor.core.worker import NEVER, Worker


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One living worker. `restarts` is that of its place; times are absolute."""

    id: str
    group: str
    pid: int | None
    generation: int
    state: str
    ready: bool
    restarts: int
    spawned_at: float
    deadline: float | None
    ends_by: float | None = None  # by when it has to have ended by itself


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    """One group. `count` workers are to serve now.

    Those that are `finished` ended as they should, and are not replaced.
    `next_restart` is when somebody is tried there next, None where that depends on another's success.
    `cause` is why it has failed, waits or restarts, "" where it does none of these.
    With `before` it runs to its end before the others start, `ends_by` then at the latest.
    """

    name: str
    count: int
    ready: int
    state: str
    restarts: int
    failure: str
    next_restart: float | None
    finished: int = 0
    cause: str = ""
    waiting_for: Outage | None = None
    before: bool = False
    ends_by: float | None = None


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """The fleet. `outstanding` are the members that the WaitGroup still waits for."""

    state: str
    generation: int
    groups: tuple[GroupSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]
    outstanding: tuple[str, ...]
    deadline: float | None
    roll: Progress | None = None


def of_worker(worker: Worker, restarts: int) -> WorkerSnapshot:
    """Return one worker as it is now."""
    return WorkerSnapshot(
        id=worker.id,
        group=worker.group,
        pid=worker.pid,
        generation=worker.generation,
        state=worker.state.shown,
        ready=worker.state is State.READY,
        restarts=restarts,
        spawned_at=worker.spawned_at,
        deadline=None if worker.deadline == NEVER else worker.deadline,
        ends_by=None if worker.ends_by == NEVER else worker.ends_by,
    )


def of_group(group: Group, workers: Sequence[Worker]) -> GroupSnapshot:
    """Return one group as it is now; `workers` are its living ones, also those without a slot yet."""
    state = group.state
    if state == "finished" and workers:
        state = "starting"  # once more
    dues = [due for slot in group.slots if (due := slot.next_try) is not None and due < NEVER]
    if group.breaker.due is not None:
        dues.append(group.breaker.due)
    return GroupSnapshot(
        name=group.spec.name,
        count=group.expected,
        ready=sum(worker.state is State.READY for worker in workers),
        state=state,
        restarts=sum(slot.restarts for slot in group.slots),
        failure=group.failure,
        next_restart=min(dues, default=None),
        finished=group.finished,
        cause=_cause_of(group),
        waiting_for=group.outage,
        before=group.spec.before,
        ends_by=min((w.ends_by for w in workers if w.ends_by < NEVER), default=None),
    )


def _cause_of(group: Group) -> str:
    if group.failure:
        return group.breaker.cause.value
    if group.outage is not None:
        return Cause.DEPENDENCY.value
    causes = [slot.cause for slot in group.slots if slot.restart_due is not None]
    shown = [cause.value for cause in causes if cause is not Cause.RETURNED]
    return next(iter(shown), "")
