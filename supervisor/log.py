"""Logging: one structlog configuration for supervisor and workers. A leaf.

Lines go to standard error, one write each. Every line of a worker says which worker, group and
generation it comes from, whatever thread or library wrote it: the names are bound to the
configuration, because context variables do not reach threads that are started later.
"""

from __future__ import annotations

__all__ = ["configure", "timestamp"]

import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import structlog

_Fields = MutableMapping[str, Any]


def configure(style: str, level: str, **bound: Any) -> None:
    """Configure structlog and the standard library's logging for this process.

    Args:
        style: "console" for eyes, "json" for programs.
        level: the least severe level that is written, as "info".
        bound: fields that every line of this process carries.
    """
    threshold = getattr(logging, level.upper())

    def bind(_logger: object, _method: str, fields: _Fields) -> _Fields:
        return {**bound, **fields} if bound else fields

    colours = style == "console" and sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            bind,
            structlog.processors.add_log_level,
            *(_console(colours=colours) if style == "console" else _json()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=threshold, force=True)


def timestamp() -> str:
    """Return the wall clock as RFC 3339, UTC, microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _console(*, colours: bool) -> list[Any]:
    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
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


class _ToStructlog(logging.Handler):
    """Sends what libraries log through the standard library the same way as our own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )
        except Exception:
            self.handleError(record)
