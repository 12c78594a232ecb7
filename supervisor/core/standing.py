"""What the service manager is told of the fleet: READY, RELOADING, STOPPING, STATUS, more time.

Theory of operation. After each turn of the loop `told` compares the fleet with what was said last,
and returns one message where they differ, in sd_notify's words (its manual page is the reference).

    (nothing yet)  -- every group has been complete once -->  READY=1
    READY=1        -- a reload, before its file is read  -->  RELOADING=1
    RELOADING=1    -- done, refused or rolled back       -->  READY=1
    any of them    -- the stop begins                    -->  STOPPING=1, and nothing after that

A reload before the first READY=1 is a matter of STATUS only: there is no service yet to be reloaded.

EXTEND_TIMEOUT_USEC goes with each step forward of a start and of a roll, for as long as the next
step may take, a migration what is left of its own time: a fleet that gets somewhere may take its time, one that does not has what the unit
says. A step is one that was never reached before, so a crash loop is none. The stop has a deadline
of its own, which is what is asked for. More time for the unit puts its watchdog off as well, so a
sign of life, which puts it right again, is due at once then.

Everybody on the machine can read a STATUS, while a traceback is for those who may read the log. So
it names workers and groups, and repeats nothing that user code or a database has said.
"""

from __future__ import annotations

__all__ = ["STOP_SLACK", "Message", "Standing"]

import math

from supervisor.core import actions as ac
from supervisor.core.fleet import Phase
from supervisor.core.snapshot import FleetSnapshot, GroupSnapshot
from supervisor.plain import counted

Message = tuple[str, ...]  # the lines of one datagram

# Seconds after the deadline of a stop in which the last workers are killed, reaped and reported.
STOP_SLACK = 5.0
_MICROSECONDS = 1_000_000


