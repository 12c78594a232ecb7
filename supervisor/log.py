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
    "conceal",
    "configure",
    "correlate",
    "draw",
    "flush",
    "get_logger",
    "in_force",
    "redacted",
    "repeats_due",
    "sum_up",
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
from collections.abc import Callable, Iterable, MutableMapping
from datetime import UTC, datetime
from types import ModuleType
from typing import TYPE_CHECKING, Any

from supervisor.plain import harmless, takes_lines_back
from supervisor.systemd import is_journal, prioritized

if TYPE_CHECKING:
    from supervisor.repeats import Repeats


class _Later(ModuleType):
    """Stands in for a module until something of it is wanted."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


# Not in every process: structlog imports asyncio for loggers that are awaited (25 ms and 3 MB with
# what it draws in), and rich (40 ms and 6 MB), where that is installed, to draw tracebacks, which are
# written plainly here.
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
_in_hand: Callable[[], dict[str, Any]] = dict
_call_at: Callable[[float, Callable[[], object]], object] | None = None
_QUIET = frozenset({"debug", "info"})
_repeats: tuple[int, Repeats] | None = None  # of the process with this pid
_concealed: tuple[str, ...] = ()  # URLs
_redacted: Callable[[str], str] | None = None  # what takes them out, once a line is written
_repeats_lock = threading.RLock()
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
    elif style == "console" and takes_lines_back(sys.stderr, os.environ):
        render = _for_terminal(render)
    # Of the same length in both styles: a line that another thread is writing comes to its end.
    _processors[:] = [
        structlog.contextvars.merge_contextvars,
        _hold_back_repeated,
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


def conceal(urls: Iterable[str]) -> None:
    """Let no line of this process show the passwords in these URLs."""
    global _concealed, _redacted  # a process has one log
    _concealed, _redacted = tuple(urls), None


def redacted(text: str) -> str:
    """Return a text without passwords: those of `conceal`, and of any URL in it. Any thread."""
    if not _concealed and "://" not in text:
        return text
    global _redacted  # noqa: PLW0603  # a process has one log
    if _redacted is None:
        from supervisor import redaction  # no start needs it

        _redacted = redaction.remover(_concealed)
    return _redacted(text)


def write(text: str) -> None:
    """Write text that is no log line where the log goes, under the same rules. Any thread."""
    _standard_error.write(text)


def draw(text: str) -> None:
    """Write what is not to stay, unless lines of the log wait to be written. Any thread."""
    if _standard_error.backlog() is None:
        _standard_error.write(text)


def backlog() -> int | None:
    """Return a descriptor to be polled for writing, then `flush`; None: nothing is kept."""
    return _standard_error.backlog()


def flush(timeout: float) -> None:
    """Write what is kept; wait for the reader so many seconds at most. Any thread."""
    _standard_error.flush(timeout)


def _add_bound(_logger: object, _method: str, fields: _Fields) -> _Fields:
    if not _bound:
        return fields
    in_hand = {} if "time" in fields else _in_hand()  # what has a time is nobody's doing of now
    return {**_bound, **in_hand, **fields}


def correlate(
    in_hand: Callable[[], dict[str, Any]],
    call_at: Callable[[float, Callable[[], object]], object],
) -> None:
    """Let lines name what their thread or task has in hand.

    Args:
        in_hand: returns fields for a line that is being written; from whichever thread writes it.
        call_at: runs an action at a monotonic time: sums of repeated lines are told by it.
    """
    global _in_hand, _call_at  # a process has one log
    _in_hand, _call_at = in_hand, call_at


def _hold_back_repeated(_logger: object, method: str, fields: _Fields) -> _Fields:
    """Drop a warning or an error that has been written often enough just now, and count it.

    Not what is below: that is a record, and whoever asked for it counts its lines. Not the events
    of anybody's life, which come with their time.
    """
    global _repeats  # noqa: PLW0603  # a process has one log
    if method in _QUIET or "time" in fields:
        return fields
    from supervisor import repeats  # no start needs it

    if fields.get("exc_info") is True:
        fields["exc_info"] = sys.exc_info()[1] or False
    key = repeats.sameness(method, fields)
    if key is None:
        return fields
    now = time.monotonic()
    with _repeats_lock:
        if _repeats is None or _repeats[0] != os.getpid():
            _repeats = (os.getpid(), repeats.Repeats())
    sum_up(now)
    with _repeats_lock:
        is_first = _repeats[1].due is None
        if _repeats[1].take(key, method, str(fields.get("event")), now):
            return fields
        due = _repeats[1].due
    if is_first and _call_at is not None and due is not None:
        _call_at(due, _tell_sums)
    raise structlog.DropEvent


def repeats_due() -> float | None:
    """Return when `sum_up` is wanted, for a process that has no `call_at`."""
    return None if _repeats is None else _repeats[1].due


def sum_up(now: float) -> None:
    """Tell how often lines were repeated that were not written. Any thread."""
    if _repeats is None or _repeats[0] != os.getpid():
        return
    with _repeats_lock:
        over = _repeats[1].over(now)
    for each in over:
        getattr(get_logger(), each.level)(
            "log.repeated",
            time=timestamp(),
            line=each.event,
            times=each.times,
            seconds=round(each.last - each.first, 3),
            first=_clock(each.first),
            last=_clock(each.last),
        )


def _tell_sums() -> None:
    now = time.monotonic()
    sum_up(now)
    due = repeats_due()
    if due is not None and _call_at is not None:
        _call_at(due, _tell_sums)


def _clock(moment: float) -> str:
    """Return the wall clock of a moment of the monotonic one."""
    return timestamp(time.time() - (time.monotonic() - moment))


def timestamp(seconds: float | None = None) -> str:
    """Return the wall clock, or that moment of it, as RFC 3339, UTC, microseconds."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


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


def _for_terminal(render: Any) -> Any:
    """Let each line take the place of what stands where it begins: see `supervisor.progress`."""

    def in_place(logger: object, method: str, fields: _Fields) -> str:
        return f"\x1b[K{render(logger, method, fields)}"

    return in_place


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
        self._is_torn = False  # what stands there ends in the middle of a line of ours
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
        self._is_writing = self._is_torn = False

    def _keep(self, line: bytes) -> None:
        if self._is_torn and not self._kept:  # its rest was given up: it must not spoil this one
            line = b"\n" + line
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
                    self._is_torn = written < len(line)
                    if self._is_torn:
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
        _standard_error.write(f"{redacted(message)}\n")

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
