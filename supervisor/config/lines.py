"""Where each key of a TOML document stands. tomllib does not say.

The document has been parsed by tomllib before: it is known to be valid, so this scanner only has to
tell keys from values and to count. Were it ever to lose its way, it keeps what it has found, and a
problem is reported with the line of the table around it, or with none. It never raises.
"""

from __future__ import annotations

__all__ = ["KeyPath", "Lines"]

import contextlib
import re
import tomllib

KeyPath = tuple[str | int, ...]  # as ("workers", "jobs", "pools", 1): an int counts in an array

_BLANK = re.compile(r"(?:[ \t]|#[^\n]*)*")
_SPACE = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'  # the last of them may be its own: up to two before the end
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"""[^\[\]{},\n#"'=]+""")  # numbers, booleans, dates (these hold a blank)


class Lines:
    """The lines of one document. Scanned when first asked: a good file never is."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._lines: dict[KeyPath, int] | None = None

    def of(self, path: KeyPath) -> int | None:
        """Return the line of a key, or of the closest table around it that is in the file."""
        if self._lines is None:
            self._lines = _scan(self._text)
        for length in range(len(path), 0, -1):
            line = self._lines.get(path[:length])
            if line is not None:
                return line
        return None


def _scan(text: str) -> dict[KeyPath, int]:
    scanner = _Scanner(text)
    with contextlib.suppress(_LostError, RecursionError, tomllib.TOMLDecodeError):
        scanner.document()
    return scanner.lines


class _LostError(Exception):
    """The text is not what the scanner expects here."""


class _Scanner:
    """One pass over the text, moving forward only."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._text = text
        self._at = 0
        self._line, self._counted = 1, 0  # the line at offset `_counted`
        self._arrays: dict[KeyPath, int] = {}  # arrays of tables: the index of the current table

    def document(self) -> None:
        table: KeyPath = ()
        while char := self._next(_SPACE):
            if char == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> KeyPath:
        line = self._current_line()
        repeated = self._text.startswith("[[", self._at)
        self._at += 2 if repeated else 1
        path: KeyPath = ()
        *parents, last = self._key()
        for part in parents:
            path = (*path, part)
            self.lines.setdefault(path, line)
            if path in self._arrays:
                path = (*path, self._arrays[path])
        path = (*path, last)
        self._expect("]]" if repeated else "]")
        if repeated:
            self.lines.setdefault(path, line)
            self._arrays[path] = self._arrays.get(path, -1) + 1
            path = (*path, self._arrays[path])
        self.lines[path] = line  # better than an earlier [a.b], which only implies [a]
        return path

    def _pair(self, path: KeyPath) -> None:
        line = self._current_line()
        for part in self._key():
            path = (*path, part)
            self.lines.setdefault(path, line)
        self._next(_BLANK)
        self._expect("=")
        self._value(path)

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._next(_BLANK)
            parts.append(_unquoted(self._take(_PART)))
            if self._next(_BLANK) != ".":
                return parts
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        match self._next(_BLANK):
            case '"' | "'":
                self._take(_STRING)
            case "[":
                self._array(path)
            case "{":
                self._inline_table(path)
            case _:
                self._take(_SCALAR)

    def _array(self, path: KeyPath) -> None:
        self._at += 1
        index = 0
        while self._next(_SPACE) != "]":
            item = (*path, index)
            self.lines[item] = self._current_line()
            self._value(item)
            index += 1
            if self._next(_SPACE) == ",":
                self._at += 1
        self._at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self._at += 1
        while self._next(_SPACE) != "}":
            self._pair(path)
            if self._next(_SPACE) == ",":
                self._at += 1
        self._at += 1

    def _next(self, skipped: re.Pattern[str]) -> str:
        """Skip blanks and comments; return the character after them, "" at the end."""
        match = skipped.match(self._text, self._at)
        if match is not None:
            self._at = match.end()
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise _LostError
        self._at = match.end()
        return match[0]

    def _expect(self, symbol: str) -> None:
        if not self._text.startswith(symbol, self._at):
            raise _LostError
        self._at += len(symbol)

    def _current_line(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line


def _unquoted(part: str) -> str:
    if part.startswith('"') and "\\" in part:
        return str(tomllib.loads(f"key = {part}")["key"])
    return part[1:-1] if part[0] in "\"'" else part
