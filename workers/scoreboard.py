"""The jobs of a worker, written where its supervisor can see them without asking.

A page of shared memory, made by the supervisor before the fork. The work loop itself writes there:
when a job begins, when it ends, until when it is busy. Nobody else vouches for it, and nobody has
to answer: what stands there can be read while the interpreter lock is held and while the process
is stopped. Only workers with a `hang_timeout` have one.
"""

from __future__ import annotations

__all__ = ["Scoreboard", "receive"]

import mmap
import os
import socket
import weakref
from collections import deque

from supervisor.protocol import BOARD_BYTES, BOARD_ENTRY
from workers.worker import Job, Ledger, Outcome

_pack_into = BOARD_ENTRY.pack_into


def receive(lifeline: int) -> int:
    """Return the descriptor of the scoreboard, which waits in the lifeline since before the fork.

    Raises:
        OSError: it is not there.
    """
    with socket.socket(fileno=os.dup(lifeline)) as other:
        _, fds, _, _ = socket.recv_fds(other, 1, 1)
    if not fds:
        raise OSError("BUG: a watched worker without a scoreboard")
    os.set_inheritable(fds[0], False)
    return fds[0]


class Scoreboard(Ledger):
    """A ledger of jobs whose entries stand in shared memory, too.

    One entry a job, for as long as there are free ones; who finds none gets the next that is free,
    in order. So a job that hangs is always seen in the end.

    Args:
        board: the descriptor of the page. It is closed.
    """

    def __init__(self, board: int) -> None:
        super().__init__()
        self._board: mmap.mmap | bytearray = mmap.mmap(board, BOARD_BYTES)
        os.close(board)
        self._times = memoryview(self._board).cast("d")
        free: list[int] = []  # offsets of entries that were used before
        self._take = free.pop
        self._free = free.append
        self._used = 0
        self._unplaced: deque[Job] = deque()
        # A child of user code must not write over its parent's entries.
        me = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _disinherit(me()))

    def begin(self, job: Job) -> None:
        """Count a job as in flight. Any thread."""
        self._jobs[id(job)] = job
        try:
            job.place = place = self._take()  # atomic: whoever has it owns the entry
        except IndexError:
            self._begin_slowly(job)
            return
        name = job.name
        if "://" in name:
            name = _without_secrets(name)
        _pack_into(self._board, place, job.since, job.until, job.ident, name.encode())

    def end(self, job: Job, outcome: Outcome) -> None:
        """Count a job as over. Any thread."""
        # First off the books: from then on nobody writes to its entry, or gives it one.
        Ledger.end(self, job, outcome)
        place = job.place
        if place:
            job.place = 0
            self._times[place >> 3] = 0.0
            if self._unplaced:
                self._hand_on(place)
            else:
                self._free(place)

    def extend(self, job: Job, until: float) -> None:
        """Write down until when a job is busy. Any thread."""
        Ledger.extend(self, job, until)
        with self._lock:
            if id(job) in self._jobs and job.place:
                self._times[(job.place >> 3) + 1] = until

    def _begin_slowly(self, job: Job) -> None:
        """Give a job an entry that was never used; where there is none, it has to wait."""
        with self._lock:
            place = (self._used + 1) * BOARD_ENTRY.size
            if place >= BOARD_BYTES:
                self._unplaced.append(job)
                return
            self._used += 1
            _pack_into(self._board, 0, 0.0, 0.0, self._used, b"")
            self._write(job, place)

    def _write(self, job: Job, place: int) -> None:
        job.place = place
        name = _without_secrets(job.name).encode()
        _pack_into(self._board, place, job.since, job.until, job.ident, name)

    def _hand_on(self, place: int) -> None:
        """Give an entry to the job that has waited longest for one, if it has not ended."""
        with self._lock:
            while self._unplaced:
                job = self._unplaced.popleft()
                if id(job) in self._jobs:
                    self._write(job, place)
                    return
        self._free(place)

    def disinherit(self) -> None:
        """In a fork's child: write where nobody looks."""
        self._board = bytearray(BOARD_BYTES)
        self._times = memoryview(self._board).cast("d")


def _disinherit(board: Scoreboard | None) -> None:
    if board is not None:
        board.disinherit()


def _without_secrets(name: str) -> str:
    from workers.examination import without_secrets

    return without_secrets(name)
