"""The notify socket of one program: what it says of itself, in systemd's words (sd_notify(3)).

A file in the supervisor's private folder. Only the worker's own process group and its descendants
are heard; what is too long, or is no text, changes nothing.
"""

from __future__ import annotations

__all__ = ["Notify", "parse"]

import array
import contextlib
import os
import re
import socket
import struct
from typing import Any

MAX_DATAGRAM = 4096  # bytes, as systemd has it
MAX_STATUS = 200  # characters
MAX_BATCH = 50  # datagrams a turn, so that one who talks without end holds up nothing
MAX_FDS = 32
_TIME = re.compile("[1-9][0-9]{0,12}")
_CREDENTIALS = struct.Struct("=iII")
_ROOM = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * MAX_FDS)
_REFUSED = ("MAINPID", "MAINPIDFD", "FDSTORE", "NOTIFYACCESS")


class Notify:
    """A bound socket. One thread.

    Args:
        folder: where its file is made; where this process may not, in a private one of its own.
        log: where is told what is dropped: the first of a kind, then ever more seldom.
    """

    def __init__(self, folder: str, log: Any) -> None:
        self._own_folder = ""
        self._log = log
        self._times: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        try:
            self.path = self._bound(folder)
        except PermissionError:  # this worker is another user than its supervisor
            from tempfile import mkdtemp

            self._own_folder = mkdtemp(prefix="ackvisor-")
            self.path = self._bound(self._own_folder)

    def _bound(self, folder: str) -> str:
        path = os.path.join(folder, f"notify-{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a process that had our pid, and was killed
        self._socket.bind(path)
        return path

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive` has something."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hear nothing more. Its file goes, too."""
        self._socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
            if self._own_folder:
                os.rmdir(self._own_folder)

    def receive(self) -> tuple[list[tuple[str, str]], bool]:
        """Return what has been said, and whether there may be more. Never blocks."""
        said: list[tuple[str, str]] = []
        for _ in range(MAX_BATCH):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    MAX_DATAGRAM, _ROOM, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return said, False
            pid, uid = _sender(ancillary)
            if flags & socket.MSG_TRUNC:
                self._dropped("it is longer than 4096 bytes", pid)
            elif not _is_ours(pid, uid):
                self._dropped("its sender does not belong to this worker", pid)
            else:
                said += self._heard(data, pid)
        return said, True

    def _heard(self, data: bytes, pid: int) -> list[tuple[str, str]]:
        said = []
        for name, value in parse(data):
            if name in _REFUSED:
                self._dropped(f"{name} is the supervisor's business", pid)
            else:
                said.append((name, value))
        return said

    def _dropped(self, reason: str, pid: int) -> None:
        times = self._times[reason] = self._times.get(reason, 0) + 1
        if times & (times - 1) == 0:
            self._log.warning("notify.dropped", reason=reason, sender_pid=pid, times=times)


def parse(data: bytes) -> list[tuple[str, str]]:
    """Return the assignments of a datagram that say something; what is none is passed over.

    READY, STOPPING and WATCHDOG are there only when they are "1", a time only when it is one; a status
    is one short line.
    """
    said = []
    for line in data.decode(errors="replace").split("\n"):
        name, is_assignment, value = line.partition("=")
        if not is_assignment or (name in ("READY", "STOPPING", "WATCHDOG") and value != "1"):
            continue
        if name == "EXTEND_TIMEOUT_USEC" and not _TIME.fullmatch(value):
            continue
        if name == "STATUS":
            value = "".join(c if c.isprintable() else " " for c in value[:MAX_STATUS])
        said.append((name, value))
    return said


def _sender(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, int]:
    """Return pid and user of who sent a message, as the kernel says; close what came with it.

    `systemd-notify` waits until the descriptor that it sends is closed (BARRIER=1): by then all
    that it had said is read.
    """
    pid = uid = -1
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, uid, _ = _CREDENTIALS.unpack(value[: _CREDENTIALS.size])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
            for fd in fds:
                os.close(fd)
    return pid, uid


def _is_ours(pid: int, uid: int) -> bool:
    """Tell whether a process is in this process group, or descends from this process.

    One that has ended meanwhile, as a shell's `systemd-notify` may have, is believed when it was of
    our user: nobody else reaches the socket, and such a one could do us any harm without it.
    """
    if pid <= 0:  # it is in no pid namespace of ours; and 0 means ourselves below
        return False
    try:
        if os.getpgid(pid) == os.getpgid(0):
            return True
        while pid > 1:
            if (pid := _parent(pid)) == os.getpid():
                return True
    except (OSError, ValueError):
        return uid == os.geteuid()
    return False


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split(maxsplit=2)[1])
