"""What takes longer than a second shows how far it is, on the last line of a terminal.

The line is never part of the log. The cursor stays at its begin, and each line of the log, whichever
process writes it, begins by erasing what is there; so the two cannot mix, and nobody has to know of
the other. Where there is no terminal, nothing of this is imported, let alone written.
"""

from __future__ import annotations

__all__ = ["AFTER", "Progress", "while_waiting"]

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from supervisor.core.fleet import Phase
from supervisor.core.snapshot import FleetSnapshot
from supervisor.core.underway import sentence
from supervisor.plain import harmless

AFTER = 1.0  # seconds until something is shown
EVERY = 0.5  # seconds until it is drawn anew: a line of the log may have taken its place
ERASED = "\r\x1b[K"


class Progress:
    """What a supervisor in a terminal is about, for as long as it is not at rest.

    Args:
        write: writes to the terminal without waiting for it, and without a line's end.
        snapshot: returns the fleet as it is now.
    """

    def __init__(
        self, write: Callable[[str], object], snapshot: Callable[[], FleetSnapshot]
    ) -> None:
        self._write = write
        self._snapshot = snapshot
        self._what: Phase | str = ""  # what is under way, "" for nothing
        self._began = 0.0
        self._due: float | None = None
        self._is_shown = False

    def next_deadline(self) -> float | None:
        """Return when `turn` is wanted at the latest."""
        return self._due

    def turn(self, phase: Phase, now: float, *, is_rolling: bool) -> None:
        """Show what is under way, once it has been for a while; erase it when it is over."""
        what = ("rolling" if is_rolling else "") if phase is Phase.READY else phase
        if what != self._what:
            self.erase()
            self._what, self._began = what, now
            self._due = now + AFTER if what else None
        if self._due is not None and self._due <= now:
            self._write(_drawn(sentence(self._snapshot(), now - self._began, now)))
            self._is_shown = True
            self._due = now + EVERY

    def erase(self) -> None:
        """Leave nothing of it."""
        if self._is_shown:
            self._write(ERASED)
            self._is_shown = False


@contextlib.contextmanager
def while_waiting(what: str, terminal: TextIO) -> Iterator[None]:
    """Show for how long something has been waited for, from the second second on.

    Args:
        what: in words, as "asking 3 servers".
        terminal: where that is shown.
    """
    over = threading.Event()
    began = time.monotonic()

    def show() -> None:
        wait = AFTER
        while not over.wait(wait):
            terminal.write(_drawn(f"{what}, {time.monotonic() - began:.0f} s"))
            terminal.flush()
            wait = EVERY

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if time.monotonic() - began > AFTER:
            terminal.write(ERASED)
            terminal.flush()


def _drawn(text: str) -> str:
    """Return what draws one line, however long, and leaves the cursor at its begin."""
    columns = os.get_terminal_size(2).columns if os.isatty(2) else 80
    short = harmless(text)
    if len(short) >= columns > 1:
        short = f"{short[: columns - 2]}…"
    # Wide characters may still make it too long: the terminal is told to cut, and not to wrap.
    return f"{ERASED}\x1b[?7l{short}\x1b[?7h\r"
