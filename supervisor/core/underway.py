"""What is under way, in one line for whoever waits: a start, a roll, a stop. Pure.

An operator who waits wants to know how far it is, who is missing, and what that one waits for.
"""

from __future__ import annotations

__all__ = ["rolled", "sentence"]

import math
from collections.abc import Iterable, Iterator

from supervisor.core.roll import Progress
from supervisor.core.snapshot import FleetSnapshot, GroupSnapshot, WorkerSnapshot

NAMED = 3  # workers that are named
MAX_ERROR = 60  # characters; the log has all of it


def sentence(fleet: FleetSnapshot, seconds: float, now: float) -> str:
    """Return what the fleet is about, "" where it is at rest.

    Args:
        fleet: as it is, with its workers.
        seconds: for how long that has been so.
        now: CLOCK_MONOTONIC, as the snapshot's times.
    """
    if fleet.state == "stopping":
        left = max(0, math.ceil((fleet.deadline or now) - now))
        return (
            f"draining, {left} s left: {len(fleet.outstanding)} outstanding"
            f"{_named(fleet.outstanding, ': ')}"
        )
    if fleet.roll is not None and fleet.roll.kind != "start":
        return f"{rolled(fleet.roll)}, {seconds:.0f} s"
    if fleet.state != "starting":
        return ""
    lasting = [group for group in fleet.groups if not group.before]
    wanted = sum(group.count for group in lasting)
    ready = sum(min(group.ready + group.finished, group.count) for group in lasting)
    missing = "; ".join(_missing(fleet, now))
    return f"starting, {seconds:.0f} s: {ready} of {wanted} ready{'; ' if missing else ''}{missing}"


def rolled(roll: Progress) -> str:
    """Return how far a roll has come, and who is on the move."""
    what = "going back" if roll.is_going_back else "rolling"
    moving = ", ".join(f"{worker} {phase}" for worker, phase in roll.moving)
    return (
        f"{what} {roll.replaced}/{roll.total} to generation {roll.generation}"
        f"{': ' if moving else ''}{moving}"
    )


def _missing(fleet: FleetSnapshot, now: float) -> Iterator[str]:
    """Say of each group that is not ready what it waits for, the most telling first."""
    staying = [worker for worker in fleet.workers if worker.deadline is None]
    before = {group.name for group in fleet.groups if group.before}
    for worker in fleet.workers:
        if worker.group in before and worker.deadline is not None:
            left = max(0, math.ceil(worker.deadline - now))
            yield f"{worker.id} is told to end, {left} s left"
        elif worker.group in before:
            at_most = (worker.ends_by or now) - worker.spawned_at
            yield (
                f"first {worker.id} has to end well, {now - worker.spawned_at:.0f} s by now, "
                f"{at_most:.0f} s at most"
            )
    for group in fleet.groups:
        if group.waiting_for is not None and not group.failure:
            outage = group.waiting_for
            yield f"{group.name} waits for pool {outage.pool}: {outage.error[:MAX_ERROR]}"
    yield from (f"{group.name} has failed" for group in fleet.groups if group.failure)
    yield from (_restart(group, now) for group in fleet.groups if _is_tried_again(group))
    told = before | {group.name for group in fleet.groups if group.waiting_for or group.failure}
    late = [worker for worker in staying if not worker.ready and worker.group not in told]
    yield from _of_workers("imported for", [w for w in late if w.pid is None], now)
    yield from _of_workers("not ready yet", [w for w in late if w.pid is not None], now)


def _is_tried_again(group: GroupSnapshot) -> bool:
    return bool(group.cause) and not group.waiting_for and group.next_restart is not None


def _restart(group: GroupSnapshot, now: float) -> str:
    left = max(0, math.ceil((group.next_restart or now) - now))
    return f"{group.name} is tried again in {left} s ({group.cause})"


def _of_workers(what: str, workers: list[WorkerSnapshot], now: float) -> Iterator[str]:
    if workers:
        longest = max(now - worker.spawned_at for worker in workers)
        yield f"{what}{_named([worker.id for worker in workers], ' ')} ({longest:.0f} s)"


def _named(workers: Iterable[str], lead: str) -> str:
    names = list(workers)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{lead}{', '.join(names[:NAMED])}{more}" if names else ""
