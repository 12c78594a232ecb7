"""The socket on which a service manager listens (sd_notify), by path or abstract name.

It never blocks and never raises into the loop. What the manager's queue cannot take now is kept, in
order, and tried again; of two STATUS that wait for that, the later one is enough.
"""

from __future__ import annotations

__all__ = ["Notifier"]

import errno
import socket
from collections import deque
from collections.abc import Sequence

RETRY = 0.1  # seconds until a full queue is tried again
MAX_UNSENT = 64  # messages; only a manager that is stuck lets that many wait
# systemd takes datagrams of 4096 bytes, and ignores longer ones.
MAX_LINE = 1000


class Notifier:
    """One service manager's ear. Owned by the loop's thread.

    Args:
        address: what NOTIFY_SOCKET holds: an absolute path, or "@" and an abstract name.
    """

    def __init__(self, address: str) -> None:
        self.error = ""  # why the last message has not arrived, and never will; "" when it has
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._unsent: deque[bytes] = deque(maxlen=MAX_UNSENT)
        self._retry_at: float | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, lines: Sequence[str], now: float) -> None:
        """Send one message, now or as soon as the manager takes it."""
        message = "\n".join(_line(line) for line in lines).encode(errors="replace")
        if self._unsent and _is_status(self._unsent[-1]) and _is_status(message):
            self._unsent.pop()
        self._unsent.append(message)
        self.flush(now)

    def flush(self, now: float) -> None:
        """Send what has been waiting, as far as that goes."""
        self._retry_at = None
        while self._unsent:
            try:
                # To the address each time: who listens there may be another one by now.
                self._socket.sendto(self._unsent[0], self._address)
            except OSError as exc:
                # ENOBUFS and the like pass as well, but nobody else would tell of their end.
                if exc.errno in {errno.EAGAIN, errno.EINTR, errno.ENOBUFS}:
                    self._retry_at = now + RETRY
                    return
                self.error = exc.strerror or str(exc)
            else:
                self.error = ""
            self._unsent.popleft()

    def next_deadline(self) -> float | None:
        """Return when `flush` wants to be called."""
        return self._retry_at

    def close(self) -> None:
        """Close the socket. What has not been sent is lost."""
        self._socket.close()


def _line(line: str) -> str:
    return " ".join(line.split())[:MAX_LINE]


def _is_status(message: bytes) -> bool:
    return message.startswith(b"STATUS=") and b"\n" not in message
