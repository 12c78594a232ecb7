"""What a terminal is told: nothing that steers it may come from outside. Pure."""

from __future__ import annotations

__all__ = ["counted", "harmless", "takes_lines_back"]

import re

TYPE_CHECKING = False  # type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROLS_IN_LINES = re.compile(_CONTROLS.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts: "1 worker", "2 workers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def harmless(text: str, *, lines: bool = False) -> str:
    """Return a text without what would steer a terminal; with `lines` line ends and tabs stay."""
    if lines:
        return _CONTROLS_IN_LINES.sub("\ufffd", text.expandtabs(4))
    return _CONTROLS.sub(" ", text)


def takes_lines_back(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Tell whether a stream is a terminal on which a line can be erased."""
    return stream.isatty() and environment.get("TERM", "dumb") != "dumb"
