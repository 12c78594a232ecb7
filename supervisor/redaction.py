"""Passwords taken out of what is written or sent: whatever a driver, a server or a user says. Pure.

Servers quote what they do not understand, and for an old Redis that is the password. Imported by who
writes a line, and not before.
"""

from __future__ import annotations

__all__ = ["passwords", "remover"]

import json
import re
from collections.abc import Callable, Iterable
from urllib.parse import unquote

# What is shorter, or stands elsewhere in its URL, too, is in half of all words.
MIN_PASSWORD = 4  # characters
_LOGIN = re.compile(r"(://[^\s:/@\"']*):[^\s/@\"'\\]+@")
_FIELD = re.compile(r"(?i)(://[^\s\"']*[?&](?:\w*passw?o?r?d|pwd|secret|token)=)[^&\s\"'\\]+")
_VALUE = re.compile(r"(?i)[?&](?:\w*passw?o?r?d|pwd|secret|token)=([^&]+)")


def passwords(urls: Iterable[str]) -> tuple[str, ...]:
    """Return the passwords in these URLs, in each way in which a text may spell them."""
    found: set[str] = set()
    for url in urls:
        login, at, _ = url.partition("://")[2].rpartition("@")
        words = [login.partition(":")[2]] if at else []
        for word in (*words, *_VALUE.findall(url)):
            if len(unquote(word)) >= MIN_PASSWORD and url.count(word) == 1:
                plain = unquote(word)
                found |= {word, plain, json.dumps(plain)[1:-1], repr(plain)[1:-1]}
    return tuple(sorted(found, key=len, reverse=True))


def remover(urls: Iterable[str]) -> Callable[[str], str]:
    """Return what takes the passwords in these URLs out of a text, and those of any URL in it."""
    secrets = passwords(urls)

    def redacted(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        if "://" in text:
            text = _FIELD.sub(r"\1***", _LOGIN.sub(r"\1:***@", text))
        return text

    return redacted
