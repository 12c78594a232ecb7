"""What systemd hands to a process: variables to be taken, the journal on standard error. A leaf."""

from __future__ import annotations

__all__ = ["is_journal", "is_service", "prioritized", "take_notify_variables"]

import os
from collections.abc import Mapping, MutableMapping

# syslog(3); journald takes "<3>" at the beginning of a line for its priority.
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def take_notify_variables(
    environ: MutableMapping[str, str], pid: int
) -> tuple[str, float | None] | None:
    """Take the manager's variables out of the environment, so that no worker can speak for us.

    Args:
        environ: where they are, and are not afterwards.
        pid: of the process that is to speak; a watchdog that is meant for another one is none.

    Returns:
        Where the manager listens, and after how many seconds of silence it kills, None being never.
        None where nobody listens, or not on a local socket.
    """
    address = environ.pop("NOTIFY_SOCKET", "")
    interval = environ.pop("WATCHDOG_USEC", "")
    watched = environ.pop("WATCHDOG_PID", "")
    if not address.startswith(("/", "@")) or len(address) < 2:  # noqa: PLR2004
        return None
    is_ours = watched in {"", str(pid)} and interval.isdecimal() and int(interval) > 0
    return address, int(interval) / 1e6 if is_ours else None


def is_service(environ: Mapping[str, str], pid: int) -> bool:
    """Tell whether systemd itself has started this process."""
    return environ.get("SYSTEMD_EXEC_PID") == str(pid)


def is_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Tell whether what is written there goes straight into the journal."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def prioritized(text: str, level: str) -> str:
    """Return the text as the journal wants it: each line with the priority of its level."""
    prefix = f"<{PRIORITIES.get(level, PRIORITIES['info'])}>"
    return "\n".join(prefix + line for line in text.split("\n"))
