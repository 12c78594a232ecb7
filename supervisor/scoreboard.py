"""A worker's scoreboard, read from outside: what it works on and since when, also while it hangs.

The page is written by the worker's work loop (`workers.scoreboard`) and belongs to it: whatever
stands there is bytes of a peer. It is read with `pread`, so a worker that cuts it off harms nobody.
"""

from __future__ import annotations

__all__ = ["in_both", "make", "read"]

import math
import os

from supervisor.core.jobs import JobSeen
from supervisor.protocol import BOARD_BYTES, BOARD_ENTRY


def make(name: str) -> int:
    """Return the descriptor of a new, empty scoreboard; memory comes with the first job.

    Raises:
        OSError: the system has no descriptor left.
    """
    board = os.memfd_create(f"scoreboard of {name}", os.MFD_CLOEXEC)
    os.ftruncate(board, BOARD_BYTES)
    return board


def read(board: int) -> tuple[JobSeen, ...]:
    """Return the jobs that are in flight. It looks twice, see `in_both`."""
    return in_both(os.pread(board, BOARD_BYTES, 0), os.pread(board, BOARD_BYTES, 0))


def in_both(look: bytes, again: bytes) -> tuple[JobSeen, ...]:
    """Return the jobs that two looks show alike.

    The worker writes while it is read. What has changed between the looks is a job that began, ended
    or was given more time at this moment; half of such an entry may be new and the other half old,
    as a begin of long ago with no more time than anybody has: a hang that is none. No two jobs begin
    at the same nanosecond in one entry, so what looks the same twice is one job's.
    """
    if not len(look) == len(again) == BOARD_BYTES:
        return ()
    _, _, used, _ = BOARD_ENTRY.unpack_from(look)
    size = BOARD_ENTRY.size
    jobs = []
    for at in range(size, min((used + 1) * size, BOARD_BYTES), size):
        since, until, thread, name = BOARD_ENTRY.unpack_from(look, at)
        if since > 0.0 and math.isfinite(since) and look[at : at + size] == again[at : at + size]:
            shown = name.rstrip(b"\0").decode(errors="replace")
            shown = "".join(char if char.isprintable() else "�" for char in shown)
            jobs.append(JobSeen(shown, since, until if math.isfinite(until) else 0.0, thread))
    return tuple(jobs)
