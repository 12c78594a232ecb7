"""The jobs of a worker, written where its supervisor can see them without asking.

A page of shared memory, made by the supervisor before the fork. The work loop itself writes there:
when a job begins, when it ends, until when it is busy. Nobody else vouches for it, and nobody has
to answer: what stands there can be read while the interpreter lock is held and while the process
is stopped. Only workers with a `hang_timeout`, and those of `workers.jobs`, have one.

Theory of operation
-------------------
**An entry has one writer.** It belongs to a `Place` of the ledger, and that to the job that stands
there. Only `extend` writes to the entry of a job that may be another thread's: under the lock,
after it has set `job.until` and then found the job in flight. Who ends a job takes it off the books
and then looks at `job.until`, and where that is set takes the lock to clear it. So one of the two
sees the other, and nothing of a job stands in the entry of the next.

**A free entry has a begin of 0, and no `until`.** The name and the thread stay: mostly the next job
has the same, and then a begin and an end are one store each.

**The begin is written last and cleared first.** Each number is aligned and written by one store (a
`memoryview` of doubles does that; `struct` writes some formats byte by byte). That still lets a
reader who is in the middle of an entry see two jobs in it, and processors may show another one's
stores in another order. So the reader looks twice: see `supervisor.scoreboard.in_both`.

It needs the interpreter lock, which makes `list.pop` and `list.append` atomic: it is not for
free-threaded builds.
"""

from __future__ import annotations

__all__ = ["Scoreboard", "receive"]

import mmap
import os
import socket
import struct
import weakref

from supervisor.protocol import BOARD_BYTES, BOARD_ENTRY
from workers.worker import Job, Ledger, Place

_WORDS = BOARD_ENTRY.size // 8  # an entry's; it is told by the number of its first
_USED = 2  # in the header
_NONE = -1  # the entry of a place that has none
_NAME_AT = 24  # in bytes
_pack_name = struct.Struct(f"{BOARD_ENTRY.size - _NAME_AT}s").pack_into


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

    _unplaced: dict[Job, None]  # in the order of their begin; written under the lock

    def __init__(self, board: int) -> None:
        super().__init__()
        self._use(mmap.mmap(board, BOARD_BYTES))
        os.close(board)
        self._used = 0
        self._unplaced = {}
        # A child of user code must not write over its parent's entries.
        me = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _disinherit(me()))

    def _use(self, board: mmap.mmap | bytearray) -> None:
        self._board = memoryview(board)
        self._times = self._board.cast("d")
        self._words = self._board.cast("Q")

    def _new_place(self) -> Place:
        """Return a new place, with an entry that was never used if there is one."""
        place = Place()
        with self._lock:
            if (self._used + 1) * BOARD_ENTRY.size < BOARD_BYTES:
                self._used += 1
                self._words[_USED] = self._used
                place.entry = self._used * _WORDS
            else:
                place.entry = _NONE
            self._places[place] = None
        return place

    def _show(self, job: Job, entry: int) -> None:
        if entry < 0:
            self._await_entry(job)
            return
        name = job.name
        if "://" in name or "=" in name:
            name = _without_secrets(name)
        try:
            shown = name.encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="replace")
        _pack_name(self._board, 8 * entry + _NAME_AT, shown)
        place = job.place
        place.name = job.name
        if place.ident != job.ident:
            place.ident = self._words[entry + 2] = job.ident
        if job.until:
            self._times[entry + 1] = job.until
        self._times[entry] = job.since  # from here on it can be seen
        place.entry = entry  # from here on who ends the job clears it

    def _await_entry(self, job: Job) -> None:
        with self._lock:
            self._unplaced[job] = None
        # First this, then the look: who ends a job does it the other way round. A place that has
        # lost its entry, or gives it away here, is of no more use.
        while job in self._unplaced:
            try:
                spare = self._idle.pop()
            except IndexError:
                return
            with self._lock:
                if job not in self._unplaced:  # it has been given one just now
                    self._idle.append(spare)
                    return
                if spare.entry > 0:
                    self._hand_on(spare.entry)
                self._retire(spare)

    def _settle(self, job: Job) -> None:
        place = job.place
        with self._lock:
            self._unplaced.pop(job, None)
            entry = place.entry  # it may have got one just now
            if entry > 0:
                self._times[entry] = 0.0
                self._times[entry + 1] = 0.0
                if self._unplaced:
                    place.entry, place.ident = _NONE, 0
                    self._hand_on(entry)

    def _extend(self, job: Job, until: float) -> None:
        super()._extend(job, until)
        if job.place.entry > 0:
            self._times[job.place.entry + 1] = until

    def _hand_on(self, entry: int) -> None:
        """Give a free entry to the job that has waited longest for one."""
        # Whoever stands there has not ended: it could not leave without the lock.
        job = next(iter(self._unplaced))
        del self._unplaced[job]
        self._show(job, entry)

    def _retire(self, place: Place) -> None:
        del self._places[place]
        self._counts["done"][0] += place.quick
        self._seconds += place.seconds

    def disinherit(self) -> None:
        """In a fork's child: write where nobody looks."""
        self._use(bytearray(BOARD_BYTES))


def _disinherit(board: Scoreboard | None) -> None:
    if board is not None:
        board.disinherit()


def _without_secrets(name: str) -> str:
    from workers.examination import without_secrets

    return without_secrets(name)