class Standing:
    """The books of what the service manager has been told. Owned by the loop.

    Args:
        watchdog: seconds after which a supervisor that gives no sign of life is killed; None: never.
    """

    def __init__(self, watchdog: float | None = None) -> None:
        self._said: Phase | None = None  # None: not even READY
        self._status = ""
        self._verdict = ""  # what came of the last reload, where it was not carried out
        self._epitaph = ""
        self._under_way: tuple[object, ...] = ()  # what more time was asked for, and
        self._how_far = 0.0  # how far that had come
        self._members = 0  # how many the stop began with
        self._second: float | None = None  # when the seconds that are left become one fewer
        self._half = None if watchdog is None else watchdog / 2
        self._life_due = 0.0

    def reload_begins(self, now: float) -> Message:
        """Return what is said before the configuration is read; () where it is not to be said."""
        self._verdict = ""
        if self._said not in (Phase.READY, Phase.RELOADING):
            return ()
        self._said = Phase.RELOADING
        self._under_way = ()
        self._status = "reading the configuration"
        return (
            "RELOADING=1",
            f"MONOTONIC_USEC={int(now * _MICROSECONDS)}",
            f"STATUS={self._status}",
        )

    def note(self, announce: ac.Announce) -> None:
        """Take note of an event that a STATUS mentions afterwards."""
        match announce.event:
            case "reload.rejected":
                self._verdict = "the last reload was refused, see the log"
            case "reload.rolled_back":
                worker = announce.fields.get("worker")
                self._verdict = f"the last reload was rolled back ({worker} failed), see the log"
            case "supervisor.stopped":
                self._epitaph = _epitaph(announce)
            case _:
                pass

    def told(self, fleet: FleetSnapshot, patience: float, now: float) -> Message:
        """Return what is to be said after a turn; () for nothing.

        Args:
            fleet: its workers one by one are not looked at.
            patience: seconds that a step of a start or a roll may take.
            now: CLOCK_MONOTONIC.
        """
        lines = []
        phase = Phase(fleet.state)
        if phase is Phase.STOPPING and self._said is not Phase.STOPPING:
            self._said = phase
            self._members = len(fleet.outstanding)
            lines.append("STOPPING=1")
        elif phase is Phase.READY and self._said is not Phase.READY:
            self._said = phase
            lines.append("READY=1")
        status = self._sentence(fleet, phase, now)
        if lines or status != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        more = self._more_time(fleet, phase, patience, now)
        if more is not None:
            lines.append(f"EXTEND_TIMEOUT_USEC={math.ceil(more * _MICROSECONDS)}")
            self._life_due = now
        return tuple(lines)

    def sign_of_life(self, now: float) -> Message:
        """Return WATCHDOG=1 when it is due. To be asked for at the end of a completed turn only."""
        if self._half is None or now < self._life_due:
            return ()
        self._life_due = now + self._half
        return ("WATCHDOG=1",)

    def next_deadline(self) -> float | None:
        """Return when a turn is wanted at the latest, None for never."""
        life_due = None if self._half is None else self._life_due
        return min((due for due in (life_due, self._second) if due is not None), default=None)

    # --- sentences -------------------------------------------------------------------------------

    def _sentence(self, fleet: FleetSnapshot, phase: Phase, now: float) -> str:
        self._second = None
        if phase is Phase.STOPPING:
            return self._epitaph or self._draining(fleet, now)
        failed = [group.name for group in fleet.groups if group.failure]
        parts = [
            _rolling(fleet),
            _ready(fleet, phase),
            f"failed for good: {', '.join(failed)}" if failed else "",
            self._verdict,
        ]
        return "; ".join(part for part in parts if part)

    def _draining(self, fleet: FleetSnapshot, now: float) -> str:
        outstanding = len(fleet.outstanding)
        deadline = now if fleet.deadline is None else fleet.deadline
        left = max(0, math.ceil(deadline - now))
        if left:
            self._second = deadline - (left - 1)
        return f"draining: {outstanding} of {self._members} outstanding, {left} s left"

    # --- more time -------------------------------------------------------------------------------

    def _more_time(
        self, fleet: FleetSnapshot, phase: Phase, patience: float, now: float
    ) -> float | None:
        """Return for how many seconds from now the unit's time-out is to be put off, if at all."""
        if phase is Phase.STOPPING:
            if fleet.deadline is None or not self._goes_on(("stop",), fleet.deadline):
                return None
            return max(0.0, fleet.deadline - now) + STOP_SLACK
        if phase is Phase.READY:
            return None
        # What runs before the others may take until then.
        patience += max((group.ends_by - now for group in fleet.groups if group.ends_by), default=0)
        if fleet.roll is None:
            going_on = self._goes_on((phase,), sum(group.ready for group in fleet.groups))
        else:
            roll = fleet.roll
            going_on = self._goes_on((roll.generation, roll.is_going_back), roll.replaced)
        return patience + STOP_SLACK if going_on else None

    def _goes_on(self, what: tuple[object, ...], how_far: float) -> bool:
        """Tell whether this has come further than ever before, and take note of it."""
        if what == self._under_way and how_far <= self._how_far:
            return False
        self._under_way, self._how_far = what, how_far
        return True


def _rolling(fleet: FleetSnapshot) -> str:
    roll = fleet.roll
    if roll is None:
        return ""
    if roll.kind != "reload":
        return f"{roll.kind}: {roll.replaced}/{roll.total} replaced"
    what = "going back" if roll.is_going_back else "rolling"
    return f"{what} {roll.replaced}/{roll.total} to generation {roll.generation}"


def _ready(fleet: FleetSnapshot, phase: Phase) -> str:
    """Say how many workers serve; while a reload rolls, that is how far it has come."""
    if fleet.roll is not None and phase is Phase.RELOADING:
        return ""
    ready = sum(min(group.ready, group.count) for group in fleet.groups)
    wanted = sum(group.count for group in fleet.groups)
    begun = "starting: " if phase is Phase.STARTING else ""
    finished = sum(_finished(group) for group in fleet.groups)
    return (
        f"{begun}{ready} of {wanted} workers ready"
        f"{f', {finished} finished' if finished else ''}, generation {fleet.generation}"
    )


def _finished(group: GroupSnapshot) -> int:
    return min(group.finished, group.count)


def _epitaph(stopped: ac.Announce) -> str:
    killed, failed = stopped.fields["killed"], stopped.fields["failed_groups"]
    workers, drained = stopped.fields["workers"], stopped.fields["drained"]
    text = f"stopped: {counted(workers, 'worker')}, {drained} drained, {len(killed)} killed"
    return f"{text}; failed for good: {', '.join(failed)}" if failed else text
