"""Why a worker ended uninvited, and how long that cause keeps its place waiting. Pure arithmetic.

Theory of operation. What is known of an end is evidence of two kinds: what the kernel says (a signal,
an OOM kill) and what the worker has claimed (it raised, its pool cannot connect). The kernel comes
first: a worker that is killed while its database is down was killed.

    hang        the hang detector had it ended
    memory      SIGKILL that is not ours, and the cgroup's count of OOM kills has risen
    killed      SIGKILL or SIGTERM that is not ours
    dependency  it ended because one of its pools could not connect
    startup     it failed before it was ready: its code or its configuration is wrong
    crashed     it failed at run time

Each cause has a back-off of its own: all of them double, with the jitter and the maximum of the
group's policy; they differ in how long the first one is, and in who shares it. A start that fails
says something about the code that all workers of a group share, and a database that is away is
away for all groups: there one tries for all (`slowstart`). `dependency` alone never fails a group.
"""

from __future__ import annotations

__all__ = ["Cause", "OomKills", "Outage", "cause_of", "first_backoff"]

from dataclasses import dataclass
from enum import Enum


class Cause(Enum):
    """Why a worker ended. The value is what events and `status` show."""

    STARTUP = "startup"
    DEPENDENCY = "dependency"
    CRASHED = "crashed"
    KILLED = "killed"
    MEMORY = "memory"
    HANG = "hang"
    # These two are nobody's failure, and are not shown.
    RETURNED = "returned"
    NOT_BORN = "not born"


@dataclass(frozen=True, slots=True)
class Outage:
    """What a worker waits for: the pool that cannot connect, and what its driver says."""

    pool: str
    error: str


# How many times `backoff` the first back-off of a cause is; 1 where it is not named. With five, a
# worker that always dies at its start is spawned five times in 12 s by the default settings.
_FIRST = {
    Cause.STARTUP: 5.0,
    Cause.DEPENDENCY: 5.0,
    Cause.MEMORY: 10.0,  # what it has eaten must be given back and found again
    Cause.HANG: 10.0,
}
_SIGKILL, _SIGTERM = 9, 15


def first_backoff(cause: Cause, backoff: float) -> float:
    """Return the seconds before the first restart after such an end; they double from there."""
    return backoff * _FIRST.get(cause, 1.0)


def cause_of(
    *,
    failed: bool,
    was_ready: bool,
    signal: int | None = None,
    is_ours: bool = False,
    by_memory: bool = False,
    hung: bool = False,
    for_dependency: bool = False,
) -> Cause:
    """Return why a worker ended.

    Args:
        failed: it ended badly, or had a fault although it ended well.
        was_ready: it has served.
        signal: what ended it, None where it exited.
        is_ours: the supervisor has sent it SIGKILL.
        by_memory: an OOM kill is accounted for by it.
        hung: the hang detector had it ended.
        for_dependency: by its own account a pool that could not connect is why.
    """
    if hung:
        return Cause.HANG
    if signal == _SIGKILL and by_memory and not is_ours:
        return Cause.MEMORY
    if signal in (_SIGKILL, _SIGTERM) and not is_ours:
        return Cause.KILLED
    if for_dependency:
        return Cause.DEPENDENCY
    if not failed:
        return Cause.RETURNED
    return Cause.CRASHED if was_ready else Cause.STARTUP


class OomKills:
    """The kernel's count of OOM kills, each of which explains one SIGKILL.

    Args:
        count: what it was at the start; None where the kernel tells none.
    """

    def __init__(self, count: int | None) -> None:
        self._seen = count
        self._unexplained = 0  # risen, and no worker's end accounted for

    def explains(self, count: int | None) -> bool:
        """Tell whether a SIGKILL after which the count is this was an OOM kill."""
        if count is None:
            return False
        if self._seen is not None and count > self._seen:
            self._unexplained += count - self._seen
        self._seen = count
        if not self._unexplained:
            return False
        self._unexplained -= 1
        return True
