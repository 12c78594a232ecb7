"""A worker's scoreboard, read from outside: what it works on and since when, also while it hangs.

The page is written by the worker's work loop (`workers.scoreboard`) and belongs to it: whatever
stands there is bytes of a peer. It is read with `pread`, so a worker that cuts it off harms nobody.
"""

from __future__ import annotations

__all__ = ["make", "read"]

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
    """Return the jobs in flight. A torn entry is a job that begins or ends at this moment."""
    data = os.pread(board, BOARD_BYTES, 0)
    if len(data) < BOARD_BYTES:
        return ()
    _, _, used, _ = BOARD_ENTRY.unpack_from(data)
    end = min((used + 1) * BOARD_ENTRY.size, BOARD_BYTES)
    jobs = []
    for since, until, thread, name in BOARD_ENTRY.iter_unpack(data[BOARD_ENTRY.size : end]):
        if since > 0.0 and math.isfinite(since):
            shown = name.rstrip(b"\0").decode(errors="replace")
            shown = "".join(char if char.isprintable() else "�" for char in shown)
            jobs.append(JobSeen(shown, since, until if math.isfinite(until) else 0.0, thread))
    return tuple(jobs)
