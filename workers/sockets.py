"""Shared listening sockets, as a worker sees them: `worker.sockets["web"]`.

Every worker of a group accepts from one and the same kernel object, and so does the next generation.
What one of them changes on it, it changes for all. So these never do: see SharedSocket.
"""

from __future__ import annotations

__all__ = ["SharedSocket", "SharedSockets"]

import socket
from collections.abc import Iterator, Mapping
from typing import Any

_LONG = 86_400.0  # seconds; for who waits for ever, again and again


class SharedSocket(socket.socket):
    """A listening socket that other processes accept from, too.

    It listens already. Its descriptor is always non-blocking, because that belongs to the kernel
    object and so to all: with a blocking one, a worker that was woken for a connection which another
    one then took would hang in `accept`. Whether *this* object's `accept` waits is its own affair,
    set as usual: by default it does. `accept` is to be called by one thread at a time.

    A worker that is told to stop closes it, or just does not accept any more: what has not been
    accepted is left to the others.
    """

    _waits_for_ever = True

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self.settimeout(None)

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: it listens, with the backlog that the configuration says."""

    def settimeout(self, value: float | None, /) -> None:
        """Let `accept` wait so many seconds; None: for ever, 0: not at all."""
        self._waits_for_ever = value is None
        super().settimeout(_LONG if value is None else value)

    def setblocking(self, flag: bool, /) -> None:
        """Let `accept` wait for ever, or not at all."""
        self.settimeout(None if flag else 0.0)

    def gettimeout(self) -> float | None:
        """Return how long `accept` waits, in seconds; None: for ever."""
        return None if self._waits_for_ever else super().gettimeout()

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection, which blocks, and where it comes from.

        Raises:
            TimeoutError: none has come in time.
            BlockingIOError: there is none, and this does not wait.
        """
        while True:
            try:
                return super().accept()
            except TimeoutError:
                if not self._waits_for_ever:
                    raise


class SharedSockets(Mapping[str, socket.socket]):
    """The listening sockets of a worker by name, each made when it is first asked for."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        self._descriptors = descriptors
        self._made: dict[str, SharedSocket] = {}

    def __getitem__(self, name: str) -> SharedSocket:
        if name not in self._made:
            if name not in self._descriptors:
                raise KeyError(f"{name!r} is not among the sockets of this group: {list(self)}")
            self._made[name] = SharedSocket(self._descriptors[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._descriptors)

    def __len__(self) -> int:
        return len(self._descriptors)
