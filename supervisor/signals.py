"""Signals: real Python handlers that do nothing, and a descriptor that tells which came.

The wakeup descriptor is written by C code, so a signal wakes the loop at once; the handlers exist
because a signal without one would have its default effect, and because systemd looks for them.
"""

from __future__ import annotations

__all__ = ["Signals"]

import signal
import socket

_HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCHLD,
)


class Signals:
    """The supervisor's signals as a readable descriptor. Made in the main thread, once."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        # A full buffer is no loss: signals are levels, and what is in the buffer wakes the loop.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, _handle)
        # Our own parent may have blocked them, and then nobody could stop us.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def fileno(self) -> int:
        """Return the descriptor that is readable when a signal has come."""
        return self._reader.fileno()

    def take(self) -> list[signal.Signals]:
        """Return the signals that have come since the last call, in order. Never blocks."""
        try:
            return [signal.Signals(number) for number in self._reader.recv(4096)]
        except BlockingIOError:
            return []


def _handle(_number: int, _frame: object) -> None:
    """Do nothing: the descriptor has told."""
