"""What a program writes, as lines of the log. Bounded in memory, in lines and in bytes a second.

What is too much is counted and dropped, never kept: a flood, an endless line, binary data, a log
that cannot be written to. The last lines are kept for whoever has to explain the program's end.
"""

from __future__ import annotations

__all__ = ["Lines", "Output"]

import os
import select
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_LINE = 8192  # bytes; what is longer is cut
CHUNK = 1 << 16  # what a pipe holds
WINDOW = 1.0  # seconds for which these are meant:
MAX_LINES = 1000  # of both streams together
MAX_BYTES = 1 << 20
LAST_LINES = 20
MAX_TAIL = 1 << 12  # bytes of what is dropped that are looked at for the last lines

_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != ord("\t")
}


@dataclass(slots=True)
class Lines:
    """One stream cut into lines. Pure: bytes in, lines out."""

    _kept: bytearray = field(default_factory=bytearray)
    _cut: int = 0  # bytes of the line under way that were not kept

    def feed(self, data: bytes, most: int) -> tuple[list[tuple[bytes, int]], bytes]:
        """Return complete lines, `most` at most, with how much of each was cut; and what is left.

        What is left holds more lines than were wanted, or is empty.
        """
        lines: list[tuple[bytes, int]] = []
        begin = 0
        while (end := data.find(b"\n", begin)) >= 0:
            if len(lines) == most:
                return lines, data[begin:]
            self._add(data[begin:end])
            lines.append(self._taken())
            begin = end + 1
        self._add(data[begin:])
        return lines, b""

    def skip(self, data: bytes) -> tuple[int, list[bytes]]:
        """Pass over all lines in there; return how many, and the last of them.

        What comes after them is kept, as the beginning of the next one.
        """
        end = data.rfind(b"\n")
        passed = bytes(self._kept) + data[max(0, end - MAX_TAIL) : end]
        self._taken()
        self._add(data[end + 1 :])
        return data.count(b"\n"), passed[-MAX_TAIL:].split(b"\n")[-LAST_LINES:]

    def rest(self) -> tuple[bytes, int] | None:
        """Return the line that was never ended, if there is one."""
        return self._taken() if self._kept else None

    def _add(self, piece: bytes) -> None:
        room = MAX_LINE - len(self._kept)
        self._kept += piece[:room]
        self._cut += max(0, len(piece) - room)

    def _taken(self) -> tuple[bytes, int]:
        line = (bytes(self._kept).removesuffix(b"\r"), self._cut)
        self._kept.clear()
        self._cut = 0
        return line


class Output:
    """Both streams of a program, on their way into the log. One thread.

    Args:
        streams: descriptors to read from, which do not block, by name.
        log: where lines go.
        now: monotonic.
    """

    def __init__(self, streams: Mapping[str, int], log: Any, now: float) -> None:
        self._names = {fd: name for name, fd in streams.items()}
        self._lines = {fd: Lines() for fd in streams.values()}
        self._log = log
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._window_ends = now + WINDOW
        self._lines_left = MAX_LINES
        self._bytes_left = MAX_BYTES
        self._dropped_lines = 0
        self._dropped_bytes = 0

    @property
    def due(self) -> float | None:
        """When `time_passed` is wanted, to tell what was dropped."""
        return self._window_ends if self._dropped_bytes else None

    @property
    def is_over_its_limit(self) -> bool:
        """Whether what comes now is dropped."""
        return self._lines_left <= 0 or self._bytes_left <= 0

    def read(self, fd: int, now: float) -> bool:
        """Take what a stream has; False when it is closed."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return True
        if data:
            self.time_passed(now)
            self._take(fd, data)
        return bool(data)

    def time_passed(self, now: float) -> None:
        """Begin another second, where one is over: tell what was dropped in the last one."""
        if now < self._window_ends:
            return
        self._tell_dropped()
        self._window_ends = now + WINDOW
        self._lines_left = MAX_LINES
        self._bytes_left = MAX_BYTES

    def finish(self, now: float) -> None:
        """Take what is left in the pipes, without waiting for those who still hold them."""
        for fd, name in self._names.items():
            most = 1 << 20  # the largest pipe; whoever goes on writing is not waited for
            while most > 0:
                try:
                    data = os.read(fd, CHUNK)
                except BlockingIOError:
                    break
                if not data:
                    break
                most -= len(data)
                self.time_passed(now)
                self._take(fd, data)
            rest = self._lines[fd].rest()
            if rest is not None:
                self._write(name, *rest)
        self._tell_dropped()

    @property
    def last_lines(self) -> str:
        """The last lines that it has written, logged or not."""
        return "\n".join(self._last)

    def _take(self, fd: int, data: bytes) -> None:
        most = self._lines_left if self._bytes_left > 0 else 0
        lines, left = self._lines[fd].feed(data, most)
        for line, cut in lines:
            self._write(self._names[fd], line, cut)
        if left:
            number, last = self._lines[fd].skip(left)
            self._dropped_lines += number
            self._dropped_bytes += len(left)
            self._last.extend(_text(line) for line in last)

    def _write(self, stream: str, line: bytes, cut: int) -> None:
        text = _text(line)
        self._last.append(text)
        self._lines_left -= 1
        self._bytes_left -= len(line)
        if _has_room():
            more = {"cut_bytes": cut} if cut else {}
            self._log.info("worker.output", stream=stream, line=text, **more)
        else:
            self._dropped_lines += 1
            self._dropped_bytes += len(line) + 1

    def _tell_dropped(self) -> None:
        if self._dropped_bytes and _has_room():
            self._log.warning(
                "worker.output_dropped", lines=self._dropped_lines, bytes=self._dropped_bytes
            )
            self._dropped_lines = self._dropped_bytes = 0


def _text(line: bytes) -> str:
    """Return a line that harms no terminal: what is no text is written as its code."""
    text = line.decode(errors="backslashreplace")
    return text if text.isprintable() else text.translate(_CONTROLS)


def _has_room() -> bool:
    """Tell whether the log takes a line without waiting; a file always does."""
    try:
        poll = select.poll()
        poll.register(sys.stderr.fileno(), select.POLLOUT)
        return bool(poll.poll(0))
    except (OSError, ValueError):  # closed: nothing is written, and nothing waits
        return True
