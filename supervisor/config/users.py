"""Whom the workers of a group run as: the user's numbers, looked up once, when the file is read.

What the supervisor hands on are numbers: neither it nor a template asks the user database later,
which may be on another machine that does not answer.
"""

from __future__ import annotations

__all__ = ["find"]

import os
from typing import TYPE_CHECKING

from supervisor.config.values import Unfit, quoted

if TYPE_CHECKING:
    from supervisor.protocol import Identity

_CAP_SETGID, _CAP_SETUID = 6, 7


def find(name: str, uid: int) -> Identity | None:
    """Return the user of that name; None: it is the one that we are already.

    Args:
        name: or its number.
        uid: of the process that is to become that user.

    Raises:
        Unfit: there is no such user, or this process may not become it.
    """
    import pwd  # only files that have the key need these

    from supervisor.protocol import Identity

    try:
        found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError) as exc:
        raise Unfit(f"there is no user {quoted(name)} on this machine") from exc
    if found.pw_uid == uid:
        if uid == 0:
            raise Unfit("is root: leave the key away to run workers as root")
        return None
    if found.pw_uid == 0:
        raise Unfit("is root; a supervisor cannot give its workers more rights than it has")
    if uid != 0:
        raise Unfit(
            f"needs a supervisor that is started as root, and this is uid {uid}; "
            "start it as root, or as that user without the key"
        )
    missing = [
        capability
        for number, capability in ((_CAP_SETGID, "CAP_SETGID"), (_CAP_SETUID, "CAP_SETUID"))
        if not _effective() >> number & 1
    ]
    if uid == os.geteuid() and missing:
        raise Unfit(f"needs {' and '.join(missing)}, which this root does not have")
    groups = tuple(sorted(os.getgrouplist(found.pw_name, found.pw_gid)))
    return Identity(found.pw_name, found.pw_uid, found.pw_gid, groups, found.pw_dir, found.pw_shell)


def _effective() -> int:
    """Return the bits of this process's effective capabilities; all, where that can't be told."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line[7:], 16) for line in file if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return -1
