"""Lines that say the same thing again and again: the first ones are written, the rest is summed up.

Pure. A line counts as the same only when all that its author wrote in it is the same, so nothing is
lost but how often it was said, and that is told. Imported with the first warning of a process.
"""

from __future__ import annotations

__all__ = ["Repeated", "Repeats", "sameness"]

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

WINDOW = 10.0  # seconds that begin with a line
MOST = 10  # equal lines of a window that are written
MAX_KEYS = 100  # different lines that are remembered at once; what is above is written
MAX_SIZE = 4000  # characters; a line that says more is written
MAX_CHAIN = 10  # exceptions of a chain that are looked at
MAX_FRAMES = 100


@dataclass(frozen=True, slots=True)
class Repeated:
    """Lines that were not written; times are monotonic."""

    level: str
    event: str
    times: int
    first: float
    last: float


@dataclass(slots=True)
class _Window:
    level: str
    event: str
    ends: float
    written: int = 0
    held: int = 0
    first: float = 0.0
    last: float = 0.0


class Repeats:
    """The lines of one process. Not thread-safe."""

    def __init__(self) -> None:
        self._windows: dict[Hashable, _Window] = {}

    @property
    def due(self) -> float | None:
        """When `over` has something to tell."""
        return min((each.ends for each in self._windows.values() if each.held), default=None)

    def take(self, key: Hashable, level: str, event: str, now: float) -> bool:
        """Count a line; False when it is one of those that are only counted.

        What a window that is over has held back must have been asked for before.
        """
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= MAX_KEYS:
                return True
            window = self._windows[key] = _Window(level, event, now + WINDOW)
        if window.written < MOST:
            window.written += 1
            return True
        window.held += 1
        window.first = window.first or now
        window.last = now
        return False

    def over(self, now: float) -> list[Repeated]:
        """Forget the windows that are over; return what they have held back."""
        ended = [key for key, window in self._windows.items() if window.ends <= now]
        windows = [self._windows.pop(key) for key in ended]
        return [
            Repeated(each.level, each.event, each.held, each.first, each.last)
            for each in windows
            if each.held
        ]


def sameness(level: str, fields: Mapping[str, Any]) -> Hashable | None:
    """Return what is equal for lines that say the same; None for one that is to be written anyway.

    Errors say the same when they were raised in the same places with the same words.
    """
    exc_info = fields.get("exc_info")
    said = repr([item for item in fields.items() if item[0] != "exc_info"])
    if len(said) > MAX_SIZE or isinstance(exc_info, bool | int):
        return None
    error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
    return level, said, _raised(error) if isinstance(error, BaseException) else ()


def _raised(error: BaseException | None) -> Hashable:
    chain: list[Hashable] = []
    while error is not None and len(chain) < MAX_CHAIN:
        chain.append((type(error), str(error), *islice(_places(error.__traceback__), MAX_FRAMES)))
        error = error.__cause__ or error.__context__
    return tuple(chain)


def _places(traceback: TracebackType | None) -> Any:
    while traceback is not None:
        yield traceback.tb_frame.f_code, traceback.tb_lineno
        traceback = traceback.tb_next
