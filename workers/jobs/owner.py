"""Who holds a job: a process, named so that any other process can tell whether it still lives.

Decides: is the holder of a claim known to be dead? It must not guess. "Dead" lets a job be taken
before its lease has ended, so every doubt counts as alive and leaves the matter to the lease.
"""

from __future__ import annotations

__all__ = ["Owner", "is_known_dead"]

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# What identifies a process is only comparable within one boot of one kernel, as seen from one pid
# namespace (a container has its own pids) and one time namespace (which shifts start times).
_NAMESPACES = ("pid", "time")


@dataclass(frozen=True, slots=True)
class Owner:
    """One process that takes jobs. Its text form stands in the table, `owner` of a running job.

    Attributes:
        worker: the worker's id, for people.
        pid: its process.
        started: when that process started, in clock ticks since boot: tells a reused pid apart.
        place: boot and namespaces that `pid` and `started` belong to; "?" where unknown.
    """

    worker: str
    pid: int
    started: int
    place: str

    @classmethod
    def here(cls, worker: str) -> Self:
        """Return the calling process, to be asked for after the last fork."""
        pid = os.getpid()
        try:
            return cls(worker, pid, _stat(pid).started, _place())
        except (OSError, ValueError, IndexError):  # no /proc: only the lease can tell
            return cls(worker, pid, 0, "?")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the owner that `text` stands for, None where it is not one of ours."""
        match text.rsplit(" ", 3):
            case [worker, pid, started, place] if pid.isdecimal() and started.isdecimal():
                return cls(worker, int(pid), int(started), place)
            case _:
                return None

    @property
    def name(self) -> str:
        """What to call it to people."""
        return f"{self.worker} (pid {self.pid})"

    def __str__(self) -> str:
        return f"{self.worker} {self.pid} {self.started} {self.place}"


def is_known_dead(owner: Owner, here: Owner) -> bool:
    """Return whether `owner`'s process has ended, as far as `here`, the caller, can know."""
    if owner.place != here.place or owner.place == "?":
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's process; /proc may still tell
    try:
        stat = _stat(owner.pid)
    except (OSError, ValueError, IndexError):
        return False  # hidden from us, or ending at this moment
    if stat.started != owner.started:
        return True  # the pid has been given to another process
    # Killed and not yet waited for. A process whose main thread has ended while others run looks
    # the same but for its threads.
    return stat.state in "ZX" and stat.threads <= 1


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    threads: int
    started: int


def _stat(pid: int) -> _Stat:
    """Read what proc(5) calls fields 3, 20 and 22 of /proc/PID/stat."""
    text = Path(f"/proc/{pid}/stat").read_bytes().decode("ascii", "replace")
    fields = text[text.rindex(")") + 2 :].split(" ")  # the name before it may hold anything
    return _Stat(fields[0], int(fields[17]), int(fields[19]))


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ":".join([boot, *(_namespace(kind) for kind in _NAMESPACES)])


def _namespace(kind: str) -> str:
    try:
        return str(Path(f"/proc/self/ns/{kind}").stat().st_ino)
    except FileNotFoundError:
        return "-"  # a kernel without this kind: then all its processes share one
