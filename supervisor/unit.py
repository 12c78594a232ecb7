"""The unit that systemd runs us as, read from its files: how long it waits for the end of a stop.

The service manager does not tell a service its own TimeoutStopSec, and its bus may be out of reach.
So the files are read as it reads them: the unit or its template, then the drop-ins of all folders
in the order of their names, each folder hiding what the later ones have under the same name.
"""

from __future__ import annotations

__all__ = ["stop_timeout", "time_span", "unit_of"]

import contextlib
import os
import re
from collections.abc import Iterable, Sequence

FOLDERS = (
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
MANAGER_FOLDERS = ("/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd")
DEFAULT = 90.0  # seconds: DefaultTimeoutStopSec where nobody has set it

_ASSIGNMENT = re.compile(r"\s*([A-Za-z]+)\s*=\s*(.*?)\s*")
_SPAN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zµ]*)")
_UNITS = {
    "": 1.0,
    **dict.fromkeys(("us", "usec", "µs"), 1e-6),
    **dict.fromkeys(("ms", "msec"), 1e-3),
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}


def unit_of(cgroups: str) -> str:
    """Return the service that a process belongs to, as /proc/PID/cgroup has it; "" for none."""
    for line in cgroups.splitlines():
        for part in reversed(line.rpartition(":")[2].split("/")):
            if part.endswith(".service"):
                return part
    return ""


def stop_timeout(
    unit: str,
    folders: Sequence[str] = FOLDERS,
    manager_folders: Sequence[str] = MANAGER_FOLDERS,
) -> float | None:
    """Return how many seconds systemd waits for a stop of this service, infinity included.

    Returns:
        None where the unit has no file, or what it says is not understood.
    """
    template = f"{unit.partition('@')[0]}@.service" if "@" in unit else unit
    fragment = _first(folders, unit) or _first(folders, template)
    if fragment is None:
        return None
    names = dict.fromkeys(("service", template, unit))  # the later one's drop-ins hide the others'
    files = [fragment, *_drop_ins(folders, names)]
    written = _last(files, ("TimeoutSec", "TimeoutStopSec"))
    if written is None:
        conf = _first(manager_folders, "system.conf")
        files = [*([conf] if conf else []), *_drop_ins(manager_folders, ("system.conf",))]
        written = _last(files, ("DefaultTimeoutStopSec",))
    if written is None:
        return DEFAULT
    seconds = time_span(written)
    return float("inf") if seconds == 0.0 else seconds


def time_span(text: str) -> float | None:
    """Return the seconds of a systemd.time(7) span, as "1min 30s"; None when it is not understood."""
    if text == "infinity":
        return float("inf")
    seconds, position = 0.0, 0
    while position < len(text):
        part = _SPAN.match(text, position)
        if part is None or part[2] not in _UNITS:
            return None
        seconds += float(part[1]) * _UNITS[part[2]]
        position = part.end()
    return seconds if position else None


def _first(folders: Iterable[str], name: str) -> str | None:
    paths = (os.path.join(folder, name) for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)


def _drop_ins(folders: Sequence[str], names: Iterable[str]) -> list[str]:
    found: dict[str, str] = {}
    for name in names:
        for folder in reversed(folders):
            with contextlib.suppress(OSError):
                for entry in os.listdir(os.path.join(folder, f"{name}.d")):
                    if entry.endswith(".conf"):
                        found[entry] = os.path.join(folder, f"{name}.d", entry)
    return [found[entry] for entry in sorted(found)]


def _last(files: Iterable[str], keys: Sequence[str]) -> str | None:
    """Return what one of the keys was last set to; an empty value takes back what was set before."""
    value = None
    for path in files:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            for line in file:
                match = _ASSIGNMENT.fullmatch(line)
                if match is not None and match[1] in keys:
                    value = match[2] or None
    return value
