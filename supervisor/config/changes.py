"""What has changed from one reading of the file to the next, and who can take it. Pure.

A key is live when a running worker, or the supervisor, takes another value without being replaced.
Whatever is not named here asks for new workers: a key that is forgotten costs a roll, not a lie.
"""

from __future__ import annotations

__all__ = ["Changes", "compared"]

from dataclasses import dataclass, fields
from typing import Any

from supervisor.config.settings import (
    GroupSettings,
    LogSettings,
    PoolSettings,
    Settings,
    SupervisorSettings,
    dotted,
)

_LIVE: dict[type, frozenset[str]] = {
    SupervisorSettings: frozenset({"grace", "abort_margin"}),
    LogSettings: frozenset({"format", "level"}),
    PoolSettings: frozenset(
        {
            "acquire_timeout",
            "budget",
            "connect_timeout",
            "keepalive",
            "leak_threshold",
            "max_connecting",
            "max_idle",
            "max_idle_time",
            "max_lifetime",
            "max_open",
            "min",
            "validate_after_idle",
        }
    ),
    GroupSettings: frozenset(
        {
            "backoff",
            "backoff_max",
            "count",
            "max_age",
            "max_restarts",
            "max_rss",
            "min_ready_time",
            "on_failed",
            "ready_timeout",
            "restart",
            "restart_window",
            "surge",
        }
    ),
}
_TABLES = ("supervisor", "log", "pools", "groups")  # of Settings: compared key by key


@dataclass(frozen=True, slots=True)
class Changes:
    """The keys whose values differ, as they are written in the file.

    `live` ones can be applied without replacing anybody, `others` cannot.
    """

    live: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def are_live(self) -> bool:
        """Whether something has changed, and nobody need be replaced for it."""
        return bool(self.live) and not self.others


def compared(before: Settings, after: Settings) -> Changes:
    """Return what differs between two readings of a file."""
    live: list[str] = []
    others: list[str] = []
    for path, old, new in _tables(before, after):
        if old is None or new is None:
            others.append(dotted(path))
            continue
        for each in fields(new):
            was, now = getattr(old, each.name), getattr(new, each.name)
            if was != now:
                # A budget that comes or goes changes how a worker opens its pool.
                is_live = each.name in _LIVE[type(new)] and not (
                    each.name == "budget" and None in (was, now)
                )
                (live if is_live else others).append(dotted((*path, each.name)))
    others += [
        each.name
        for each in fields(Settings)
        if each.compare
        and each.name not in _TABLES
        and getattr(before, each.name) != getattr(after, each.name)
    ]
    return Changes(tuple(live), tuple(others))


def _tables(before: Settings, after: Settings) -> list[tuple[tuple[str, ...], Any, Any]]:
    """Return every table that one of them has: where it is, and both of its contents."""
    tables: list[tuple[tuple[str, ...], Any, Any]] = [
        (("supervisor",), before.supervisor, after.supervisor),
        (("log",), before.log, after.log),
    ]
    tables += [
        (("pools", name), before.pools.get(name), after.pools.get(name))
        for name in dict.fromkeys([*before.pools, *after.pools])
    ]
    tables += [
        (("workers", name), before.groups.get(name), after.groups.get(name))
        for name in dict.fromkeys([*before.groups, *after.groups])
    ]
    return tables
