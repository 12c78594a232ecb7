"""Logging: one structlog configuration for supervisor and workers. A leaf.

Lines go to standard error, one write each. Every line of a worker says which worker, group and
generation it comes from, whatever thread or library wrote it: the names are bound to the process,
because context variables do not reach threads that are started later.
"""

from __future__ import annotations

__all__ = ["bind", "change", "configure", "get_logger", "in_force", "timestamp"]

import contextlib
import logging
import os
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

from supervisor.systemd import is_journal, prioritized

# structlog imports rich where that is installed (40 ms and 6 MB in every process) to draw
# tracebacks, which are written plainly here.
_without_rich = sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
try:
    import structlog
finally:
    if _without_rich is None:
        del sys.modules["rich"]

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


def configure(style: str, level: str) -> None:
    """Configure structlog and the standard library's logging for this process.

    Args:
        style: "console" for eyes, "json" for programs.
        level: the least severe level that is written, as "info".
    """
    _take(style, level)
    structlog.configure(
        processors=_processors,
        wrapper_class=_Logger,
        logger_factory=structlog.WriteLoggerFactory(file=_StandardError()),  # type: ignore[arg-type]
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
    colours = style == "console" and sys.stderr.isatty()
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


def _filtering(level: str) -> type:
    return structlog.make_filtering_bound_logger(getattr(logging, level.upper()))


# What is below the level costs nothing, because structlog has a class of loggers for each level.
# Every logger of this process is of this class, whose base is that of the level in force.
_Logger: Any = type("_Logger", (_filtering("info"),), {})


def _add_bound(_logger: object, _method: str, fields: _Fields) -> _Fields:
    return {**_bound, **fields} if _bound else fields


def timestamp() -> str:
    """Return the wall clock as RFC 3339, UTC, microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _console(*, colours: bool) -> list[Any]:
    def for_eyes(_logger: object, _method: str, fields: _Fields) -> _Fields:
        """Show local time, no empty fields, and long texts as blocks below the line."""
        shown = {key: value for key, value in fields.items() if value not in (None, "", [], {})}
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
    """Standard error without its errors: a full disk, or a reader that has gone, stops nobody."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


class _ToStructlog(logging.Handler):
    """Sends what libraries log through the standard library the same way as our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )
        except Exception:
            self.handleError(record)
