"""What workers of a dead supervisor may still have open: written down by it, read by the next one.

A supervisor that is killed leaves workers which finish what they have in hand, until their deadline
at the latest. Whoever starts in its place must not grant what those still hold. So each worker with
a pool under a budget has a note in `runtime_dir`, from its birth to its end: a file whose content
says who it is (a pid and when that process started, so a pid that was given away again is told
apart) and how much it may have. It is read under the lock of `runtime_dir`.

Every doubt counts as "still there", until the deadline.
"""

from __future__ import annotations

__all__ = ["FOLDER", "Notes", "Orphans"]

import contextlib
import json
import os
import select
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.core.budgets import SETTLE

FOLDER = "held"  # in runtime_dir
# Seconds after its grace in which an orphan has surely been killed: by itself, or by its template.
KILLED_BY = 1.5
AGAIN = 5.0  # seconds until a note that could not be written is tried again
LONGEST_GRACE = 366 * 86400.0  # a note that says more is none
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Notes:
    """The notes of our own workers. Owned by the loop.

    Args:
        runtime_dir: the folder, locked.
        on_error: told why a note cannot be written, the first time; the worker goes on without one
            until it can.
    """

    def __init__(self, runtime_dir: Path, on_error: Callable[[str], object]) -> None:
        self._folder = runtime_dir / FOLDER
        self._on_error = on_error
        self._boot = _boot()
        self._notes: dict[str, dict[str, Any]] = {}
        self._unwritten: set[str] = set()  # whose notes could not be written, as on a full disk
        self._again_at: float | None = None

    def next_deadline(self) -> float | None:
        """Return when `time_passed` wants to be called; None: nothing is left to be written."""
        return self._again_at

    def time_passed(self, now: float) -> None:
        """Try again what could not be written."""
        if not self._unwritten:
            self._again_at = None
        elif self._again_at is None:
            self._again_at = now + AGAIN
        elif self._again_at <= now:
            self._again_at = now + AGAIN
            for worker in list(self._unwritten):
                self._write(worker)

    def born(
        self, worker: str, pid: int, grace: float, pools: Mapping[str, tuple[int, int]]
    ) -> None:
        """Note a worker, with the `max_open` and the budget of each pool that has one."""
        if not pools:
            return
        try:
            started = _started(pid)
        except OSError:
            return  # it has ended
        self._notes[worker] = {
            "worker": worker,
            "pid": pid,
            "started": started,
            "boot": self._boot,
            "grace": grace,
            "pools": {name: list(numbers) for name, numbers in pools.items()},
        }
        self._write(worker)

    def changed(self, grace: float, pools: Mapping[str, tuple[int, int]]) -> None:
        """Note other numbers; what workers had before, they may still have."""
        for worker, note in self._notes.items():
            note["grace"] = max(note["grace"], grace)
            for name, (most, budget) in note["pools"].items():
                now_most, now_budget = pools.get(name, (0, 0))
                note["pools"][name] = [max(most, now_most), max(budget, now_budget)]
            self._write(worker)

    def ended(self, worker: str) -> None:
        """Remove the note of a worker that has ended."""
        note = self._notes.pop(worker, None)
        self._unwritten.discard(worker)
        if note is not None:
            with contextlib.suppress(OSError):
                self._path(note).unlink()

    def close(self) -> None:
        """Remove the folder, when nobody is left."""
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _write(self, worker: str) -> None:
        note = self._notes[worker]
        path = self._path(note)
        new = path.with_suffix(".new")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            new.write_text(json.dumps(note), encoding="utf-8")
            new.replace(path)
        except OSError as exc:
            _remove(new)
            if worker not in self._unwritten:
                self._unwritten.add(worker)
                self._on_error(f"{path}: {exc.strerror}")
        else:
            self._unwritten.discard(worker)

    def _path(self, note: dict[str, Any]) -> Path:
        # Not by the worker's name: an orphan has the same, and its note stays until it has gone.
        return self._folder / f"{note['pid']}-{note['started']}"


@dataclass(slots=True)
class _Orphan:
    worker: str
    note: Path
    pidfd: int  # -1: it has ended, or cannot be watched
    pools: dict[str, tuple[int, int]]
    until: float  # when what it had is surely closed


class Orphans:
    """The workers that another supervisor has left behind. Owned by the loop.

    Args:
        runtime_dir: the folder, locked.
        now: the monotonic time.
    """

    def __init__(self, runtime_dir: Path, now: float) -> None:
        self._poll = select.epoll()
        self._orphans: list[_Orphan] = []
        folder = runtime_dir / FOLDER
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            names = []
        boot = _boot() if names else ""
        for name in names:
            orphan = _read(folder / name, boot, now)
            if orphan is not None:
                self._orphans.append(orphan)
                if orphan.pidfd >= 0:
                    self._poll.register(orphan.pidfd, select.EPOLLIN)
            else:
                _remove(folder / name)

    def fileno(self) -> int:
        """Return a descriptor that is readable when one of them has ended."""
        return self._poll.fileno()

    @property
    def names(self) -> list[str]:
        """Who is left."""
        return [orphan.worker for orphan in self._orphans]

    def next_deadline(self) -> float | None:
        """Return when less is held at the latest."""
        return min((orphan.until for orphan in self._orphans), default=None)

    def time_passed(self, now: float) -> bool:
        """Take note of ends and of deadlines; True when less is held than before."""
        for fd, _ in self._poll.poll(0):
            for orphan in self._orphans:
                if orphan.pidfd == fd:
                    self._poll.unregister(fd)
                    os.close(fd)
                    orphan.pidfd = -1
                    orphan.until = min(orphan.until, now + SETTLE)
        over = [orphan for orphan in self._orphans if orphan.until <= now]
        for orphan in over:
            self._orphans.remove(orphan)
            _remove(orphan.note)
            if orphan.pidfd >= 0:
                self._poll.unregister(orphan.pidfd)
                os.close(orphan.pidfd)
        return bool(over)

    def held(self) -> dict[str, int]:
        """Return how many connections they may have, by pool.

        All together never had more than their budget, and each never more than its `max_open`.
        """
        most: dict[str, int] = {}
        budgets: dict[str, int] = {}
        for orphan in self._orphans:
            for name, (max_open, budget) in orphan.pools.items():
                most[name] = most.get(name, 0) + max_open
                budgets[name] = max(budgets.get(name, 0), budget)
        return {name: min(total, budgets[name]) for name, total in most.items()}

    def close(self) -> None:
        """Let go of every descriptor."""
        for orphan in self._orphans:
            if orphan.pidfd >= 0:
                os.close(orphan.pidfd)
        self._orphans.clear()
        self._poll.close()


def _read(path: Path, boot: str, now: float) -> _Orphan | None:
    """Return the orphan that a note tells of, None where it has surely gone (or is no note)."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        pid, started = int(note["pid"]), int(note["started"])
        grace = float(note["grace"])
        pools = {str(name): (int(m), int(b)) for name, (m, b) in note["pools"].items()}
        was_here = note["boot"] == boot
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # a note that was not finished: its worker was not born
    if not was_here or not 0 <= grace <= LONGEST_GRACE:
        return None
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
        # In this order: whom the descriptor stands for is who has this number now.
        if _started(pid) != started:
            os.close(pidfd)
            return None
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        os.close(pidfd)
        return None
    except OSError:
        pass  # it cannot be watched: it has its whole time
    return _Orphan(str(note["worker"]), path, pidfd, pools, now + grace + KILLED_BY + SETTLE)


def _remove(note: Path) -> None:
    with contextlib.suppress(OSError):
        note.unlink()


def _started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def _boot() -> str:
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
