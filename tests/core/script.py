"""A fleet and what happens to it, written down as a script: at this time, this; then that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from supervisor.core import actions as ac
from supervisor.core import events as ev
from supervisor.core.fleet import Fleet, FleetSnapshot, GroupSnapshot, GroupSpec
from supervisor.core.policy import Restart, RestartPolicy

GRACE = 30.0
ABORT_MARGIN = 5.0


def middle() -> float:
    """Draw no jitter at all."""
    return 0.5


def group(
    name: str = "jobs",
    count: int = 1,
    *,
    restart: Restart = Restart.ALWAYS,
    exit_on_failed: bool = False,
    ready_timeout: float = 30.0,
    hang_timeout: float = 0.0,
    **policy: Any,
) -> GroupSpec:
    """Return a group; keywords that are left over belong to its restart policy."""
    rules = RestartPolicy(restart=restart, **policy)
    return GroupSpec(name, count, rules, ready_timeout, exit_on_failed, hang_timeout=hang_timeout)


class Script:
    """One fleet from time 0 on. `now` is the time of the last event."""

    def __init__(
        self,
        *groups: GroupSpec,
        grace: float = GRACE,
        abort_margin: float = ABORT_MARGIN,
        draw: Callable[[], float] = middle,
    ) -> None:
        self.fleet = Fleet(groups, grace=grace, abort_margin=abort_margin, draw=draw)
        self.now = 0.0
        self.started = self.fleet.start(0.0)

    def at(self, now: float, *events: ev.Event) -> list[ac.Action]:
        """Let all of `events` happen at `now`; return what is to be done."""
        assert now >= self.now
        self.now = now
        return [action for event in events for action in self.fleet.handle(event, now)]

    def tick(self, now: float) -> list[ac.Action]:
        """Let time pass until `now`."""
        return self.at(now, ev.TimePassed())

    def tick_just_before(self, now: float) -> list[ac.Action]:
        """Let time pass until a microsecond before `now`."""
        return self.tick(now - 1e-6)

    def born(self, now: float, *workers: str) -> list[ac.Action]:
        """Let these processes come into being."""
        return self.at(now, *(ev.WorkerBorn(worker, pid_of(worker)) for worker in workers))

    def registered(self, now: float, *workers: str) -> list[ac.Action]:
        """Let these workers be born and say hello."""
        return self.born(now, *workers) + self.at(
            now, *(ev.WorkerRegistered(worker) for worker in workers)
        )

    def ready(self, now: float, *workers: str) -> list[ac.Action]:
        """Let these workers be born, say hello and serve."""
        return self.registered(now, *workers) + self.at(
            now, *(ev.WorkerReady(worker) for worker in workers)
        )

    def crashed(self, now: float, *workers: str) -> list[ac.Action]:
        """Let these workers die of a signal."""
        return self.at(now, *(ev.WorkerExited(worker, signal=11) for worker in workers))

    def left(self, now: float, *workers: str) -> list[ac.Action]:
        """Let these workers drain and exit as they should."""
        return self.at(
            now,
            *(
                event
                for worker in workers
                for event in (ev.WorkerDrained(worker), ev.WorkerExited(worker, code=0))
            ),
        )

    def snapshot(self) -> FleetSnapshot:
        """Return the fleet as it is now."""
        return self.fleet.snapshot()

    def group(self, name: str = "jobs") -> GroupSnapshot:
        """Return one group as it is now."""
        return next(found for found in self.snapshot().groups if found.name == name)


def pid_of(worker: str) -> int:
    """Return the pid that a worker of this name gets in a script."""
    return 1000 + int(worker.rpartition("-")[2])


def brief(actions: Iterable[ac.Action]) -> list[str]:
    """Return what is to be done, one line each: the kind, and whom it is about."""
    return [_line(action) for action in actions]


def _line(action: ac.Action) -> str:
    match action:
        case ac.Announce():
            return f"{action.event} {action.fields.get('worker', '')}".strip()
        case ac.Finish():
            return f"Finish {action.exit_code}"
        case ac.Retire():
            return f"Retire {action.generation}"
        case ac.MeasureMemory():
            return "MeasureMemory"
        case _:
            return f"{type(action).__name__} {action.worker}"


def fields_of(event: str, actions: Iterable[ac.Action]) -> dict[str, Any]:
    """Return the fields of the only event of this name."""
    (found,) = [a for a in actions if isinstance(a, ac.Announce) and a.event == event]
    return dict(found.fields)


def cancels(actions: Iterable[ac.Action]) -> list[ac.SendCancel]:
    """Return the cancels that are to be sent."""
    return [action for action in actions if isinstance(action, ac.SendCancel)]
