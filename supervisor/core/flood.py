"""Floods: how much one worker may say before it counts as gone mad. Pure arithmetic.

What an honest worker sends in a whole stop is a handful of messages, and under the worst contention
for a budget a few hundred a second. What is beyond these limits by far is not dropped silently for
ever: such a worker costs its supervisor a core, and its own work is not trusted any more either.
"""

from __future__ import annotations

__all__ = ["MOST_BYTES", "MOST_MESSAGES", "WINDOW", "Meter"]

WINDOW = 10.0  # seconds
MOST_MESSAGES = 20_000  # in a window
MOST_BYTES = 1 << 26


class Meter:
    """Counts what one worker says, in windows of equal length that begin with a message."""

    __slots__ = ("_began", "_bytes", "_messages")

    def __init__(self) -> None:
        self._began = float("-inf")
        self._messages = 0
        self._bytes = 0

    def take(self, now: float, size: int, weight: int = 1) -> bool:
        """Count one message; True when it is one too many.

        Args:
            now: monotonic time.
            size: in bytes.
            weight: as how many it counts, being written into log and journal.
        """
        if now - self._began > WINDOW:
            self._began = now
            self._messages = self._bytes = 0
        self._messages += weight
        self._bytes += size
        return self._messages > MOST_MESSAGES or self._bytes > MOST_BYTES

    def __str__(self) -> str:
        return f"more than {MOST_MESSAGES} messages or {MOST_BYTES >> 20} MiB in {WINDOW:g} s"
