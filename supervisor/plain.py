"""Text from outside, made harmless for a terminal: nothing that anybody says may steer it. Pure."""

from __future__ import annotations

__all__ = ["harmless"]

import re

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROLS_IN_LINES = re.compile(_CONTROLS.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def harmless(text: str, *, lines: bool = False) -> str:
    """Return a text without what would steer a terminal; with `lines` line ends and tabs stay."""
    if lines:
        return _CONTROLS_IN_LINES.sub("\ufffd", text.expandtabs(4))
    return _CONTROLS.sub(" ", text)
