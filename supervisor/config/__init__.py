"""The configuration: TOML in, frozen settings out, or every problem with its key and line.

`load` is pure but for reading the file, its `url_file`s and the existence of `path`: it creates,
connects and imports nothing. What each key may be stands beside its field in `settings`; what a
value may be in `values`; where a key stands in the file in `lines`; the reading in `loading`.
"""

from __future__ import annotations

__all__ = [
    "Changes",
    "GroupSettings",
    "LogSettings",
    "PoolSettings",
    "Settings",
    "SocketSettings",
    "SupervisorSettings",
    "compared",
    "load",
    "locate",
    "redacted",
]

from supervisor.config.changes import Changes, compared
from supervisor.config.loading import load, locate
from supervisor.config.settings import (
    GroupSettings,
    LogSettings,
    PoolSettings,
    Settings,
    SocketSettings,
    SupervisorSettings,
)
from supervisor.config.values import redacted
