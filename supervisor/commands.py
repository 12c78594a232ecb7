"""Groups with a `command`: what their workers are told, and whether the program is there.

A command's worker is a worker like any other; its `run` is COMMAND_RUN, its options say what to start.
"""

from __future__ import annotations

__all__ = ["COMMAND_RUN", "command_options", "missing_program"]

import os
from typing import Any

from supervisor.config import GroupSettings, Settings

COMMAND_RUN = "workers.command:run"


def command_options(settings: Settings, group: GroupSettings) -> dict[str, Any]:
    """Return what workers.command.Command holds: plain data for the wire."""
    return {
        "argv": group.command,
        "folder": _folder(settings),
        "env": group.env,
        "runtime_dir": settings.supervisor.runtime_dir,
        "stop_signal": group.stop_signal,
        "notify": group.notify,
        "is_ready_at_once": not (group.notify or group.before),
        "watchdog": group.hang_timeout,
    }


def missing_program(settings: Settings, group: GroupSettings) -> str:
    """Return why a group's program cannot be started; "" when it is there."""
    program = group.command[0]
    path = group.env.get("PATH", os.environ.get("PATH", os.defpath))
    places = path.split(os.pathsep)
    if "/" in program:
        places = [""]
    paths = [os.path.join(_folder(settings), place, program) for place in places]
    if any(os.path.isfile(path) and os.access(path, os.X_OK) for path in paths):
        return ""
    existing = [path for path in paths if os.path.exists(path)]
    if existing:
        what = "a folder" if os.path.isdir(existing[0]) else "not executable; chmod +x it"
        return f"{existing[0]} is {what}"
    if "/" in program:
        return f"there is no file {paths[0]}"
    return f'there is no program "{program}" in PATH ({os.pathsep.join(places)})'


def _folder(settings: Settings) -> str:
    """Return where programs run: paths in the file, and so those in a command, are relative to it."""
    return os.path.dirname(settings.source)
