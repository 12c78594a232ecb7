"""Lineage: whose descendant a process is, also when it has left the group and its parent is dead. A leaf.

Workers and templates mark themselves with a resource limit, RLIMIT_LOCKS, that the kernel keeps and
has not enforced since Linux 2.4. Every descendant inherits it: through fork, exec, setsid, a change
of the user, an emptied environment. Nothing has to be followed while a worker lives, and whoever
did not escape costs nothing. It is a mark, not a fence: a process may change its own.
"""

from __future__ import annotations

__all__ = ["descendants", "kill", "mark", "orphans"]

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Collection, Iterator
from typing import NamedTuple

_LIMIT = 10  # RLIMIT_LOCKS, which the resource module does not name
_LINE = "Max file locks"
_MARK = 1 << 40  # so high that nobody means a limit by it


class Descendant(NamedTuple):
    """A living process, held by its pidfd, which is its owner's to close."""

    ancestor: int
    pid: int
    pidfd: int
    name: str


def mark(pid: int) -> None:
    """Let a process's descendants from now on be known by its pid: one's own, or a child's."""
    with contextlib.suppress(OSError, ValueError):  # somebody has limited it: they can't be found
        _, most = resource.prlimit(pid, _LIMIT)
        resource.prlimit(pid, _LIMIT, (_MARK + pid, most))


def orphans(known: Collection[int]) -> bool:
    """Tell whether this process has children that are not known: adopted, since it is a subreaper.

    One small file tells, so that nobody has to look through all processes when nobody escaped.
    """
    try:
        # All adoptions go to the main thread. Twice: an end during a reading can hide a sibling.
        children = "".join(_read(f"/proc/self/task/{os.getpid()}/children") for _ in range(2))
    except FileNotFoundError:  # a kernel without that file
        return True
    return not {int(pid) for pid in children.split()} <= set(known)


def descendants(ancestors: Collection[int]) -> Iterator[Descendant]:
    """Yield all living processes that bear the mark of one of `ancestors`, these themselves not."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or (pid := int(entry)) in ancestors:
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (ancestor := _ancestor(pid)) not in ancestors:
                continue
            pidfd = os.pidfd_open(pid)
            name = ""
            with contextlib.suppress(OSError):
                # Again: until the pidfd was there, the number could become another process's.
                name = _name(pid) if _ancestor(pid) == ancestor else ""
            if name:
                yield Descendant(ancestor, pid, pidfd, name)
            else:
                os.close(pidfd)


def kill(ancestors: Collection[int], timeout: float = 1.0) -> None:
    """SIGKILL to all descendants, until there are no more or `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    while found := list(descendants(ancestors)):
        for each in found:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(each.pidfd, signal.SIGKILL)
        for each in found:
            select.select([each.pidfd], [], [], max(0.0, deadline - time.monotonic()))
            os.close(each.pidfd)
        if time.monotonic() >= deadline:
            return


def _ancestor(pid: int) -> int:
    """Return by whose mark a process goes, 0 for none."""
    limits = _read(f"/proc/{pid}/limits")
    soft = limits[limits.find(_LINE) + len(_LINE) :].split(maxsplit=1)[:1]
    return int(soft[0]) - _MARK if soft and soft[0].isdecimal() and int(soft[0]) > _MARK else 0


def _name(pid: int) -> str:
    """Return the name of a living process, "" for one that has ended and waits to be reaped."""
    name, _, rest = _read(f"/proc/{pid}/stat").partition("(")[2].rpartition(")")
    return "" if rest.split(maxsplit=1)[:1] in (["Z"], ["X"]) else name or "?"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except ProcessLookupError as exc:
        raise FileNotFoundError(path) from exc
