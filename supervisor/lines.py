"""How loud an event is in the log, and what of it stands there. Pure: the journal has all of it."""

from __future__ import annotations

__all__ = ["Lines"]

from collections.abc import Mapping
from typing import Any

from supervisor.core.actions import Announce

_LEVELS = {
    "worker.killed": "error",
    "worker.failed": "error",
    "worker.hung": "error",
    "group.failed": "error",
    "group.waiting": "warning",
    "worker.not_spawned": "warning",
    "pool.leak": "warning",
    "reload.rejected": "error",
    "reload.rolled_back": "error",
    "restart.failed": "error",
    "scale.failed": "error",
    "recycle.failed": "error",
}
_TOLD = ("", "dependency")  # causes of a worker's end that need no warning


class Lines:
    """What the log says of events. Remembers which outages have been told at length."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()  # group and pool, until the group has recovered

    def of(self, announce: Announce) -> tuple[str, Mapping[str, Any]]:
        """Return the level and the fields of an event's line.

        While a group waits for a pool, each try ends with the same words: after the first a try is one
        line, and no error.
        """
        fields = announce.fields
        level = _LEVELS.get(announce.event, "info")
        match announce.event:
            # A crash says no other word. Who waits for a database is told of by `group.waiting`, once.
            case "worker.exited" if fields.get("cause", "") not in _TOLD:
                level = "warning"
            case "worker.failed" if fields.get("pool"):
                outage = (fields["group"], fields["pool"])
                if outage in self._told:
                    level = "warning"
                    fields = {name: fields[name] for name in fields if name != "traceback"}
                self._told.add(outage)
            case "group.recovered":
                self._told = {outage for outage in self._told if outage[0] != fields["group"]}
            case _:
                pass
        return level, fields
