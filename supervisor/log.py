"""Logging: one structlog configuration for supervisor and workers. A leaf.

Lines go to standard error, one write each, and nobody ever waits long for whoever reads them: what
cannot be written now is kept for later, what does not fit there is counted, and said. Every line of a worker says which worker, group and
generation it comes from, whatever thread or library wrote it: the names are bound to the process,
because context variables do not reach threads that are started later.
"""

from __future__ import annotations

__all__ = [
    "backlog",
    "bind",
    "change",
    "configure",
    "flush",
    "get_logger",
    "in_force",
    "timestamp",
    "write",
]

import importlib
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

from supervisor.plain import harmless
from supervisor.systemd import is_journal, prioritized


class _Later(ModuleType):
    """Stands in for a module until something of it is wanted."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


# Not in every process: structlog imports asyncio for loggers that are awaited (7 MB, and a third of
# the supervisor's start), and rich, where that is installed, to draw tracebacks, which are written
# plainly here.
_stand_ins: dict[str, Any] = {
    name: module
    for name, module in {"asyncio": _Later("asyncio"), "rich": None}.items()
    if name not in sys.modules
}
sys.modules.update(_stand_ins)
try:
    import structlog
finally:
    for _name, _module in _stand_ins.items():
        if sys.modules.get(_name) is _module:
            del sys.modules[_name]

# What is kept while nobody reads. Later lines are counted only: the first ones tell what has begun.
MAX_KEPT = 1 << 20  # bytes
# How long one line of a worker may wait for a reader that is merely slow, and was not so before.
PATIENCE = 0.2  # seconds

_Fields = MutableMapping[str, Any]
_bound: dict[str, Any] = {}
# Loggers keep what they were made with: their class, and this list. So both are changed in place.
_processors: list[Any] = []
in_force = ("", "")  # style and level


def get_logger() -> Any:
    """Return a structlog logger. Any thread."""
    return structlog.get_logger()


def bind(**fields: Any) -> None:
    """Let every line of this process carry these fields from now on."""
    _bound.update(fields)


def configure(style: str, level: str, *, patience: float = PATIENCE) -> None:
    """Configure structlog and the standard library's logging for this process.

    Args:
        style: "console" for eyes, "json" for programs.
        level: the least severe level that is written, as "info".
        patience: seconds that a line may wait for a slow reader; 0: never, `backlog` is polled.
    """
    _standard_error.open(patience)
    _take(style, level)
    structlog.configure(
        processors=_processors,
        wrapper_class=_Logger,
        logger_factory=_Lines,
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=level.upper(), force=True)


def change(style: str, level: str) -> None:
    """Change style and level of every logger that there is. Any thread; after `configure`.

    The level of the standard library's root logger follows, unless the application has set another.
    """
    if (style, level) == in_force:
        return
    root = logging.getLogger()
    if root.level == logging.getLevelName(in_force[1].upper()):
        root.setLevel(level.upper())
    _take(style, level)


def _take(style: str, level: str) -> None:
    global in_force  # noqa: PLW0603  # a process has one log
    colours = style == "console" and _shows_colours()
    *processors, render = _console(colours=colours) if style == "console" else _json()
    if is_journal(2, os.environ):
        render = _for_journal(render)
    # Of the same length in both styles: a line that another thread is writing comes to its end.
    _processors[:] = [
        structlog.contextvars.merge_contextvars,
        _add_bound,
        structlog.processors.add_log_level,
        *processors,
        render,
    ]
    _Logger.__bases__ = (_filtering(level),)
    in_force = (style, level)


def _shows_colours() -> bool:
    """Tell whether a person looks on, at a terminal that knows colours, and has not refused them."""
    refused = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not refused


def _filtering(level: str) -> type:
    return structlog.make_filtering_bound_logger(getattr(logging, level.upper()))


# What is below the level costs nothing, because structlog has a class of loggers for each level.
# Every logger of this process is of this class, whose base is that of the level in force.
_Logger: Any = type("_Logger", (_filtering("info"),), {})


def write(text: str) -> None:
    """Write text that is no log line where the log goes, under the same rules. Any thread."""
    _standard_error.write(text)


def backlog() -> int | None:
    """Return a descriptor to be polled for writing, then `flush`; None: nothing is kept."""
    return _standard_error.backlog()


def flush(timeout: float) -> None:
    """Write what is kept; wait for the reader so many seconds at most. Any thread."""
    _standard_error.flush(timeout)


def _add_bound(_logger: object, _method: str, fields: _Fields) -> _Fields:
    return {**_bound, **fields} if _bound else fields


def timestamp() -> str:
    """Return the wall clock as RFC 3339, UTC, microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _console(*, colours: bool) -> list[Any]:
    def for_eyes(_logger: object, _method: str, fields: _Fields) -> _Fields:
        """Show local time, no empty fields, long texts as blocks, nothing that steers a terminal."""
        shown = {
            key: harmless(value, lines=True) if isinstance(value, str) else value
            for key, value in fields.items()
            if value not in (None, "", [], {})
        }
        shown.pop("time", None)
        for block, names in (("exception", ("traceback",)), ("stack", ("stacks", "stack"))):
            for name in names:
                if name in shown:
                    shown[block] = str(shown.pop(name)).rstrip()
        return shown

    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
        for_eyes,
        structlog.dev.ConsoleRenderer(
            colors=colours,
            pad_event_to=22,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _json() -> list[Any]:
    def stamp(_logger: object, _method: str, fields: _Fields) -> _Fields:
        return {"time": fields.pop("time", None) or timestamp(), **fields}

    return [
        structlog.processors.format_exc_info,
        stamp,
        structlog.processors.JSONRenderer(default=repr),
    ]


def _for_journal(render: Any) -> Any:
    """Give each line its priority; a text of many lines is as many entries of the journal."""

    def with_priority(logger: object, method: str, fields: _Fields) -> str:
        return prioritized(render(logger, method, fields), fields.get("level", method))

    return with_priority


class _StandardError:
    """Standard error that fails nobody and stops nobody: a full disk, a reader that does not read.

    Its open file description is shared with the shell and with every worker, so that O_NONBLOCK on
    it would be a trap for all of them. A pipe or a terminal is opened once more, and that
    description is ours; a socket is told with each message. Where neither is allowed, we look
    before we write no more than a pipe takes at once; there, a race with other writers is left.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._kept: deque[bytes] = deque()
        self._size = 0  # of all that is kept
        self._lost = 0  # lines, since that was last said
        self._patience = 0.0
        self._is_stuck = False  # the reader had its chance
        self._is_writing = False
        self._is_broken = False  # the last write has failed: nothing can be said of it yet
        self._fd = 2
        self._send: Callable[[bytes], int] = self._sent_to_file

    def open(self, patience: float) -> None:
        """Find out what standard error is."""
        self._patience = patience
        mode = os.fstat(2).st_mode
        if stat.S_ISSOCK(mode):
            # Not a duplicate, since a template must hold no socket; never closed.
            self._socket = socket.socket(fileno=2)
            self._send = self._sent_to_socket
        elif stat.S_ISFIFO(mode) or os.isatty(2):
            try:
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._fd = os.open("/proc/self/fd/2", flags)
            except OSError:  # it is another user's
                self._send = self._sent_if_there_is_room

    def write(self, text: str) -> None:
        line = text.encode(errors="backslashreplace")
        self._begin_anew_if_forked()
        with self._lock:
            if self._is_writing:  # a signal's handler has come between
                self._keep(line)
                return
            # What is kept comes first, and may make room.
            self._write_kept(0.0)
            self._keep(line)
            self._write_kept(0.0 if self._is_stuck else self._patience)
            self._own_up()

    def backlog(self) -> int | None:
        return self._fd if self._kept else None

    def flush(self, timeout: float) -> None:
        self._begin_anew_if_forked()
        with self._lock:
            if not self._is_writing:
                self._write_kept(timeout)
                self._own_up()

    def _begin_anew_if_forked(self) -> None:
        """Be the copy in a forked process: what is kept is the parent's to write.

        No hook of the fork's, since that would copy pages of each worker that never logs.
        """
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._kept.clear()
        self._size = self._lost = 0
        self._is_writing = False

    def _keep(self, line: bytes) -> None:
        if self._size + len(line) > MAX_KEPT:
            self._lost += 1
        else:
            self._kept.append(line)
            self._size += len(line)

    def _write_kept(self, timeout: float) -> None:
        self._is_writing = True
        deadline = time.monotonic() + timeout
        try:
            while self._kept:
                try:
                    written = self._send(self._kept[0])
                except BlockingIOError:
                    left = deadline - time.monotonic()
                    if left <= 0 or not _is_writable(self._fd, left):
                        self._is_stuck = True
                        return
                except OSError:  # the disk is full, or the reader has gone
                    self._is_broken = True
                    self._lost += len(self._kept)
                    self._kept.clear()
                    self._size = 0
                else:
                    self._is_stuck = self._is_broken = False
                    self._size -= written
                    line = self._kept.popleft()
                    if written < len(line):
                        self._kept.appendleft(line[written:])
        finally:
            self._is_writing = False

    def _own_up(self) -> None:
        """Say how many lines are missing, as soon as that can be said."""
        if self._lost and not self._kept and not self._is_broken:
            lost, self._lost = self._lost, 0
            get_logger().error("log.lines_lost", lines=lost)
            if self._lost:  # this line, which says that of others
                self._lost = lost

    def _sent_to_file(self, line: bytes) -> int:
        return os.write(self._fd, line)

    def _sent_to_socket(self, line: bytes) -> int:
        return self._socket.send(line, socket.MSG_DONTWAIT)

    def _sent_if_there_is_room(self, line: bytes) -> int:
        if not _is_writable(2, 0.0):
            raise BlockingIOError
        return os.write(2, line[: select.PIPE_BUF])


def _is_writable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout * 1000))


_standard_error = _StandardError()


class _Lines:
    """What structlog hands its finished lines to. Unlike its own, it waits for no lock of a line."""

    def __init__(self, *_: object) -> None:
        pass

    def msg(self, message: str) -> None:
        _standard_error.write(message + "\n")

    log = debug = info = warning = warn = error = err = critical = fatal = failure = exception = msg


class _ToStructlog(logging.Handler):
    """Sends what libraries log through the standard library the same way as our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )
        except Exception:
            self.handleError(record)
