"""Becoming another user, completely and for good, before any of the application's code runs. A leaf.

Used where that code is imported: in templates, and by `check --import`.
"""

from __future__ import annotations

__all__ = ["become"]

import ctypes
import os
from pathlib import Path

from supervisor.protocol import Identity

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522


def become(user: Identity) -> None:
    """Have that user's rights and no others from now on. Called once, as root, with one thread.

    Groups, then the group, then the user (afterwards we may not), each of the real, the effective
    and the saved number; no capability is left in any set; no program that is executed, set-uid or
    not, gives any back. That is looked at afterwards, and not taken on trust.

    The environment is the user's in what names it: HOME, USER, LOGNAME, SHELL.

    Raises:
        OSError: the system refused one of the steps: this process must end.
        PermissionError: what came of it is not what was asked for.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    capability = 0
    # Past the last one that this kernel knows it says so; without CAP_SETPCAP at the first.
    while libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call(libc.capset, header, (ctypes.c_uint32 * 6)())
    # Nothing in this memory is root's alone; without it the user's own /proc/self would be closed
    # to it, and there would be no core dumps.
    _call(libc.prctl, _PR_SET_DUMPABLE, 1, 0, 0, 0)
    _look(user)
    os.environ.update(HOME=user.home, USER=user.name, LOGNAME=user.name, SHELL=user.shell)


def _look(user: Identity) -> None:
    """Compare what the kernel says we are with what we wanted to be."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    expected = {
        "Uid": [str(user.uid)] * 4,
        "Gid": [str(user.gid)] * 4,
        "NoNewPrivs": ["1"],
        **{name: ["0" * 16] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")},
    }
    wrong = [
        f"{name} is {status.get(name)}" for name in expected if status.get(name) != expected[name]
    ]
    if sorted(os.getgroups()) != sorted(set(user.groups)):
        wrong.append(f"the groups are {os.getgroups()}")
    if wrong:
        raise PermissionError(f"not all rights could be given up: {', '.join(wrong)}")


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
